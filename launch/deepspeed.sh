#!/usr/bin/env bash
# Start a training run with DeepSpeed's launcher, on this machine or on the nodes of a hostfile.
#
#   launch/deepspeed.sh configs/dit_xl.yaml train.steps=1000
#   HOSTFILE=launch/hostfile.example launch/deepspeed.sh configs/dit_xl.yaml
#
# PROCESSES: ranks on this machine (default: one per GPU, or 1). With HOSTFILE the launcher reaches the nodes by ssh.
set -euo pipefail
PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH # the environment that `make` created, if any

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${HOSTFILE:-} ]]; then
    exec deepspeed --hostfile "$HOSTFILE" --module rdm_scale.train "$@"
fi
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if [[ $GPUS -eq 0 ]]; then
    export DS_ACCELERATOR=cpu
fi
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
exec deepspeed --hostfile /dev/null --num_nodes 1 --num_gpus "$PROCESSES" --master_port "${MASTER_PORT:-29500}" \
    --module rdm_scale.train "$@"
