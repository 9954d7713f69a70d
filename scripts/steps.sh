# Sourced by the launch scripts: the published commands of every step of a task, one after the other.
# run_steps DATASET SETTING TASK STEPS GPUS BATCH_SIZE_OF_EACH_PROCESS LR_OF_STEP_0 LR_OF_LATER_STEPS
run_steps() {
  local dataset=$1 setting=$2 task=$3 steps=$4 gpu=$5 bs=$6 init_lr=$7 lr=$8 step
  local python=${PYTHON:-python}
  local common=(-c "${CONFIG:-configs/config_$dataset.json}" -d "$gpu" --multiprocessing_distributed
    --save_dir "${SAVEDIR:-saved_$dataset}" --name "${NAME:-STAR}"
    --task_name "$task" --task_setting "$setting" --bs "$bs")
  # shellcheck disable=SC2206  # EXTRA is a list of flags
  local extra=(${EXTRA:-})
  "$python" "train_$dataset.py" "${common[@]}" --task_step 0 --lr "$init_lr" "${extra[@]}"
  for ((step = 1; step < steps; step++)); do
    "$python" "train_$dataset.py" "${common[@]}" --task_step "$step" --lr "$lr" --freeze_bn \
      --mem_size "${MEMORY_SIZE:-0}" "${extra[@]}"
  done
}
