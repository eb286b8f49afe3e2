#!/usr/bin/env bash
# Runs a script on this machine's ranks with the deepspeed launcher:
#
#   launch/deepspeed.sh 2 examples/deepspeed_generate.py --config launch/ds_inference.json --verify
#   HOSTFILE=launch/hostfile.example launch/deepspeed.sh 8 examples/deepspeed_generate.py    # on several, over ssh
#
# The first argument is the number of ranks per machine. PYTHON names the interpreter (default: .venv's, else python3);
# MASTER_PORT another port than 29500, where two jobs share a machine; MASTER_ADDR the first machine's address, where its
# name is not the one by which the others reach it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage "$@"
ranks=$1
shift
more=()
[[ -z ${HOSTFILE:-} ]] || more+=(--hostfile "$HOSTFILE")
[[ -z ${MASTER_ADDR:-} ]] || more+=(--master_addr "$MASTER_ADDR")
[[ -z ${MASTER_PORT:-} ]] || more+=(--master_port "$MASTER_PORT")
exec "$(dirname "$PYTHON")/deepspeed" --num_accelerators "$ranks" "${more[@]}" "$@"
