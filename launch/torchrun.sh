#!/usr/bin/env bash
# Start a training run with torchrun: one process per GPU, or PROCESSES of them.
#
#   launch/torchrun.sh configs/dit_xl.yaml train.steps=1000
#
# On several nodes run the same command on each of them, with these variables set:
#   NODES        their number, or 2:4 for any number from 2 to 4 (nodes may leave and return)
#   MASTER_ADDR  the node where they meet, by a name or address that all reach; MASTER_PORT: a free port there
#   NODE_RANK    0 on that node, another number elsewhere
#   START_TIMEOUT  how long they wait for the name MASTER_ADDR to be known (default 600 s)
# RESTARTS (default 3): how often failed ranks are started again. LOGS: a folder for the output of every rank.
# GRACE (default 280 s): how long ranks that are to stop may take for their step and the save, before they are killed.
# Exit codes: 0 finished, 75 stopped and saved, 2 to be fixed by you, else 1.
set -euo pipefail
PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH # the environment that `make` created, if any

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [[ -z ${PROCESSES:-} ]]; then
    PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    [[ $PROCESSES -gt 0 ]] || PROCESSES=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

OPTIONS=(--nproc_per_node "$PROCESSES" --max-restarts "${RESTARTS:-3}" --shutdown-timeout "${GRACE:-280}")
if [[ -n ${LOGS:-} ]]; then
    OPTIONS+=(--log-dir "$LOGS" --tee 3)
fi
if [[ ${NODES:-1} == 1 ]]; then
    OPTIONS+=(--standalone)
else
    : "${NODE_RANK:?set NODE_RANK to 0 on the node MASTER_ADDR, and to another number elsewhere}"
    : "${MASTER_ADDR:?set MASTER_ADDR to the node where all meet}"
    IS_HOST=$([[ $NODE_RANK == 0 ]] && echo true || echo false)
    # The address by which others reach this node. torchrun would announce the host name, which they may not know.
    LOCAL_ADDR=$MASTER_ADDR
    if [[ $IS_HOST == false ]]; then
        trap 'exit 75' TERM INT # a request to stop meanwhile
        DEADLINE=$((SECONDS + ${START_TIMEOUT:-600})) # the name may be new: the pod of a Service, say
        until LOCAL_ADDR=$(python -c 'import socket, sys
found = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
probe = socket.socket(found[0], socket.SOCK_DGRAM)
probe.connect(found[4])
print(probe.getsockname()[0])' "$MASTER_ADDR" 2>/dev/null); do
            if [[ $SECONDS -ge $DEADLINE ]]; then
                echo "error: the host $MASTER_ADDR is unknown or cannot be reached from $(hostname): check MASTER_ADDR" >&2
                exit 1
            fi
            sleep 2
        done
    fi
    OPTIONS+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-id "${JOB:-rdm_scale}" --rdzv-conf "is_host=$IS_HOST" --local-addr "$LOCAL_ADDR")
    if [[ $NODES == *:* ]]; then
        # When nodes come and go, rank 0 may move; the agents' common store would stay behind.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    fi
fi

# torchrun turns every exit code of a rank into 1. The ranks write theirs into a file.
RDM_SCALE_EXIT_CODE_FILE=$(mktemp)
export RDM_SCALE_EXIT_CODE_FILE
trap 'rm -f "$RDM_SCALE_EXIT_CODE_FILE"' EXIT
torchrun "${OPTIONS[@]}" -m rdm_scale.train "$@" &
TORCHRUN=$!
trap 'kill -TERM $TORCHRUN 2>/dev/null' TERM INT
trap 'kill -USR1 $(pgrep -P $TORCHRUN) 2>/dev/null' USR1 # torchrun does not pass it on
CODE=0
while true; do
    wait "$TORCHRUN" && CODE=0 || CODE=$?
    kill -0 "$TORCHRUN" 2>/dev/null || break # else a signal ended the wait
done
if [[ $CODE -ne 0 ]]; then
    CODE=1
    for code in 75 1 2; do # the last one found counts
        ! grep -qx "$code" "$RDM_SCALE_EXIT_CODE_FILE" || CODE=$code
    done
fi
exit "$CODE"
