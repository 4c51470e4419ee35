#!/usr/bin/env bash
# From a clone to a first result in about five minutes on two CPU cores, two of them for the installation: demo videos,
# a picture of the kept tokens, two pre-trainings with DeepSpeed (ZeRO-2), and linear probes of them and of random
# weights. Runs on all GPUs, or on two CPU processes if there are none. The same command resumes.
#
#   [EVEREST_OUT=FOLDER] [SEED=0] [DATA_SEED=0] bash launch/quickstart.sh
#   bash launch/quickstart.sh --full           # longer pre-training and fine-tuning, 15 minutes: 8 classes of the demo
#   EVEREST_TINY=1 bash launch/quickstart.sh   # a few videos and steps, to test that everything works here
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/run_deepspeed.sh
case "$*" in
  "") full= ;;
  --full) full=yes ;;
  *) echo "usage: bash launch/quickstart.sh [--full]" >&2 && exit 2 ;;
esac
ensure_environment ""

out=${EVEREST_OUT:-quickstart}/${full:+full}
out=${out%/}${EVEREST_TINY:+/tiny} data=quickstart/${full:+full-}${EVEREST_TINY:+tiny-}data seed=${SEED:-0}
data_seed=${DATA_SEED:-0} data=$data-$data_seed
length=() tiny=${EVEREST_TINY:-}
if [ -n "$tiny" ]; then length=(--run.max-steps 3 --run.log-every-steps 1); fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  processes=$((gpus < 32 ? gpus : 32))
  precision=bf16
else
  export DS_ACCELERATOR=cpu
  processes=2
  precision=fp32
fi
share=$((32 / processes)) # a batch is 32 clips, or the next lower multiple of the number of processes
train() {
  run_deepspeed --no_local_rank --num_gpus "$processes" --module everest_ds "$@" \
    --data.train-list "$data/train.csv" --ds-config ds_configs/zero2.json --precision "$precision" --run.seed "$seed" \
    --batch.global-size $((share * processes)) --batch.micro-size "$share"
}
everest=$(program everest)

# The class is the moving texture, one of four. The rest of the frame is still clutter.
compare() {
  local start sizes=(--train 480 --val 0 --test 240)
  if [ -n "$tiny" ]; then sizes=(--train 32 --val 0 --test 32); fi
  everest demo-data "$data" --seed "$data_seed" "${sizes[@]}" --num-frames 16 --movers 1 --distractors 0 --radius 10 --classes mover --clutter 10
  everest show study "$data/test/00000.mp4" --out "$out/pictures"
  echo "a first picture: $(from_caller "$out/pictures/00000.png")"
  local pretrain=(pretrain study --optim.epochs 19 --optim.base-lr 3.2e-2 --selection.visible-ratio 0.1)
  train "${pretrain[@]}" --selection.selected-ratio 0.15 --out "$out/rero" ${length[@]+"${length[@]}"}
  train "${pretrain[@]}" --selection.strategy tube --selection.selected-ratio 1.0 --out "$out/tube" ${length[@]+"${length[@]}"}
  # The first warm-up step has learning rate 0, so these are the initial weights of both runs.
  train "${pretrain[@]}" --selection.selected-ratio 0.15 --out "$out/random" --run.max-steps 1
  for start in rero tube random; do
    everest evaluate "$out/$start" --recipe study_ft --protocol linear --keep-ratio 0.15 --precision "$precision" \
      --train-list "$data/train.csv" --list "$data/test.csv" --batch-rows 32 --out "$out/probe-$start"
  done
  python launch/first_result.py "$out"
  cat <<TEXT
all of it is in $(from_caller "$out"); where to look next:
  $(program tensorboard) --logdir $(from_caller "$out")
      the curves, in a browser
  $everest show $(from_caller "$out/rero") $(from_caller "$data/test/00001.mp4") --out $(from_caller "$out/pictures")
      the tokens that the pre-trained model keeps of a video, and their reconstruction
  cat $(from_caller "$out/probe-rero/summary.json")
      the scores by class, with their views and checkpoint
TEXT
}

# The class is the direction of a disc, one of eight. Trained until nearly every test video is right.
learn() {
  local sizes=()
  if [ -n "$tiny" ]; then sizes=(--train 32 --val 8 --test 8); fi
  everest demo-data "$data" --seed "$data_seed" ${sizes[@]+"${sizes[@]}"}
  train pretrain demo --out "$out/pretrained" ${length[@]+"${length[@]}"}
  train finetune demo_ft --data.val-list "$data/val.csv" --init-from "$out/pretrained" --out "$out/finetuned" \
    ${length[@]+"${length[@]}"}
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
print(f"fine-tuning: top-1 {top1:.1%} over 8 classes, on test videos that were not trained on")
PYTHON
  cat <<TEXT
all of it is in $(from_caller "$out"); where to look next:
  $(program tensorboard) --logdir $(from_caller "$out")
      the curves, in a browser
  $everest predict $(from_caller "$out/finetuned") $(from_caller "$data/test/00000.mp4")
      the class of a video
  cat $(from_caller "$out/evaluation/summary.json")
      the scores by class, with their views and checkpoint
TEXT
}

everest doctor
if [ -n "$full" ]; then learn; else compare; fi
cat <<TEXT
  $everest recipes k400_vit_l_ft
      a recipe of the paper, resolved for 8 GPUs
  source $(from_caller "$environment/bin/activate")
      adds everest, deepspeed and tensorboard to the PATH of this shell
For your own videos see $(from_caller docs/own_videos.md).
TEXT
