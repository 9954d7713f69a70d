#!/usr/bin/env bash
# Compare methods on the VOC subset, each at its best setting, chosen on an eighth of the training images (README.md).
#
#   benchmarks/fair.sh OUT JOBS [KEY=VALUE ...]    # for example data.root=/data/PascalVOC2012 model.pretrained=lite0.pth
#
# 1. step 0 of every method with 3 rates of the encoder x 2 base rates x 2 weights of positive pixels (STAR and joint)
# 2. the later steps with 3 rates, from the 2 best settings of step 0
# 3. the best setting of every method on all training images, evaluated on the test images
#
# Rerun the same command to resume. The variables below can be set in the environment; a rerun with more methods, seeds
# or values trains only what is missing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=$1 jobs=$2
shift 2
methods=${METHODS:-joint,star,ssul,dft,mib,plop,star-m,star-lite,star-basic,segacil}
seeds=${SEEDS:-0}             # of part 3
shortlist=${SHORTLIST:-2}     # number of settings of step 0 in part 2
encoder_lr=${ENCODER_LR:-0,0.1,1}
base_lr=${BASE_LR:-0.002,0.01}
later_lr=${LATER_LR:-0.0003,0.001,0.003}
pos_weight=${POS_WEIGHT:-1,4} # weight of positive pixels in step 0 and later; 4 is STAR's published value
sweeps=()
for section in joint star star-basic star-lite; do
    [[ ",$methods," =~ ,"$section"(-m)?, ]] && sweeps+=(--sweep "$section.pos_weight=$pos_weight")
done
export COLUMNS=${COLUMNS:-140} PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m starseg compare benchmarks/voc_subset.yaml data.validation=0.125 segacil.width=2048 "$@" \
    --methods "$methods" --seeds "$seeds" --shortlist "$shortlist" --jobs "$jobs" --no-ceilings --out "$out" \
    --sweep "train.encoder_lr=$encoder_lr" --sweep "train.base.lr=$base_lr" --sweep "train.later.lr=$later_lr" ${sweeps[@]+"${sweeps[@]}"}
