#!/usr/bin/env bash
# STAR on PASCAL VOC 2012 15-1, disjoint. Environment: GPU, BS, SAVEDIR, NAME, MEMORY_SIZE (50 for STAR-M), EXTRA flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/steps.sh

run_steps voc disjoint 15-1 6 "${GPU:-0}" "${BS:-24}" 0.001 0.0001
