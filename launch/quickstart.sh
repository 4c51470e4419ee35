#!/usr/bin/env bash
# From a clone to a scored model: environment, demo videos, pre-training and fine-tuning through DeepSpeed (ZeRO-2), and
# the accuracy on videos that were never trained on; on all GPUs, or on two CPU processes where there is none. Run it
# again to go on or to look again.
#
#   [EVEREST_OUT=FOLDER] bash launch/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

out=${EVEREST_OUT:-quickstart}
everest doctor
everest demo-data quickstart/data

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  processes=$((gpus < 32 ? gpus : 32))
  precision=bf16
else
  export DS_ACCELERATOR=cpu
  processes=2
  precision=fp32
fi
share=$((32 / processes)) # the demo's batch is 32, or the multiple of the processes just below
train() {
  deepspeed --no_local_rank --num_gpus "$processes" --module everest_ds "$@" \
    --data.train-list quickstart/data/train.csv --ds-config ds_configs/zero2.json --precision "$precision" \
    --batch.global-size $((share * processes)) --batch.micro-size "$share"
}
train pretrain demo --out "$out/pretrained"
train finetune demo_ft --data.val-list quickstart/data/val.csv --init-from "$out/pretrained" --out "$out/finetuned"
everest evaluate "$out/finetuned" --list quickstart/data/test.csv --out "$out/evaluation"

python - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (out / "pretrained/metrics.jsonl").read_text().splitlines()]
losses = [row["loss"] for row in rows if row["kind"] == "train"]
tenth = max(len(losses) // 10, 1)
first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
top1 = json.loads((out / "evaluation/summary.json").read_text())["top1"]
print(f"\npre-training: mean loss of the first tenth {first:.3f}, of the last tenth {last:.3f}")
print(f"fine-tuning: top-1 {top1:.1%} over 8 classes, on test videos that were never trained on")
PYTHON
cat <<TEXT
all of it is in $out; where to look next:
  tensorboard --logdir $out                 curves
  less $out/evaluation/summary.json         scores, per class, with the views and the checkpoint
  everest predict $out/finetuned quickstart/data/test/00000.mp4
  everest recipes k400_vit_l_ft             a recipe of the paper as it would run on 8 GPUs
  README.md                                 your own videos: "Fine-tune, evaluate, predict"
TEXT
