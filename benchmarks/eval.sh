#!/usr/bin/env bash
# Makes the results of docs/policies.md#measured anew: some four hours on two cores. What is there already is not run again
# (--resume), so an interruption costs a case; remove a file under benchmarks/results to begin it anew.
#
#   benchmarks/eval.sh             everything
#   benchmarks/eval.sh needles     or: float32, text, tasks, heads, tune, placements
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=benchmarks/results
run=(pikv eval --model reference-dense --threads "${THREADS:-1}" --resume)
r8='"rotate": true, "clip": true, "scales": 8'
duo() { echo "\"retention\": \"streaming\", \"budget\": {\"name\": \"duo\", \"heads\": \"$out/$1\", \"recent\": 128}"; }
sparse() { echo "{\"lookup\": {\"name\": \"$1\", \"budget\": 0.125, $2 \"audit_every\": 0}"; }
few=(
  --pikv 'exact, none={}' --pikv 'int8={"codec": "int8"}' --pikv 'fp8={"codec": "fp8"}' --pikv 'int4={"codec": "int4"}'
  --pikv "int3/int3 r8={\"codec\": {\"name\": \"int3\", $r8}}"
  --pikv "int4/int2 r8={\"codec\": {\"name\": \"int4\", \"values\": \"int2\", $r8}}"
  --pikv 'int2 rotated={"codec": {"name": "int2", "rotate": true, "clip": true}}'
  --pikv "int3/int2 r8, duo half={\"codec\": {\"name\": \"int3\", \"values\": \"int2\", $r8}, $(duo reference-heads.json)}"
  --pikv "two_stage 12.5 %, 4-bit summaries=$(sparse two_stage '"summary_bits": 4,')}"
  --pikv "quest 12.5 %=$(sparse quest '')}"
)

heads() { # other needles than those of the cases below
  for file in reference-heads:0.5 reference-heads-40:0.4; do
    [[ -f $out/${file%:*}.json ]] || pikv heads --share "${file#*:}" --seed 101 --threads 1 --out "$out/${file%:*}.json"
  done
}
needles() {
  "${run[@]}" --suite standard --json $out/cpu-eval.json --plot $out/cpu-eval.png \
    --pikv "two_stage 12.5 %, 4-bit summaries=$(sparse two_stage '"summary_bits": 4,')}" \
    --pikv "two_stage 12.5 %, all pages ranked exactly=$(sparse two_stage '"shortlist": 8, "summary_bits": 4,')}" \
    --pikv "cache_aware 12.5 %, 4-bit summaries=$(sparse cache_aware '"summary_bits": 4,')}" \
    --pikv "two_stage 12.5 %, int4, 4-bit summaries=$(sparse two_stage '"summary_bits": 4,'), \"codec\": \"int4\"}" \
    --pikv "duo half={$(duo reference-heads.json)}" \
    --pikv "int3/int2 r8, duo half={\"codec\": {\"name\": \"int3\", \"values\": \"int2\", $r8}, $(duo reference-heads.json)}" \
    --pikv "int3/int2 r8, duo 40 %={\"codec\": {\"name\": \"int3\", \"values\": \"int2\", $r8}, $(duo reference-heads-40.json)}" \
    --pikv "int4/int2 r8, others int2/int1 r8={\"codec\": {\"name\": \"per_head\", \"heads\": \"$out/reference-heads.json\",
      \"retrieval\": {\"name\": \"int4\", \"values\": \"int2\", $r8}, \"default\": {\"name\": \"int2\", \"values\": \"int1\", $r8}}}" \
    --pikv "int4 r8, 75 % demoted to int2 r8={\"codec\": {\"name\": \"int4\", \"rotate\": true, \"scales\": 8},
      \"retention\": \"chunk\", \"budget\": {\"name\": \"uniform\", \"prompt\": 0.25}, \"demote\": {\"name\": \"int2\", $r8}}"
}
float32() { "${run[@]}" --dtype float32 --json $out/cpu-eval-fp32.json --pikv 'exact, none={}'; }
text() {
  "${run[@]}" --dtype float32 --tasks text --lengths 1000 2000 3500 --cases 24 --json $out/cpu-eval-text.json "${few[@]}" \
    --presses KeyDiff:0.5 StreamingLLM:0.5 SnapKV:0.5
}
tasks() {
  "${run[@]}" --tasks multikey tracking common --lengths 1000 2000 3500 --cases 12 --json $out/cpu-eval-tasks.json \
    "${few[@]}" --presses KeyDiff:0.5 KeyDiff:0.75 StreamingLLM:0.5 SnapKV:0.5
}
tune() {
  pikv tune --config launch/ds_inference.json --objective "latency + 0.2*memory - 5*fidelity" --threads 1 \
    --out $out/cpu-tuned.json --plot $out/cpu-tuned.png
}
placements() { python benchmarks/placement_locality.py --threads 1 --json $out/placement-locality.json; }

for part in "${@:-heads needles float32 text tasks tune placements}"; do
  for name in $part; do
    [[ $name =~ ^(heads|needles|float32|text|tasks|tune|placements)$ ]] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
    "$name"
  done
done
