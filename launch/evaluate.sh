#!/usr/bin/env bash
# Score a fine-tuned run on a list, with the views of its recipe, on all GPUs of this machine.
#
#   bash launch/evaluate.sh runs/k400_l_ft k400/test.csv [FLAGS OF everest evaluate]
set -euo pipefail
run=$1 list=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/run_deepspeed.sh"
run_deepspeed --no_local_rank --module everest_ds evaluate "$run" --list "$list" "$@"
