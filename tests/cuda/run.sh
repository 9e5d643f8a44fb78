#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The GPU tests on a machine without ctest, in parallel processes; the reference's part on the CPU takes
# most of the time.
#   run.sh PROGRAM LOGS [--gtest_filter=... and other options of gtest]
# Logs go to the folder LOGS. Prints failures, then totals per backend and operation. PROCESSES
# defaults to the number of cores, SECONDS_LIMIT to 300.
set -euo pipefail
program=$1
logs=$2
shift 2
processes=${PROCESSES:-$(nproc)}
mkdir -p "$logs"
rm -f "$logs"/shard_*
for ((i = 0; i < processes; ++i)); do
  (
    status=0
    GTEST_TOTAL_SHARDS=$processes GTEST_SHARD_INDEX=$i MSA_NUM_THREADS=1 \
      timeout "${SECONDS_LIMIT:-300}" "$program" --gtest_brief=1 "$@" >"$logs/shard_$i" 2>&1 || status=$?
    echo "SHARD $i ended with $status" >>"$logs/shard_$i"
  ) &
done
wait
cat "$logs"/shard_* >"$logs/all"
# The first failures in full, the rest by name.
grep -aE '^(cuda_[a-z0-9]+ [A-Za-z]+:|no CUDA|a kernel hangs|.*declined what)' "$logs/all" | cut -c 1-400 | head -n 40 || true
grep -aE '^\[  FAILED  \] .*, where' "$logs/all" | sed 's/, where GetParam.*//' | sort -u | head -n 60 || true
grep -aE '^\[  FAILED  \] [A-Za-z]+\.[A-Za-z]+' "$logs/all" | grep -v 'where' | sort -u | head -n 20 || true
grep -aE 'SHARD [0-9]+ ended with' "$logs/all" | awk '$5 != 0' || true
awk '/^DECLINED/ {n = $4; key = $2 " " $3; $1 = $2 = $3 = $4 = $5 = ""; count[key " :" $0] += n}
     END {for (k in count) print "declined " count[k] " x " k}' "$logs/all" | sort | cut -c 1-300
awk '/^TOTAL/ {key = sprintf("%-13s %-23s", $2, $3); p[key] += $4; f[key] += $6; d[key] += $8; b[key] += $10}
     END {for (k in p) printf "%s %5d passed %4d failed %5d declined, %d of them promised\n", k, p[k], f[k], d[k], b[k]}' \
  "$logs/all" | sort
tests=$(grep -aoE '^\[==========\] [0-9]+ test' "$logs/all" | awk '{n += $2} END {print n + 0}')
bad=$(awk '/^SHARD/ && $5 != 0 {n++} END {print n + 0}' "$logs/all")
echo "$tests tests in $processes processes, $bad processes with failures"
[[ $bad == 0 && $tests != 0 ]]
