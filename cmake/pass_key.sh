#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Hides one sentence near the beginning of a document and asks for it at the end: the prompt of `make run`.
#   pass_key.sh DOCUMENT TOKENS KEY FILE
# The document is cut to about TOKENS tokens (rather more than fewer: 2.7 bytes each).
set -eu
document=$1
tokens=$2
key=$3
output=$4
lines_before=30
{
  head -n "$lines_before" -- "$document"
  printf '\n# The pass key of amber falcon is %s.\n' "$key"
  head -c "$((tokens * 27 / 10))" -- "$document" | tail -n "+$((lines_before + 1))" | sed '$d'
  printf '\n\nWhat is the pass key of amber falcon? The pass key of amber falcon is '
} >"$output.part"
mv -- "$output.part" "$output"
