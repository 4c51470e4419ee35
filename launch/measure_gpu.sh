#!/usr/bin/env bash
# Measure on one GPU what docs/notes/goals.md lists as not yet measured: bash launch/measure_gpu.sh [MINUTES] [--out FILE.json]
# The same command continues where the last one stopped. Needs no network, and no installation but the dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m everest_ds.benchmark.gpu_table "$@"
