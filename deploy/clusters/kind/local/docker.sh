#!/bin/bash
# A docker daemon for a machine that has none, in network, mount and process namespaces of its
# own: nothing of it is seen in the machine's network, and when its first process ends, all ends.
# It has no way out to other networks.
#
#	docker.sh up            start it, unless it runs
#	docker.sh running       does it run?
#	docker.sh enter CMD...  run a command where it runs: "docker" works there as anywhere
#	docker.sh thaw          for a minute, let go what is frozen
#	docker.sh down          end it, and put back what it changed
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

# The package is unpacked, not installed: installing it would start a daemon in the machine's
# own network.
package=$cache/docker
PATH=$package/usr/bin:$package/usr/sbin:$PATH:/usr/sbin:/sbin

# Settings of the whole kernel that a node changes: systemd the first two, the kubelet the others.
settings="fs.file-max fs.nr_open vm.overcommit_memory kernel.panic kernel.panic_on_oops
	kernel.keys.root_maxkeys kernel.keys.root_maxbytes"

running() {
	[ -e "$state/docker.pid" ] || return 1
	# The number may be another process's by now.
	grep -qsz "^$here/local/docker.sh$" "/proc/$(cat "$state/docker.pid")/cmdline"
}

up() {
	! running || return 0
	"$root/deploy/packages.sh" containerd runc iptables jq
	if [ ! -x "$package/usr/sbin/dockerd" ]; then
		local download
		download=$(mktemp -d)
		(cd "$download" && chown _apt . && apt-get download -qq docker.io) # or apt warns
		dpkg-deb --extract "$download"/docker.io_*.deb "$package"
		rm -r "$download"
	fi
	mkdir -p "$state"
	if [ ! -e "$state/settings" ]; then
		# shellcheck disable=SC2086 # one word a setting
		sysctl $settings >"$state/settings"
	fi
	# kind mounts it in the node, and docker makes what it is to mount.
	[ -e /lib/modules ] || touch "$state/made-lib-modules"

	setsid unshare --net --mount --propagation private --pid --fork --mount-proc --kill-child \
		"$here/local/docker.sh" init >"$state/docker.log" 2>&1 </dev/null &
	local unshare=$! deadline=$((SECONDS + 60))
	until pgrep --parent $unshare >"$state/docker.pid" && running && enter docker version >/dev/null 2>&1; do
		if [ $SECONDS -ge $deadline ] || ! kill -0 $unshare 2>/dev/null; then
			echo "docker does not start, see $state/docker.log:" >&2
			tail -n 5 "$state/docker.log" >&2
			return 1
		fi
		sleep 0.1
	done
}

# init is the first process of the namespaces. It ends when the daemon does.
init() {
	mount -t tmpfs tmpfs /run # the daemon's socket and its like: not the machine's
	ip link set lo up
	dockerd --data-root "$state/docker" --cgroup-parent /nmi-kind --ip6tables=false \
		--oom-score-adjust 0 --add-runtime less="$here/local/runc" --default-runtime less &
	trap 'kill $!' TERM
	wait $! || wait $! # again after a signal
}

enter() {
	nsenter --target "$(cat "$state/docker.pid")" --net --mount --pid \
		env --unset=DOCKER_HOST --chdir="$PWD" NMI_KIND_INSIDE=1 PATH="$PATH" "$@"
}

# remove_cgroups removes those of the containers, which outlive their processes. While one of
# these is still ending its cgroup is busy.
remove_cgroups() {
	local deadline=$((SECONDS + 10)) top
	shopt -s nullglob
	for top in /sys/fs/cgroup/nmi-kind /sys/fs/cgroup/*/nmi-kind; do
		while [ -d "$top" ] && ! find "$top" -depth -type d -exec rmdir {} + 2>/dev/null; do
			if [ $SECONDS -ge $deadline ]; then
				echo "$top is in use, and stays" >&2
				break
			fi
			sleep 0.1
		done
	done
}

# thaw lets go what is frozen, for a minute at most. In version 1 of cgroups runc freezes a
# container to change its devices. If it is killed just then, nothing in there can end, and docker
# can neither kill nor remove the node.
thaw() {
	local deadline=$((SECONDS + 60)) frozen
	shopt -s nullglob globstar
	while [ $SECONDS -lt $deadline ]; do
		for frozen in /sys/fs/cgroup/*freezer*/nmi-kind/**/freezer.state; do
			echo THAWED >"$frozen" || true
		done 2>/dev/null # what has been removed meanwhile
		sleep 0.5
	done
}

down() {
	if running; then
		end_process "$(cat "$state/docker.pid")"
	fi
	rm -f "$state/docker.pid"
	remove_cgroups
	if [ -e "$state/settings" ]; then
		sysctl --quiet --load="$state/settings"
		rm "$state/settings"
	fi
	if [ -e "$state/made-lib-modules" ]; then
		rmdir /lib/modules 2>/dev/null || true
		rm "$state/made-lib-modules"
	fi
}

case ${1:-} in
up | running | init | thaw | down) "$1" ;;
enter) enter "${@:2}" ;;
*)
	sed -n 's/^#\tdocker/docker/p' "$here/local/docker.sh" >&2
	exit 2
	;;
esac
