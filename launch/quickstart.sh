#!/usr/bin/env bash
# From a clone to a trained model: environment, demo videos, pre-training through DeepSpeed (ZeRO-2, activation
# checkpointing) on all GPUs, or on two CPU processes where there is none. Run it again to go on or to look again.
#
#   [EVEREST_OUT=RUN] bash launch/quickstart.sh [FLAGS OF everest pretrain]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

out=${EVEREST_OUT:-quickstart/run}
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
deepspeed --no_local_rank --num_gpus "$processes" --module everest_ds pretrain demo \
  --data.train-list quickstart/data/train.csv --ds-config ds_configs/zero2.json --precision "$precision" \
  --batch.global-size $((share * processes)) --batch.micro-size "$share" --out "$out" "$@"

python - "$out/metrics.jsonl" <<'PYTHON'
import json, sys
losses = [row["loss"] for row in map(json.loads, open(sys.argv[1])) if row["kind"] == "train"]
tenth = max(len(losses) // 10, 1)
first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
print(f"\nmean loss of the first tenth {first:.3f}, of the last tenth {last:.3f}: {last / first:.2f} of it")
PYTHON
cat <<TEXT
the run is in $out; where to look next:
  tensorboard --logdir $out        curves
  less $out/metrics.jsonl          the same as JSON lines
  everest recipes k400_vit_l       a recipe of the paper as it would run on 8 GPUs
  README.md                        your own videos: "Pre-train on your videos"
TEXT
