#!/usr/bin/env bash
# Does pre-training help where labels are few? Fine-tunes the demo from pre-trained and from random weights, on the same
# few videos of each class, for the same number of steps, over several seeds; a table of top-1 on the test videos.
# It takes the data and the pre-trained run of launch/quickstart.sh --full, and continues when it is started again. With
# UNLABELLED, it pre-trains another run on so many videos of its own, for PRETRAIN_STEPS.
#
#   [EVEREST_OUT=FOLDER] [SHOTS="5 20"] [SEEDS="0 1 2"] [STEPS=400] [UNLABELLED=4000] [PRETRAIN_STEPS=3000] \
#     bash launch/few_labels.sh
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

out=${EVEREST_OUT:-quickstart}/full
data=quickstart/full-data
shots=${SHOTS:-5 20} seeds=${SEEDS:-0 1 2} steps=${STEPS:-400}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then precision=bf16; else
  export DS_ACCELERATOR=cpu
  precision=fp32
fi
everest demo-data "$data"
pretrained=$out/pretrained results=$out/few_labels
if [ -n "${UNLABELLED:-}" ]; then
  pretrained=$out/pretrained-$UNLABELLED results=$out/few_labels-$UNLABELLED
  everest demo-data "quickstart/full-data-$UNLABELLED" --train "$UNLABELLED" --val 0 --test 0 --seed 1
  deepspeed --no_local_rank --num_gpus $((gpus > 0 ? gpus : 2)) --module everest_ds pretrain demo \
    --data.train-list "quickstart/full-data-$UNLABELLED/train.csv" --ds-config ds_configs/zero2.json \
    --precision "$precision" --batch.micro-size $((32 / (gpus > 0 ? gpus : 2))) \
    --optim.epochs $((${PRETRAIN_STEPS:-3000} / (UNLABELLED / 32))) --optim.warmup-epochs 1 --out "$pretrained"
elif [ ! -f "$pretrained/checkpoints/latest" ]; then
  echo "no pre-trained run in $pretrained; first run: bash $(from_caller launch/quickstart.sh --full)" >&2
  exit 2
fi
last=$(printf 'checkpoints/step-%08d' "$steps")

# draw SHOTS SEED LIST: so many random training videos of each class
draw() {
  python - "$data/train.csv" "$@" <<'PYTHON'
import pathlib, random, sys
source, shots, seed, target = sys.argv[1:]
rows = [line.rsplit(" ", 1) for line in pathlib.Path(source).read_text().splitlines()]
random.Random(int(seed)).shuffle(rows)
classes = sorted({label for _, label in rows})
chosen = [row for label in classes for row in [row for row in rows if row[1] == label][: int(shots)]]
folder = pathlib.Path(source).parent.resolve()
pathlib.Path(target).write_text("".join(f"{folder / name} {label}\n" for name, label in chosen))
PYTHON
}

for count in $shots; do
  for seed in $seeds; do
    mkdir -p "$results"
    list=$results/train-$count-$seed.csv
    draw "$count" "$seed" "$list"
    per_epoch=$(($(wc -l < "$list") / 32))
    epochs=$((steps / per_epoch))
    for start in pretrained random; do
      run=$results/$start-$count-$seed
      if [ "$start" = pretrained ]; then weights=(--init-from "$pretrained"); else weights=(); fi
      everest finetune demo_ft --data.train-list "$list" --data.class-names "$data/classes.txt" \
        --data.val-list "$data/val.csv" --run.validate-every-epochs $((epochs / 4)) --run.seed "$seed" \
        --optim.epochs "$epochs" --run.save-every-epochs "$epochs" --precision "$precision" \
        --batch.micro-size 32 --out "$run" ${weights[@]+"${weights[@]}"}
      everest evaluate "$run/$last" --list "$data/test.csv" --out "$run/test"
    done
  done
done

python - "$results" "$shots" "$seeds" <<'PYTHON'
import json, pathlib, statistics, sys
folder, shots, seeds = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
print(f"\n{'labels a class':<15}{'start':<12}{'top-1, mean':>12}{'deviation':>11}   each seed; on the way (validation)")
for count in shots:
    for start in ("pretrained", "random"):
        runs = [folder / f"{start}-{count}-{seed}" for seed in seeds]
        top1 = [json.loads((run / "test/summary.json").read_text())["top1"] for run in runs]
        lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        scored = [[row["top1"] for row in rows if row["kind"] == "val"] for rows in lines]
        curve = " ".join(f"{statistics.mean(column):.0%}" for column in zip(*scored))
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        each = " ".join(f"{value:.1%}" for value in top1)
        print(f"{count:<15}{start:<12}{statistics.mean(top1):>12.1%}{spread:>11.1%}   {each}; {curve}")
PYTHON
