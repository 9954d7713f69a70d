#!/usr/bin/env bash
# The published commands of every step of a task, one after the other: scripts/train.sh DATASET SETTING TASK [METHOD]
#   scripts/train.sh voc overlap 15-1        scripts/train.sh ade disjoint 100-10        scripts/train.sh city overlap 13-6 STAR-Lite
# METHOD is STAR (the default), STAR-Basic or STAR-Lite.
# From the environment: GPU, BS (of each process), SAVEDIR, NAME, MEMORY_SIZE (50 for STAR-M), CONFIG, PYTHON, and flags in
# EXTRA (every command) and LATER (commands of steps after step 0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# < 3 || $# > 4)); then
  echo "usage: scripts/train.sh DATASET SETTING TASK [METHOD], such as scripts/train.sh voc overlap 15-1" >&2
  exit 2
fi
dataset=$1 setting=$2 task=$3 method=${4:-STAR}
case $method in
  STAR) journal=() ;;
  STAR-Lite) journal=(--noise_type dist --basemodel DeepLabV3) ;;
  STAR-Basic) journal=(--noise_type dist --basemodel DeepLabV3 --save_prototypes) ;;
  *)
    echo "scripts/train.sh: unknown method '$method'; known: STAR, STAR-Basic, STAR-Lite" >&2
    exit 2
    ;;
esac
python=${PYTHON:-python}
case $dataset in
  ade) gpu=0,1 bs=12 init_lr=0.0025 lr=0.00025 ;;
  city) gpu=0 bs=24 init_lr=0.005 lr=0.0005 ;;
  *) gpu=0 bs=24 init_lr=0.001 lr=0.0001 ;;
esac
steps=$("$python" -c '
import sys
from starseg.data.datasets import DATASETS
dataset, task = sys.argv[1:]
tables = DATASETS[dataset].tasks if dataset in DATASETS else {}
if not tables:
    sys.exit(f"scripts/train.sh: unknown data set {dataset!r}; known: voc, ade, city")
if task not in tables:
    known = ", ".join(sorted(tables))
    sys.exit(f"scripts/train.sh: unknown task {task!r} for data set {dataset!r}; known: {known}")
print(len(tables[task]))
' "$dataset" "$task") || exit 2

common=(-c "${CONFIG:-configs/config_$dataset.json}" -d "${GPU:-$gpu}" --multiprocessing_distributed
  --save_dir "${SAVEDIR:-saved_$dataset}" --name "${NAME:-$method}"
  --task_name "$task" --task_setting "$setting" --bs "${BS:-$bs}" "${journal[@]}")
# shellcheck disable=SC2206  # lists of flags
extra=(${EXTRA:-}) later=(${LATER:-})

"$python" "train_$dataset.py" "${common[@]}" --task_step 0 --lr "$init_lr" "${extra[@]}"
for ((step = 1; step < steps; step++)); do
  if [[ $method == STAR-Lite ]]; then
    "$python" compute_prototype.py "${common[@]}" --task_step "$step" "${extra[@]}"
  fi
  "$python" "train_$dataset.py" "${common[@]}" --task_step "$step" --lr "$lr" --freeze_bn \
    --mem_size "${MEMORY_SIZE:-0}" "${later[@]}" "${extra[@]}"
done
