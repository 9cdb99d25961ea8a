#!/usr/bin/env bash
# Start a training run with DeepSpeed's launcher, on this machine or on the nodes of a hostfile.
#
#   launch/deepspeed.sh configs/dit_xl.yaml train.steps=1000
#   HOSTFILE=launch/hostfile.example launch/deepspeed.sh configs/dit_xl.yaml
#
# PROCESSES: ranks on this machine (default: one per GPU, or 1). With HOSTFILE the launcher reaches the nodes by ssh.
# Variables that start with AWS_, NCCL_, GLOO_, HF_ or RDM_, and those named in EXPORT, reach all nodes.
set -euo pipefail
PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH # the environment that `make` created, if any

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${HOSTFILE:-} ]]; then
    # DeepSpeed exports NCCL and Python variables only; the others it reads from a file, which holds secrets.
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    for name in $(compgen -e | grep -E '^(AWS|NCCL|GLOO|HF|RDM)_|^(DS_ACCELERATOR|OMP_NUM_THREADS|PYTHONPATH)$') ${EXPORT:-}; do
        printf '%s=%s\n' "$name" "${!name}" >>"$DS_ENV_FILE"
    done
    deepspeed --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
        --master_port "${MASTER_PORT:-29500}" --module rdm_scale.train "$@"
    exit
fi
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if [[ $GPUS -eq 0 ]]; then
    export DS_ACCELERATOR=cpu
fi
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
exec deepspeed --hostfile /dev/null --num_nodes 1 --num_gpus "$PROCESSES" --master_port "${MASTER_PORT:-29500}" \
    --module rdm_scale.train "$@"
