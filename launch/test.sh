#!/usr/bin/env bash
# Installs what the tests need and runs all gates: lint, format, types, tests.
#
#   bash launch/test.sh [FLAGS OF pytest]     e.g. --slow, -m gpu, -k selection; -n 0 for one process, to see what tests print
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment "[dev]"

ruff check .
ruff format --check .
mypy
# A process takes the next file when it is done with one, the long ones of tests/integration first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
