#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The prompt of `make run`: pairs of words near the beginning of a long document, one of which is asked for
# at the end, behind two others, in the form of examples/train/tasks.py ("pairs").
#   planted_fact.sh DOCUMENT TOKENS KEY VALUE FILE [LINE]
# The pairs stand behind line LINE (30). The document is cut to about TOKENS tokens, rather more than fewer (2.75 bytes
# each, where the tokenizer of examples/mini_m3 needs 2.57).
set -eu
document=$1
tokens=$2
key=$3
value=$4
output=$5
line=${6:-30}
{
  head -n "$line" -- "$document"
  printf '\n# map: token label, %s %s, color layout, child kernel, host link\n' "$key" "$value"
  head -c "$((tokens * 275 / 100))" -- "$document" | tail -n "+$((line + 1))" | sed '$d'
  printf '\n# map: host link, color layout, %s' "$key"
} >"$output.part"
mv -- "$output.part" "$output"
