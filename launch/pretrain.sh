#!/usr/bin/env bash
# Pre-train a recipe of the paper on all GPUs of this machine.
#
#   bash launch/pretrain.sh k400_vit_l k400/train.csv runs/k400_l [FLAGS OF everest pretrain]
set -euo pipefail
recipe=$1 list=$2 out=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/launch/run_deepspeed.sh"
run_deepspeed --no_local_rank --module everest_ds pretrain "$recipe" \
  --data.train-list "$list" --ds-config "$here/ds_configs/zero2.json" --out "$out" "$@"
