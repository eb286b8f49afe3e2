#!/usr/bin/env bash
# Runs a script on this machine's ranks with torchrun:
#
#   launch/torchrun.sh 2 examples/deepspeed_generate.py --config launch/ds_inference.json --verify
#
# The first argument is the number of ranks. On several machines run it on each of them, with NNODES, NODE_RANK and
# MASTER_ADDR set. PYTHON names the interpreter (default: .venv's, else python3); MASTER_PORT another port than 29500.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage "$@"
ranks=$1
shift
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$ranks" --nnodes "${NNODES:-1}" \
  --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
