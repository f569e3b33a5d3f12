#!/bin/bash
# A Kubernetes cluster of one node out of real parts, in network namespaces of this machine.
# ../README.md says what it is for, what it consists of and how to look inside.
#
#   cluster.sh up                    start it, and wait until its node is Ready and has the images.
#                                    CNI=ptp|bridge and KUBE_PROXY=iptables|nftables choose its network
#   cluster.sh down                  end all of it; the logs stay
#   cluster.sh load FILE...          put archives of images on the node
#   cluster.sh exec CMD ARG...       on the node, as ssh to it would
#   cluster.sh run CMD ARG...        here, but where the API server answers; with KUBECONFIG and kubectl
#   cluster.sh reboot                pull the node's plug, and boot it
#   cluster.sh restart kubelet       kill it; it is started again, as systemd would. So are
#                                    containerd and kube-proxy
#   cluster.sh api-server stop|start stop kills it
#
# CLUSTER=<name> runs another one beside it; every verb takes it.
# shellcheck source-path=SCRIPTDIR
set -Eeuo pipefail
trap 'echo "failed: ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND" >&2' ERR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=settings.sh
. "$here/settings.sh"
# shellcheck source=imds.sh
. "$here/imds.sh"
# shellcheck source=control-plane.sh
. "$here/control-plane.sh"
# shellcheck source=node-disk.sh
. "$here/node-disk.sh"
# shellcheck source=node.sh
. "$here/node.sh"

up() {
	local CNI=${CNI:-ptp} KUBE_PROXY=${KUBE_PROXY:-iptables}
	case $CNI:$KUBE_PROXY in
	ptp:iptables | ptp:nftables | bridge:iptables | bridge:nftables) ;;
	*)
		echo "CNI=$CNI KUBE_PROXY=$KUBE_PROXY: want ptp or bridge, and iptables or nftables" >&2
		exit 2
		;;
	esac
	check_requirements
	down
	mkdir -p "$logs"
	chmod 700 "$state" # it has keys, and a copy of /etc
	echo "CNI=$CNI KUBE_PROXY=$KUBE_PROXY" >"$state/network"
	start_imds
	start_control_plane
	write_disk "$CNI" "$KUBE_PROXY"
	boot_node
	wait_ready
	load "$cache"/images/*.tar
}

# down may be called whatever is left of a run, nothing included.
down() {
	local netns
	for netns in "$control_plane" "$imds"; do
		if [ /proc/self/ns/net -ef "/run/netns/$netns" ]; then
			echo "cluster.sh down would end itself: do not call it by cluster.sh run" >&2
			exit 1
		fi
	done
	kill_node
	for netns in "$control_plane" "$imds"; do
		kill_all "$netns"
	done
	keep_logs
	rm -rf --one-file-system "${state:?}"/{disk,etcd,pki,volume-plugins,imds.sock,network} "$state"/*.{conf,csv,pid}
}

# load puts archives of images into the node's containerd. They come over stdin, since the
# node's /var and /etc hide this machine's.
load() {
	local archive
	for archive in "$@"; do
		on_node ctr --namespace k8s.io images import - <"$archive" >/dev/null
	done
}

run() {
	require_up
	# shellcheck disable=SC2046 # CNI=... KUBE_PROXY=...: two words
	exec nsenter --net="/run/netns/$control_plane" -- env \
		PATH="$programs:$PATH" KUBECONFIG="$state/admin.conf" \
		NMI_CLUSTER="$here/cluster.sh" NMI_IMDS="$state/imds.sock" \
		CLUSTER="$CLUSTER" $(cat "$state/network") "$@"
}

case "${1:-}:${2:-}" in
up: | down:) "$1" ;;
load:?* | run:?*) "$@" ;;
exec:?*)
	shift
	on_node "$@" || exit # with its exit code
	;;
reboot:)
	require_up
	kill_node
	boot_node
	;;
restart:kubelet | restart:containerd | restart:kube-proxy)
	require_up
	restart "$2"
	;;
api-server:stop)
	require_up
	stop "$control_plane" kube-apiserver
	;;
api-server:start)
	require_up
	start_api_server
	;;
*)
	sed -n '2,/^# CLUSTER/s/^# \?//p' "$here/cluster.sh" >&2
	exit 2
	;;
esac
