#!/usr/bin/env bash
# STAR on ADE20K 50-50, overlap. Environment: GPU, BS, SAVEDIR, NAME, MEMORY_SIZE (50 for STAR-M), EXTRA flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/steps.sh

run_steps ade overlap 50-50 3 "${GPU:-0,1}" "${BS:-12}" 0.0025 0.00025  # of each process: 24 in all
