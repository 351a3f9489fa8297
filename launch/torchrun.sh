#!/usr/bin/env bash
# Start a program on all ranks of one node or of many, with torchrun.
#   launch/torchrun.sh examples/resnet/train.py norm=sync
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh PROGRAM [ARGUMENT...]   (on each node)
#
#   NPROC            ranks on this node: its GPUs, or 2 without any
#   NNODES           nodes (1); with more, NODE_RANK and MASTER_ADDR (the address of node 0) are needed
#   MASTER_PORT      free port on node 0, for several nodes (29500); one node picks its own
#   OMP_NUM_THREADS  threads a rank: this node's cores divided by NPROC
#   PYTHON           interpreter with syncbn installed (python3)
#   GRACE            seconds from SIGTERM, which the ranks receive, until they are killed (30)
# The exit code is that of the ranks: with examples/resnet, 0 after SIGTERM and 75 after SIGUSR1.
set -euo pipefail

PYTHON=${PYTHON:-python3}
fail() { echo "$0: $1" >&2 && exit 2; }
# Prints the address from which this host reaches another one; on that host itself, its address.
route='
import socket, sys
try:
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.connect((sys.argv[1], 9))
    source = probe.getsockname()[0]
    print(sys.argv[1] if source.startswith("127.") else source)
except OSError as error:
    print(error)
    sys.exit(1)'
gpus() { "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'; }
# nproc obeys OMP_NUM_THREADS, which would make a setting of the caller the number of cores.
cores() { env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

NPROC=${NPROC:-$(gpus)}
((NPROC > 0)) || NPROC=2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((NPROC < $(cores) ? $(cores) / NPROC : 1))}
# glibc caches freed memory (docs/performance.md).
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-100000000000}
# The agents' store keeps Gloo's addresses of the ranks before a restart: each attempt opens its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-1}
rendezvous=(--standalone)
if ((${NNODES:-1} > 1)); then
  : "${NODE_RANK:?NNODES=$NNODES needs the number of this node, from 0}"
  : "${MASTER_ADDR:?NNODES=$NNODES needs the address of node 0}"
  # c10d, since static rendezvous cannot restart. Without --local-addr, agents publish host names.
  own=$("$PYTHON" -c "$route" "$MASTER_ADDR") || fail "no route to MASTER_ADDR=$MASTER_ADDR: $own"
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-syncbn}"
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --local-addr "$own"
    --rdzv-conf "is_host=$((NODE_RANK == 0 ? 1 : 0))")
elif [[ -n ${PET_NNODES:-} ]]; then
  rendezvous=() # Kubeflow has set all options
fi
((${#rendezvous[@]})) && rendezvous+=(--nproc-per-node "$NPROC")
exec "$PYTHON" "${BASH_SOURCE[0]%/*}/agent.py" "${rendezvous[@]}" "$@"
