#!/usr/bin/env bash
# Start a training run with torchrun: one process per GPU, or PROCESSES of them.
#
#   launch/torchrun.sh configs/dit_xl.yaml train.steps=1000
#
# On several nodes run the same command on each of them, with these variables set:
#   NODES (their number), NODE_RANK (0 on the first), MASTER_ADDR (address of the first), MASTER_PORT (a free port there).
set -euo pipefail
PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH # the environment that `make` created, if any

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [[ -z ${PROCESSES:-} ]]; then
    PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    [[ $PROCESSES -gt 0 ]] || PROCESSES=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${NODES:-1} -gt 1 ]]; then
    : "${NODE_RANK:?set NODE_RANK to this node\'s number, 0 to NODES - 1}" "${MASTER_ADDR:?set MASTER_ADDR to the first node}"
    exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$PROCESSES" \
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m rdm_scale.train "$@"
fi
exec torchrun --standalone --nproc_per_node "$PROCESSES" -m rdm_scale.train "$@"
