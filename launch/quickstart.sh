#!/usr/bin/env bash
# From a clone to a scored model: environment, demo videos, pre-training and fine-tuning through DeepSpeed (ZeRO-2), and
# the accuracy on videos that were never trained on; on all GPUs, or on two CPU processes where there is none. Run it
# again to continue or to look again. About 17 minutes on two CPU cores, 2 of them for the installation.
#
#   [EVEREST_OUT=FOLDER] bash launch/quickstart.sh
#   EVEREST_TINY=1 bash launch/quickstart.sh    # a few videos and steps: does everything work here?
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/run_deepspeed.sh
ensure_environment ""

if [ -n "${EVEREST_TINY:-}" ]; then
  out=${EVEREST_OUT:-quickstart/tiny} data=quickstart/tiny-data
  sizes=(--train 32 --val 8 --test 8) length=(--run.max-steps 3 --run.log-every-steps 1)
else
  out=${EVEREST_OUT:-quickstart} data=quickstart/data
  sizes=() length=()
fi
everest doctor
everest demo-data "$data" ${sizes[@]+"${sizes[@]}"}

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
  run_deepspeed --no_local_rank --num_gpus "$processes" --module everest_ds "$@" \
    --data.train-list "$data/train.csv" --ds-config ds_configs/zero2.json --precision "$precision" \
    --batch.global-size $((share * processes)) --batch.micro-size "$share" ${length[@]+"${length[@]}"}
}
train pretrain demo --out "$out/pretrained"
train finetune demo_ft --data.val-list "$data/val.csv" --init-from "$out/pretrained" --out "$out/finetuned"
everest evaluate "$out/finetuned" --list "$data/test.csv" --out "$out/evaluation"

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
everest=$(program everest)
cat <<TEXT
all of it is in $(from_caller "$out"); where to look next:
  $(program tensorboard) --logdir $(from_caller "$out")
      the curves, in a browser
  $everest predict $(from_caller "$out/finetuned") $(from_caller "$data/test/00000.mp4")
      the class of a video
  cat $(from_caller "$out/evaluation/summary.json")
      the scores, by class, and the views and the checkpoint that they belong to
  $everest recipes k400_vit_l_ft
      a recipe of the paper as it would run on 8 GPUs
  source $(from_caller "$environment/bin/activate")
      puts everest, deepspeed and tensorboard on the PATH of this shell
For your own videos see "Pre-train on your videos" in $(from_caller README.md).
TEXT
