#!/usr/bin/env bash
# Builds, checks and times the ops on the GPU of this machine, within a given time: benchmarks/gpu.sh --help.
# Needs torch; for a GPU an extension that was built before (make gpu-extension) or nvcc. PYTHON names the Python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
