# What the launch scripts share; to be sourced.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$(command -v python3)
  [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # ranks share the cores
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Shows the script's own head where it is called with --help, or with too little.
usage() {
  if [[ ${1:-} == --help || ${1:-} == -h || ! ${1:-} =~ ^[0-9]+$ || $# -lt 2 ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "error: the first argument is the number of ranks, the second a script; got: $*" >&2
    exit 2
  fi
}
