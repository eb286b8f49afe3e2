#!/usr/bin/env bash
# Serves a Hugging Face MoE checkpoint with Megatron-Core and PiKV:
#
#   launch/megatron_server.sh --model DIR --ranks 2 [--port 8000] ...
#
# All options: launch/megatron_server.sh --help. PYTHON chooses the interpreter; by default the
# repository's .venv, else python3. Under SLURM or mpirun start the module itself:
#   torchrun --nnodes 2 --nproc-per-node 8 ... -m megatron_patch.server --model DIR
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m megatron_patch.server "$@"
