#!/usr/bin/env bash
export LATER="--seed 826 ${LATER:-}" # as in the published script
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" city overlap 13-6 STAR-Lite
