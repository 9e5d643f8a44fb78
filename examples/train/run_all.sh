#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Data, the three runs, evaluation: all that docs/experiments reports. Call it again to go on where it stopped.
#   examples/train/run_all.sh FOLDER MINUTES [options of train.py]
# With two GPUs the runs are made side by side, else one behind the other; MINUTES is for data and training.
# DATA_OPTIONS and EVALUATE_OPTIONS are passed to data.py and evaluate.py; STEPS leaves out some of "data train
# evaluate".
set -eu
folder=$1
minutes=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
gpus=$(nvidia-smi -L | grep -c '^GPU')
read -ra data_options <<<"${DATA_OPTIONS:-}"
read -ra evaluate_options <<<"${EVALUATE_OPTIONS:-}"
steps=" ${STEPS:-data train evaluate} "
mkdir -p "$folder"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/compiled} OMP_NUM_THREADS=4

left() { awk -v all="$minutes" -v gone="$SECONDS" 'BEGIN {left = all - gone / 60; print (left > 0.1 ? left : 0.1)}'; }

train() {
  local gpu=$1 recipe=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu "$python" "$here/train.py" --data "$folder/data" --out "$folder/runs" \
    --recipe "$recipe" --minutes "$(left)" "$@" 2>&1 | tee -a "$folder/$recipe.txt"
}

if [[ $steps == *" data "* && ! -e $folder/data/meta.json ]]; then
  "$python" "$here/data.py" --out "$folder/data" "${data_options[@]}" 2>&1 | tee "$folder/data.txt"
fi

if [[ $steps != *" train "* ]]; then
  true
elif ((gpus == 1)); then
  for recipe in gqa msa converted; do train 0 "$recipe" "$@"; done
else
  (
    train 0 gqa "$@"
    train 0 converted "$@"
  ) &
  train 1 msa "$@" &
  wait
fi

if [[ $steps != *" evaluate "* ]]; then exit; fi
number=0
for recipe in gqa msa converted; do
  if [[ ! -e $folder/runs/$recipe/latest.pt ]]; then continue; fi
  CUDA_VISIBLE_DEVICES=$((number % gpus)) "$python" "$here/evaluate.py" --data "$folder/data" --runs "$folder/runs" \
    --out "$folder/summary.$recipe.json" --only "$recipe" "${evaluate_options[@]}" 2>&1 | tee "$folder/evaluate.$recipe.txt" &
  number=$((number + 1))
done
wait
"$python" "$here/evaluate.py" --merge "$folder"/summary.*.json --out "$folder/summary.json"
