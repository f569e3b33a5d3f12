# Sourced by cluster.sh: the node, seen from outside. It has network, mount, process and host name
# namespaces of its own: killing its process 1 kills all of it, pods included, as pulling the plug
# would, and with the namespaces go its rules, routes and /run.
# shellcheck shell=bash disable=SC2154 # settings.sh sets them

boot_node() {
	local unshare pid
	make_cgroups
	ip netns add "$node"
	connect_control_plane
	connect_imds
	start "$node" node unshare --mount --propagation=private --pid --fork --kill-child --mount-proc --uts \
		"$here/node-init.sh" "$state/disk" "$programs"
	unshare=$(cat "$state/node.pid")
	await "process 1 of the node" grep -q . "/proc/$unshare/task/$unshare/children"
	pid=$(tr -d ' ' <"/proc/$unshare/task/$unshare/children")
	echo "$pid" >"$state/node.pid"
	await "the kubelet to be started" test -s "/proc/$pid/root/run/kubelet.pid"
}

kill_node() {
	local pid
	if pid=$(node_pid); then
		kill -KILL "$pid"
		await "the node to end" gone "$pid"
	fi
	if [ -e "/run/netns/$node" ]; then
		# A namespace is removed some time after its last process. Its links must be gone now.
		ip -n "$node" link delete eth0 2>/dev/null || true
		ip -n "$node" link delete imds 2>/dev/null || true
		kill_all "$node"
	fi
	await "the node's cgroups to be empty" remove_cgroups
}

# node_pid writes the number of the node's process 1, if that is alive.
node_pid() {
	local pid
	pid=$(cat "$state/node.pid" 2>/dev/null) || return 1
	is_in "$pid" "$node" && echo "$pid"
}

# on_node <command>...: with the environment of a login, as ssh would.
on_node() {
	local pid
	pid=$(node_pid) || {
		echo "the node of cluster $CLUSTER is not running" >&2
		return 1
	}
	nsenter --target "$pid" --net --mount --pid --uts -- \
		env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-dumb}" "$@"
}

# restart <program>
restart() {
	local old
	old=$(on_node cat "/run/$1.pid")
	on_node kill -KILL "$old"
	await "$1 to be started again" restarted "$1" "$old"
}

restarted() { [ "$(on_node cat "/run/$1.pid")" != "$2" ]; }

wait_ready() {
	kubectl wait --for=create --timeout=120s "node/$node_name" >/dev/null
	kubectl wait --for=condition=Ready --timeout=120s "node/$node_name" >/dev/null
}

# Pods have cgroups below one of the cluster's name. Of version 1 each controller has a
# hierarchy, and cpuset's new children lack what a process needs; of version 2 the kubelet wants to
# find every controller enabled.
make_cgroups() {
	local directory file
	if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
		sed 's/[a-z]\+/+&/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
		mkdir -p "/sys/fs/cgroup/$CLUSTER"
		return
	fi
	for directory in /sys/fs/cgroup/*/; do
		[ "$directory" = /sys/fs/cgroup/unified/ ] || mkdir -p "$directory$CLUSTER"
	done
	for file in cpuset.cpus cpuset.mems; do
		cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$CLUSTER/$file"
	done
}

# remove_cgroups fails while processes in them are still ending.
remove_cgroups() {
	local directory
	for directory in "/sys/fs/cgroup/$CLUSTER" /sys/fs/cgroup/*/"$CLUSTER"; do
		[ ! -d "$directory" ] || find "$directory" -depth -type d -exec rmdir {} + || return 1
	done
}

# keep_logs saves the node's logs from the end of its disk.
keep_logs() {
	[ -d "$state/disk/var/log" ] || return 0
	rm -rf "$logs/node"
	mv "$state/disk/var/log" "$logs/node"
}
