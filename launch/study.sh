#!/usr/bin/env bash
# The paper's comparisons in miniature, on demo data: which tokens, how many, by which distance, over three seeds; a
# table and plots. Within an hour on two CPU cores, minutes on a GPU or with --quick; goes on where it was.
#
#   [EVEREST_OUT=FOLDER] bash launch/study.sh [--quick] [--seeds 0 1 2] [--jobs N] [--only CONDITION...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment ""

everest study "${EVEREST_OUT:-study}" "$@"
