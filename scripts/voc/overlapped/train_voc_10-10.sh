#!/usr/bin/env bash
# STAR on PASCAL VOC 2012 10-10, overlap. Environment: GPU, BS, SAVEDIR, NAME, MEMORY_SIZE (50 for STAR-M), EXTRA flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/steps.sh

run_steps voc overlap 10-10 2 "${GPU:-0}" "${BS:-24}" 0.001 0.0001
