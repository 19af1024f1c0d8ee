#!/usr/bin/env bash
# Runs a command beside a real Slurm of two nodes on this machine, and ends what it started:
#
#   sudo tests/cluster/two_nodes.sh FOLDER COMMAND...
#
# The nodes are node1 and node2: network namespaces with a host name and an address each, joined by a bridge; the disk is
# shared. Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge. FOLDER (a new one) gets logs.
# For trying slurm.sbatch; no test of CI.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "error: give a folder for logs, and the command" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
net=10.55.0
started=()

cleanup() {
  trap - EXIT
  for ((index = ${#started[@]} - 1; index >= 0; index--)); do  # munged last: the others sign off by it
    pid=${started[index]}
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  for node in node1 node2; do
    ip netns pids "$node" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true  # steps that outlive their node
    ip netns del "$node" 2>/dev/null || true
    ip link del "slurm-$node" 2>/dev/null || true
  done
  ip link del slurm-bridge 2>/dev/null || true
}
trap cleanup EXIT

# the network: a bridge with this machine at .1 and the nodes at .11 and .12
ip link add slurm-bridge type bridge
ip address add "$net.1/24" dev slurm-bridge
ip link set slurm-bridge up
for number in 1 2; do
  node=node$number
  ip netns add "$node"
  ip link add "slurm-$node" type veth peer name eth0 netns "$node"
  ip link set "slurm-$node" master slurm-bridge up
  ip -n "$node" address add "$net.1$number/24" dev eth0
  ip -n "$node" link set eth0 up
  ip -n "$node" link set lo up
done
printf '127.0.0.1 localhost\n%s.1 control\n%s.11 node1\n%s.12 node2\n' "$net" "$net" "$net" > "$folder/hosts"

export SLURM_CONF=$folder/slurm.conf
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # nproc counts no more than these
cat > "$SLURM_CONF" <<CONF
ClusterName=two
SlurmctldHost=control($net.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=node1 NodeAddr=$net.11 CPUs=$cores State=UNKNOWN
NodeName=node2 NodeAddr=$net.12 CPUs=$cores State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$folder/state"
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
  --seed-file="$folder/munge.seed" --log-file="$folder/munge.log" > "$folder/munged.out" 2>&1 &
started+=($!)
for _ in $(seq 50); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done

# with another host name, and names of all in its /etc/hosts; not `ip netns exec`, which hides the cgroups
as() {
  exec unshare --uts --mount sh -c 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh "$1" "$folder/hosts" "${@:2}"
}
(as control slurmctld -D) > "$folder/slurmctld.out" 2>&1 &
started+=($!)
for node in node1 node2; do
  mkdir "$folder/spool-$node"
  (nsenter --net="/run/netns/$node" bash -c "$(declare -f as); folder='$folder' as $node slurmd -D -N $node") \
    > "$folder/slurmd-$node.out" 2>&1 &
  started+=($!)
done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%D --states=idle 2>/dev/null)" = 2 ] && break
  sleep 1
done
sinfo
"$@"
