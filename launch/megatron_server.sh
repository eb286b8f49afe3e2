#!/usr/bin/env bash
# Serves a Hugging Face MoE checkpoint with Megatron-Core and an expert-sharded KV cache:
#
#   launch/megatron_server.sh --model /models/Mixtral-8x7B --ranks 8
#   launch/megatron_server.sh --model DIR --ranks 2 --port 8000 --pikv-config launch/ds_inference.json
#   launch/megatron_server.sh --help
#
# PYTHON names the interpreter (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # ranks share the cores
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m megatron_patch.server "$@"
