#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Writes one long text made of this repository's own documents and sources, in an order that does
# not depend on the machine: the prompt of `make run`.
#   document.sh FILE
set -eu
output=$1
export LC_ALL=C
{
  cat README.md
  find docs include src tools tests -type f \
    \( -name '*.md' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' \) | sort |
    while IFS= read -r file; do
      printf '\n==== %s\n\n' "$file"
      cat -- "$file"
    done
} >"$output.part"
mv -- "$output.part" "$output"
