#!/usr/bin/env bash
# The paper's comparisons in miniature, on demo data: which tokens, how many, by which distance, over three seeds.
# Writes a table and plots. Takes an hour on two CPU cores, minutes on a GPU or with --quick. The same command resumes.
#
# --world physics: ReRo, random, tube and no pre-training on simulated bodies instead, over six seeds.
#
#   [EVEREST_OUT=FOLDER] bash launch/study.sh [--quick] [--seeds 0 1 2] [--jobs N] [--only CONDITION...] [--world physics]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
extras=""
if [[ " $* " == *" physics "* || " $* " == *"=physics "* ]]; then extras="[physics]"; fi
ensure_environment "$extras"

everest study "${EVEREST_OUT:-study}" "$@"
