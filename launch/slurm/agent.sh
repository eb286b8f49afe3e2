#!/usr/bin/env bash
# Runs a node's agent (torchrun, deepspeed), and hands USR1 on to the ranks under it: the agent itself would die of it.
set -uo pipefail

descendants() {
  local child
  for child in $(pgrep -P "$1"); do
    echo "$child"
    descendants "$child"
  done
}

(
  trap '' USR1 # ignored in all that comes of it, but for ranks, which have a handler of their own
  exec "$@"
) &
agent=$!
trap 'kill -USR1 $(descendants "$agent") 2>/dev/null' USR1
trap 'kill -TERM "$agent" 2>/dev/null' TERM
while true; do # a signal to this shell interrupts the wait, not the agent
  wait "$agent"
  status=$?
  kill -0 "$agent" 2>/dev/null || exit "$status"
done
