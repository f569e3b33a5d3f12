# Sourced by cluster.sh: where things are and what they are called, and how programs are started
# and stopped.
# shellcheck shell=bash disable=SC2034,SC2154 # the other files use what it sets; cluster.sh sets $here

cache=$(cd "$here/../../.." && pwd)/.cache/clusters
programs=$cache/bin # kubelet and so on; ../kube/build.sh builds them
etcd=$cache/../bin/etcd # "make kube" builds it

# Everything that this machine can see of a cluster has the cluster's name in its own, so that
# two can run side by side. Addresses need not differ: each has network namespaces of its own.
CLUSTER=${CLUSTER:-one-node}
state=$cache/$CLUSTER
logs=$state/log
if ! [[ $CLUSTER =~ ^[a-z][a-z0-9-]*$ ]]; then
	echo "CLUSTER=$CLUSTER: want lower-case letters, digits and dashes" >&2
	exit 2
fi

node_name=node1
control_plane=$CLUSTER-control-plane # names of network namespaces
node=$CLUSTER-$node_name
imds=$CLUSTER-imds

control_plane_ip=10.200.7.254
node_ip=10.200.7.1
pod_subnet=10.244.0.0/24 # one node has all pods
service_subnet=10.96.0.0/16
metadata_ip=169.254.169.254

require_up() {
	if ! [ -e "/run/netns/$control_plane" ] || ! [ -e "$state/network" ]; then
		echo "cluster $CLUSTER is not up: $here/cluster.sh up" >&2
		exit 1
	fi
}

check_requirements() {
	local name missing=
	[ "$(id -u)" = 0 ] || {
		echo "This makes network namespaces, and needs root for that." >&2
		exit 1
	}
	for name in containerd runc ip iptables nft conntrack openssl nsenter unshare setsid; do
		command -v "$name" >/dev/null || missing+=" $name"
	done
	for name in /usr/lib/cni/{ptp,bridge,host-local} \
		"$etcd" "$programs"/{kube-apiserver,kube-controller-manager,kube-scheduler,kubectl,kubelet,kube-proxy,imds} \
		"$cache"/images/{nmi,asker,pause}.tar; do
		[ -e "$name" ] || missing+=" $name"
	done
	if [ -n "$missing" ]; then
		echo "missing:$missing" >&2
		echo "\"make node-cluster\" installs and builds all of it." >&2
		exit 1
	fi
}

# start <namespace> <name> <command>...: in the background, in a session of its own, so that
# Ctrl-C ends the tests first. nsenter and not "ip netns exec", which mounts a /sys without cgroups.
start() {
	local netns=$1 name=$2
	shift 2
	setsid nsenter --net="/run/netns/$netns" -- "$@" </dev/null >>"$logs/$name.log" 2>&1 &
	echo $! >"$state/$name.pid"
}

# is_in <pid> <namespace>: whether a process that was started there is still that one. Numbers
# are used again.
is_in() {
	[ -n "$1" ] && [ "/proc/$1/ns/net" -ef "/run/netns/$2" ]
}

# stop <namespace> <name>: kills it at once, as a crash would.
stop() {
	local pid
	pid=$(cat "$state/$2.pid" 2>/dev/null) || return 0
	is_in "$pid" "$1" || return 0
	kill -KILL "$pid"
	await "$2 to end" gone "$pid"
}

# kill_all <namespace>: kills every process in it, and removes it.
kill_all() {
	local pid
	[ -e "/run/netns/$1" ] || return 0
	for pid in $(ip netns pids "$1"); do
		kill -KILL "$pid" 2>/dev/null || true # it may have ended
	done
	await "the processes of $1 to end" empty "$1"
	ip netns delete "$1"
}

gone() { ! [ -e "/proc/$1" ]; }
empty() { [ -z "$(ip netns pids "$1")" ]; }

# await <what> <command>...: until the command succeeds. Patience is for machines that are busy
# with other things.
await() {
	local what=$1 deadline=$((SECONDS + 120))
	shift
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS > deadline)); then
			echo "waited two minutes for $what, in vain; see $logs" >&2
			return 1
		fi
		sleep 0.1
	done
}
