#!/usr/bin/env bash
# Runs a script on ranks that mpirun starts (Open MPI):
#
#   launch/mpirun.sh 2 examples/deepspeed_generate.py --config launch/ds_inference.json --verify
#   launch/mpirun.sh 16 --hostfile hosts examples/deepspeed_generate.py       # options of mpirun before the script
#
# The first argument is the number of ranks. On several machines they find each other through mpi4py (pip install
# mpi4py), or by MASTER_ADDR and MASTER_PORT. PYTHON names the interpreter (default: .venv's, else python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage "$@"
ranks=$1
shift
options=(-x PYTHONPATH)
while [[ ${1:-} == -* ]]; do # each with one value, as --hostfile and --map-by have
  options+=("$1" "${2:?$1 needs a value}")
  shift 2
done
for name in MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PIKV_BACKEND NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
  [[ -z ${!name:-} ]] || options+=(-x "$name")
done
[[ $(id -u) != 0 ]] || options+=(--allow-run-as-root)
# Ranks bind to no core: each has threads of its own, and Open MPI would give it a single core.
exec mpirun -np "$ranks" --bind-to none "${options[@]}" "$PYTHON" "$@"
