#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" ade overlap 100-10 STAR-Lite
