#!/usr/bin/env bash
# Fine-tune a recipe of the paper on all GPUs of this machine, with scores during training.
#
#   bash launch/finetune.sh k400_vit_l_ft k400/train.csv k400/val.csv WEIGHTS runs/k400_l_ft [FLAGS OF everest finetune]
#
# WEIGHTS: a run, a checkpoint, an official .pth file, a Hugging Face folder, or a file of `everest convert`.
set -euo pipefail
recipe=$1 train=$2 val=$3 weights=$4 out=$5
shift 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/launch/run_deepspeed.sh"
run_deepspeed --no_local_rank --module everest_ds finetune "$recipe" \
  --data.train-list "$train" --data.val-list "$val" --init-from "$weights" \
  --ds-config "$here/ds_configs/zero2.json" --out "$out" "$@"
