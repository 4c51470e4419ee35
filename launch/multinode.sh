#!/usr/bin/env bash
# Train on several nodes of a hostfile; start it once, on the first node.
#
#   bash launch/multinode.sh HOSTFILE k400_vit_l k400/train.csv /shared/runs/k400_l [FLAGS OF everest pretrain]
#   (a recipe of fine-tuning, k400_vit_l_ft, takes the flags of everest finetune: --data.val-list, --init-from)
#
# HOSTFILE has a line for each node:        node1 slots=8
# What all nodes need:
#   * ssh without a password from the first to the others, and pdsh on the first
#   * the project, its environment and the videos under the same paths; RUN on a file system that all share
#   * the same PATH: the launcher passes on variables that begin with NCCL, PYTHON, UCX or MV2, and the lines
#     NAME=VALUE of .deepspeed_env in this folder or in the home folder. Often needed there:
#       PATH=/shared/env/bin:/usr/bin:/bin
#       NCCL_SOCKET_IFNAME=eth0        the interface between the nodes, if NCCL chooses another
#       NCCL_IB_DISABLE=1              only if InfiniBand is present and does not work
# Without ssh, start it by hand on every node, with the same HOSTFILE (the first is number 0):
#   NODE_RANK=0 MASTER_ADDR=node1 bash launch/multinode.sh HOSTFILE ...
#   NODE_RANK=1 MASTER_ADDR=node1 bash launch/multinode.sh HOSTFILE ...
set -euo pipefail
hostfile=$1 recipe=$2 list=$3 out=$4
shift 4
[[ $recipe == *_ft ]] && task=finetune || task=pretrain
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
alone=()
if [ -n "${NODE_RANK:-}" ]; then
  alone=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
exec deepspeed --hostfile "$hostfile" ${alone[@]+"${alone[@]}"} --no_local_rank --module everest_ds "$task" \
  "$recipe" --data.train-list "$list" --ds-config "$here/ds_configs/zero2.json" --out "$out" "$@"
