# What the batch scripts share; to be sourced. Sets PYTHON, LOGS, MASTER_ADDR and MASTER_PORT.
cd "$SLURM_SUBMIT_DIR"
source launch/common.sh
LOGS=${LOGS:-$PWD/logs/$SLURM_JOB_ID}/run${SLURM_RESTART_COUNT:-0} # a requeued job runs again
mkdir -p "$LOGS"
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that share a node do not meet
export MASTER_ADDR MASTER_PORT
# The interface that carries the ranks' traffic, where the machine's first one is the wrong one:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# A rank that waits for another one says so after pikv.timeout_s; NCCL is not to give up before:
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# Runs a step. SLURM sends USR1 to its ranks before the time limit: they finish the token under way, save what
# they have and exit 0; then the job goes back into the queue, and its next run goes on from there (--state).
finish() {
  stopped=0
  trap 'stopped=1' USR1 TERM
  "$@" &
  pid=$!
  while true; do # a signal to this shell interrupts the wait, not the step
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  if grep -qs "stopped by SIGUSR1" "$LOGS"/*.out; then
    echo "the ranks stopped before the time limit; the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
