#!/usr/bin/env bash
# Measures on one GPU what docs/notes/goals.md lists as not yet measured. The same command continues.
# Needs no network and, besides the dependencies, no installation.
#
#   bash launch/measure_gpu.sh [MINUTES] [--out FILE.json]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m everest_ds.benchmark.gpu_table "$@"
