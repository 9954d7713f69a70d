#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" ade overlap 100-50 STAR-Basic
