#!/usr/bin/env bash
# Builds, tests and measures the ops on the GPU of this machine in one call (under ten minutes, no
# network), and writes benchmarks/results/GPU-DATE.{txt,json...}. Needs torch with CUDA, nvcc and
# pytest with hypothesis; uses Triton and FlashInfer where they are installed.
#
#   benchmarks/gpu.sh                    everything
#   RESULTS=/tmp/r benchmarks/gpu.sh     writes elsewhere
#   ROUNDS=10 CONTEXTS="32k" benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || {
  echo "error: torch sees no GPU here" >&2
  exit 1
}
results=${RESULTS:-benchmarks/results}
contexts=${CONTEXTS:-4k 32k 64k 128k}
rounds=${ROUNDS:-30}
mkdir -p "$results"
out="$results/$name-$(date +%F)"

capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
# The suffix a allows the instructions of just this generation (wgmma), which sm_90 alone does not.
[[ $capability == 9.0 ]] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} PIKV_BUILD_CPP=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

{
  echo "== build for $TORCH_CUDA_ARCH_LIST"
  SECONDS=0
  "$python" setup.py -q build_ext --inplace
  echo "built in $SECONDS s"
  "$python" -m pikv_ds.cli report

  echo "== tests"
  failed=0
  "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_seal.py tests/test_scheduling.py \
    tests/test_packed_pages.py -k cuda || failed=$?

  bench=("$python" -m pikv_ds.cli bench --device cuda --gib 4 --rounds "$rounds")
  echo "== decode"
  "${bench[@]}" --op decode --context $contexts --codecs none fp8 int8 int4 int2 --backends cpp triton \
    --json "$out-decode.json" --plot "$out-decode.png" || failed=$?
  echo "== lookup"
  "${bench[@]}" --op lookup --context 128k --codecs int4 none --backends cpp --json "$out-lookup.json" || failed=$?
  echo "== seal"
  "${bench[@]}" --op seal --codecs none fp8 int8 int4 int2 --backends cpp triton --json "$out-seal.json" || failed=$?
  echo "== done in $SECONDS s, status $failed"
  exit "$failed"
} 2>&1 | tee "$out.txt"
