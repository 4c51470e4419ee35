#!/usr/bin/env bash
# Installs the test dependencies and runs all checks: lint, format, types, tests.
#
#   bash launch/test.sh [FLAGS OF pytest]     e.g. --slow, -m gpu, -k selection; -n 0: one process, with printed output
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment "[dev]"

ruff check .
ruff format --check .
mypy
# Each worker takes the next file when it has finished one. The long files of tests/integration come first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
