#!/usr/bin/env bash
# Compare methods on the VOC subset, each at its best setting: learning rates are chosen on held-out training images.
#
#   benchmarks/fair.sh OUT JOBS [KEY=VALUE ...]    # for example data.root=/data/PascalVOC2012 model.pretrained=lite0.pth
#
# Step 0 has 10 epochs and a later step 6. Joint training, which has no later steps, chooses between 5 and 15 epochs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=$1 jobs=$2
shift 2
starseg=(${PYTHON:-python3} -m starseg)
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
"${starseg[@]}" compare benchmarks/voc_subset.yaml "$@" --methods joint --seeds 0,1,2 --jobs "$jobs" \
    --out "$out/joint" --sweep train.base.lr=0.002,0.01 --sweep train.base.epochs=5,15 &
"${starseg[@]}" compare benchmarks/voc_subset.yaml "$@" train.base.epochs=10 \
    --methods star,star-m,mib,plop,ssul,dft --seeds 0,1,2 --jobs "$jobs" \
    --out "$out/methods" --sweep train.base.lr=0.002,0.01 --sweep train.later.lr=0.0003,0.001,0.003
status=$?
wait $! && exit $status
