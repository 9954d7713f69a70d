#!/usr/bin/env bash
# The published commands of every step of a task, one after the other: scripts/train.sh DATASET SETTING TASK
#   scripts/train.sh voc overlap 15-1        scripts/train.sh ade disjoint 100-10        scripts/train.sh voc overlap 15-1_b
# From the environment: GPU, BS (of each process), SAVEDIR, NAME, MEMORY_SIZE (50 for STAR-M), CONFIG, EXTRA (more flags), PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# != 3)); then
  echo "usage: scripts/train.sh DATASET SETTING TASK, such as scripts/train.sh voc overlap 15-1" >&2
  exit 2
fi
dataset=$1 setting=$2 task=$3
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
  --save_dir "${SAVEDIR:-saved_$dataset}" --name "${NAME:-STAR}"
  --task_name "$task" --task_setting "$setting" --bs "${BS:-$bs}")
# shellcheck disable=SC2206  # a list of flags
extra=(${EXTRA:-})

"$python" "train_$dataset.py" "${common[@]}" --task_step 0 --lr "$init_lr" "${extra[@]}"
for ((step = 1; step < steps; step++)); do
  "$python" "train_$dataset.py" "${common[@]}" --task_step "$step" --lr "$lr" --freeze_bn \
    --mem_size "${MEMORY_SIZE:-0}" "${extra[@]}"
done
