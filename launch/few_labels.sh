#!/usr/bin/env bash
# Does pre-training help where labels are few? Fine-tunes the demo from pre-trained and from random weights, on the same
# few videos of each class, for the same number of steps, over several seeds; a table of top-1 on the test videos.
# It takes the data and the pre-trained run of launch/quickstart.sh, and goes on where it was when started again.
#
#   [EVEREST_OUT=FOLDER] [SHOTS="5 20"] [SEEDS="0 1 2"] [STEPS=400] bash launch/few_labels.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

out=${EVEREST_OUT:-quickstart}
data=quickstart/data
shots=${SHOTS:-5 20} seeds=${SEEDS:-0 1 2} steps=${STEPS:-400}
if [ ! -f "$out/pretrained/checkpoints/latest" ]; then
  echo "no pre-trained run in $out/pretrained; run launch/quickstart.sh first" >&2
  exit 2
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then precision=bf16; else
  export DS_ACCELERATOR=cpu
  precision=fp32
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
    mkdir -p "$out/few_labels"
    list=$out/few_labels/train-$count-$seed.csv
    draw "$count" "$seed" "$list"
    per_epoch=$(($(wc -l < "$list") / 32))
    epochs=$((steps / per_epoch))
    for start in pretrained random; do
      run=$out/few_labels/$start-$count-$seed
      if [ "$start" = pretrained ]; then weights=(--init-from "$out/pretrained"); else weights=(); fi
      everest finetune demo_ft --data.train-list "$list" --data.class-names "$data/classes.txt" \
        --data.val-list "$data/val.csv" --run.validate-every-epochs $((epochs / 4)) --run.seed "$seed" \
        --optim.epochs "$epochs" --run.save-every-epochs "$epochs" --precision "$precision" \
        --batch.micro-size 32 --out "$run" ${weights[@]+"${weights[@]}"}
      everest evaluate "$run/$last" --list "$data/test.csv" --out "$run/test"
    done
  done
done

python - "$out/few_labels" "$shots" "$seeds" <<'PYTHON'
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
