#!/usr/bin/env bash
# Tests everest_ds with the Pythons of this machine. For each interpreter among 3.11, 3.12 and 3.13 it makes an
# environment with the newest and one with the oldest versions that pyproject.toml allows, runs every command on a
# small scale, and prints a table. The exit code is 1 if a cell failed. An environment takes 6 GB and about 6 minutes
# on two cores, and is removed afterwards.
#
#   bash launch/compat.sh [--python "3.11 3.12 3.13"] [--versions "newest lowest"] [--except 3.11] [--first] [--keep]
#
#     --except X    leave out this Python version
#     --first       stop after the first interpreter that is found
#     --keep        do not remove the environments
#   EVEREST_COMPAT  where environments, logs and results go (default: build/compat)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

pythons="3.11 3.12 3.13" versions="newest lowest" left_out="" first="" keep=""
while [ $# -gt 0 ]; do
  case $1 in
    --python) pythons=$2; shift 2 ;;
    --versions) versions=$2; shift 2 ;;
    --except) left_out=$2; shift 2 ;;
    --first) first=1; shift ;;
    --keep) keep=1; shift ;;
    *) echo "unknown option $1; see the top of launch/compat.sh" >&2; exit 2 ;;
  esac
done
unset VIRTUAL_ENV PYTHONPATH PYTHON
folder=$(mkdir -p "${EVEREST_COMPAT:-build/compat}" && cd "${EVEREST_COMPAT:-build/compat}" && pwd)
results=$folder/results.tsv
: >"$results"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# step NAME COMMAND...: run it and record the result; if it failed, show the end of its log.
step() {
  local name=$1 log=$work/$1.log began=$SECONDS verdict=ok
  shift
  "$@" >"$log" 2>&1 </dev/null || verdict=FAILED
  record "$name" "$verdict" $((SECONDS - began))
  if [ "$verdict" = FAILED ]; then
    sed 's/^/    /' "$log" | tail -n 25
    return 1
  fi
}

record() {
  printf '%s\t%s\t%s\t%s\n' "$cell" "$1" "$2" "$3" >>"$results"
  printf '%-14s %-22s %-7s %4d s\n' "$cell" "$1" "$2" "$3"
}

install() {
  local resolution=highest
  if [ "$version" = lowest ]; then resolution=lowest-direct; fi
  "$uv" venv --quiet --clear --python "$python" "$environment" || return 1
  "$uv" pip install --quiet --python "$environment/bin/python" --resolution "$resolution" --editable ".[hf,torchcodec]" ||
    return 1
  "$uv" pip list --quiet --python "$environment/bin/python" --format freeze >"$work/versions.txt"
}

# train TASK RECIPE OUT STEPS FLAGS...: train with two processes under DeepSpeed's launcher, and check the step count.
train() {
  local task=$1 recipe=$2 out=$3 steps=$4
  shift 4
  deepspeed --no_local_rank --num_gpus 2 --master_port $((20000 + RANDOM % 10000)) --module everest_ds "$task" "$recipe" \
    --data.train-list data/train.csv --ds-config "$project/ds_configs/zero2.json" --precision fp32 \
    --batch.global-size 4 --batch.micro-size 2 --data.num-workers 1 --run.log-every-steps 1 --run.max-steps "$steps" \
    --out "$out" "$@" || return 1
  grep -c '"kind": "train"' "$out/metrics.jsonl" | grep -qx "$steps"
}

check_reader() {
  everest check-data data/val.csv --reader "$1" --out "check-$1" --processes 2 --max-bad-share 0
}

same_weights() {
  python - "$@" <<'PYTHON'
import sys
from safetensors.torch import load_file
ours, back = (load_file(path) for path in sys.argv[1:])
assert ours.keys() == back.keys() and len(ours) > 50, ours.keys() ^ back.keys()
assert all((ours[name] == back[name]).all() for name in ours)
PYTHON
}

# Run every command on a small scale. The first failure ends the cell, because later commands need earlier output.
smoke() {
  cd "$work"
  step doctor everest doctor || return 1
  step demo-data everest demo-data data --train 8 --val 4 --test 4 || return 1
  local reader
  for reader in pyav decord torchcodec; do
    if grep -Eq "^ok +reader $reader " doctor.log; then
      step "check-data-$reader" check_reader "$reader" || return 1
    else
      record "check-data-$reader" absent 0
    fi
  done
  step pretrain train pretrain demo pretrained 3 || return 1
  step resume train pretrain demo pretrained 6 || return 1
  step finetune train finetune demo_ft finetuned 3 --data.val-list data/val.csv --init-from pretrained || return 1
  step evaluate everest evaluate finetuned --list data/test.csv --out scores || return 1
  step predict everest predict finetuned data/test --top 3 || return 1
  step report everest report pretrained finetuned --out report.html || return 1
  step to-hugging-face everest convert finetuned hf --to hf || return 1
  step from-hugging-face everest convert hf back.safetensors --to everest || return 1
  step weights-as-before everest convert finetuned ours.safetensors --to everest || return 1
  step round-trip same_weights ours.safetensors back.safetensors || return 1
  step tensorboard tensorboard --version
}

# Runs in a subshell, so that the environment of one cell is not on the PATH of the next.
run_cell() (
  mkdir -p "$work"
  step install install || exit 1
  sed -nE '/^(torch|torchvision|timm|deepspeed|av|numpy|transformers|torchcodec)==/p' "$work/versions.txt" | paste -sd ' '
  export PATH="$environment/bin:$PATH"
  smoke
)

project=$PWD
"$(find_python 3.11 3.12 3.13)" -m venv "$folder/tools"
"$folder/tools/bin/python" -m pip install --quiet uv
uv=$folder/tools/bin/uv
failed=0 found=0
for number in $pythons; do
  if [ "$number" = "$left_out" ] || ! python=$(find_python "$number" 2>/dev/null); then continue; fi
  found=$((found + 1))
  for version in $versions; do
    cell="$number $version" environment=$folder/$number-$version work=$folder/$number-$version-smoke
    rm -rf "$work"
    run_cell || failed=$((failed + 1))
    if [ -z "$keep" ]; then rm -rf "$environment"; fi
  done
  if [ -n "$first" ]; then break; fi
done

if [ "$found" -eq 0 ]; then
  echo "no other Python of $pythons is on this machine; nothing to compare"
  exit 0
fi
echo
awk -F '\t' '
  !($1 in seen) { seen[$1] = ++cells; cell[cells] = $1 }
  !($2 in row) { row[$2] = ++rows; name[rows] = $2 }
  { said[$1, $2] = $3 }
  END {
    printf "%-23s", ""
    for (c = 1; c <= cells; c++) printf "%-14s", cell[c]
    print ""
    for (r = 1; r <= rows; r++) {
      printf "%-23s", name[r]
      for (c = 1; c <= cells; c++) printf "%-14s", ((cell[c], name[r]) in said) ? said[cell[c], name[r]] : "-"
      print ""
    }
  }' "$results"
exit $((failed > 0))
