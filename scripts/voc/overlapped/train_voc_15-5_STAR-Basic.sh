#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" voc overlap 15-5 STAR-Basic
