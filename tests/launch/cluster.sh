#!/usr/bin/env bash
# A SLURM cluster of virtual nodes on this machine, without systemd and cgroups, for root: cluster.sh up FOLDER NODES,
# cluster.sh down FOLDER. Munge and the daemons keep everything in FOLDER; SLURM_CONF=FOLDER/slurm.conf reaches it.
set -euo pipefail
base=$2
munge=$base/munge
if [[ $1 == down ]]; then
  for pid in "$base"/slurmd.*.pid "$base"/slurmctld.pid "$munge"/munged.pid; do
    [[ ! -f $pid ]] || kill "$(cat "$pid")" 2>/dev/null || true
  done
  exit 0
fi
nodes=$3 host=$(hostname -s) port=$((15000 + RANDOM % 1000))
mkdir -p "$base"/{state,spool,log} "$munge"
chmod 755 "$base" "$munge"
[[ -f $munge/key ]] || /usr/sbin/mungekey --create --keyfile="$munge/key"
chown -R munge:munge "$munge"
chmod 400 "$munge/key"
runuser -u munge -- /usr/sbin/munged --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/munged.pid" \
  --log-file="$munge/munged.log" --seed-file="$munge/seed"
cat >"$base/cgroup.conf" <<C
CgroupPlugin=cgroup/v1
C
cat >"$base/slurm.conf" <<C
ClusterName=ci
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CryptoType=crypto/munge
SlurmctldPort=$port
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SwitchType=switch/none
KillWait=2
InactiveLimit=0
SlurmdTimeout=60
C
for i in $(seq "$nodes"); do
  echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 RealMemory=4000 State=UNKNOWN"
done >>"$base/slurm.conf"
echo "PartitionName=ci Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >>"$base/slurm.conf"
export SLURM_CONF=$base/slurm.conf
slurmctld -c
for i in $(seq "$nodes"); do
  mkdir -p "$base/spool/n$i"
  slurmd -c -N "n$i"
done
for _ in $(seq 100); do
  [[ $(sinfo -h -o %t -N | sort -u | tr '\n' ' ') == "idle " ]] && exit 0
  sleep 0.2
done
sinfo -N -l >&2
echo "the cluster did not come up; see $base/log" >&2
exit 1
