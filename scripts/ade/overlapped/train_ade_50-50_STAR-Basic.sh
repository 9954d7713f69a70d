#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" ade overlap 50-50 STAR-Basic
