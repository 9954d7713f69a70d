#!/usr/bin/env bash
# Run the checks and benchmarks that need a GPU, in under 8 minutes on one H100, without a network or an installation.
#
#   python benchmarks/pack_subset.py VOC benchmarks/subset.tar    # beforehand, where the data are
#   benchmarks/gpu.sh [--quick] [FOLDER]
#
# Results go to FOLDER (default: $OUT, else runs/gpu): log.txt with everything printed, tests.xml, bench.json, and
# results of the training runs. Each part has a time limit; a part that fails does not stop the others, but the exit
# status is then 1. --quick only checks that everything runs, on a CPU too. PYTHON names the interpreter, SUBSET the file
# written by pack_subset.py; without it, a subset of $STARSEG_SHARED/data/PascalVOC2012 is packed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

quick=
if [[ ${1:-} == --quick ]]; then
    quick=1
    shift
fi
out=${1:-${OUT:-runs/gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exec > >(tee "$out/log.txt") 2>&1

python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 STARSEG_CACHE=$work/cache
starseg=("$python" -m starseg)
failed=()

# part NAME SECONDS COMMAND...: run a command within a time limit.
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@"
    local status=$?
    echo "== $name: exit status $status after $((SECONDS - start)) s of at most $limit s"
    ((status == 0)) || failed+=("$name")
}

if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
elif [[ ! $quick ]]; then
    echo "no nvidia-smi here: use --quick to check the script on a CPU"
    exit 2
fi
"$python" -c 'import sys, torch, timm; print("python", sys.version.split()[0], "torch", torch.__version__, "timm", timm.__version__)'

part tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu --durations=10 --junitxml="$out/tests.xml" tests/e2e/test_gpu.py
part bench 150 "${starseg[@]}" bench ${quick:+--quick} --json "$out/bench.json"

step=(--seconds 45)
[[ $quick ]] && step=(--batch 2 --crop 64 --backbone test_resnet --repeats 1 --seconds 1)
part step 100 "$python" benchmarks/compile_step.py "${step[@]}"

subset=${SUBSET:-benchmarks/subset.tar}
if [[ ! -f $subset ]]; then
    subset=$work/subset.tar
    part pack 60 "$python" benchmarks/pack_subset.py "${STARSEG_SHARED:-../shared}/data/PascalVOC2012" "$subset" ${quick:+22}
fi
tar -xf "$subset" -C "$work" || failed+=(unpack)

settings=(data.root="$work/PascalVOC2012" data.cache=auto data.crop=320 train.base.epochs=20 train.later.epochs=20)
[[ $quick ]] && settings=(data.root="$work/PascalVOC2012" data.crop=64 train.batch_size=4 train.base.epochs=1 train.later.epochs=1)
[[ -f $work/encoder.pth ]] && settings+=(model.pretrained="$work/encoder.pth") || settings+=(model.pretrained=false)
for method in star joint; do
    part "train $method" 80 "${starseg[@]}" train benchmarks/voc_subset.yaml method="$method" "${settings[@]}" --out "$work/$method"
    cp "$work/$method/results.json" "$out/$method.json"
done
part "eval bf16" 40 "${starseg[@]}" eval "$work/joint/step_0" eval.precision=bf16 --json "$out/joint_bf16.json"

echo "== all parts: $SECONDS s; failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
