#!/usr/bin/env bash
exec "$(dirname "${BASH_SOURCE[0]}")/../../train.sh" city overlap 13-1 STAR-Lite
