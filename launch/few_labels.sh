#!/usr/bin/env bash
# The effect of pre-training over several seeds: the quickstart's comparison for each seed (linear probes with all
# labels), then linear probes and fine-tuning with few labels, at several learning rates. Prints one table with every
# seed. Every start gets the same labelled videos, steps and rates. The same command resumes.
#
#   [EVEREST_OUT=FOLDER] [SEEDS="0 1 2 3 4"] [SHOTS=10] [RATES="3.2e-2 6.4e-2 1.28e-1"] [DATA_SEED=0] \
#     bash launch/few_labels.sh
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

data_seed=${DATA_SEED:-0} seeds=${SEEDS:-0 1 2 3 4} shots=${SHOTS:-10} rates=${RATES:-3.2e-2 6.4e-2 1.28e-1}
out=${EVEREST_OUT:-quickstart/few_labels}/data-$data_seed data=quickstart/data-$data_seed
precision=fp32
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ]; then precision=bf16; fi
if [ "$precision" = fp32 ]; then export DS_ACCELERATOR=cpu; fi

# choose SEED LIST: write a list of $shots random training videos of each class
choose() {
  python - "$data/train.csv" "$shots" "$@" <<'PYTHON'
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

for seed in $seeds; do
  runs=$out/seed-$seed
  if [ ! -f "$runs/result.png" ]; then
    EVEREST_OUT=$runs SEED=$seed DATA_SEED=$data_seed bash launch/quickstart.sh
  fi
  choose "$seed" "$runs/labelled-$shots.csv"
  for start in rero tube random; do
    if [ -f "$runs/probe-$shots-$start/summary.json" ]; then continue; fi
    everest evaluate "$runs/$start" --recipe study_ft --protocol linear --keep-ratio 0.15 --precision "$precision" \
      --train-list "$runs/labelled-$shots.csv" --list "$data/test.csv" --batch-rows 32 --out "$runs/probe-$shots-$start"
  done
  for rate in $rates; do
    for start in rero tube random; do
      run=$runs/finetuned-$shots-$rate-$start
      if [ -f "$run/test/summary.json" ]; then continue; fi
      everest finetune study_ft --init-from "$runs/$start" --selection.keep-ratio 0.15 --run.seed "$seed" \
        --data.train-list "$runs/labelled-$shots.csv" --data.class-names "$data/classes.txt" \
        --optim.epochs 60 --optim.base-lr "$rate" --run.save-every-epochs 60 --run.pictures-every-steps 0 \
        --batch.micro-size 16 --precision "$precision" --out "$run"
      everest evaluate "$run" --list "$data/test.csv" --out "$run/test"
    done
  done
done

python - "$out" "$seeds" "$shots" "$rates" <<'PYTHON'
import json, pathlib, statistics, sys
out, seeds, shots, rates = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3], sys.argv[4].split()
rows = [("linear probe, all labels", "probe-{start}"), (f"linear probe, {shots} labels a class", f"probe-{shots}-{{start}}")]
rows += [(f"fine-tuned, {shots} labels a class, lr {rate}", f"finetuned-{shots}-{rate}-{{start}}/test") for rate in rates]
print(f"\n{'top-1, %':<44}{'start':<8}{'mean':>6}{'spread':>8}   each seed ({' '.join(seeds)})")
for score, folder in rows:
    for start in ("rero", "tube", "random"):
        files = [out / f"seed-{seed}" / folder.format(start=start) / "summary.json" for seed in seeds]
        top1 = [100 * json.loads(file.read_text())["top1"] for file in files]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        each = " ".join(f"{value:.1f}" for value in top1)
        print(f"{score:<44}{start:<8}{statistics.mean(top1):>6.1f}{spread:>8.1f}   {each}")
PYTHON
