#!/bin/bash
# A kind cluster of one node, with a fake metadata service behind the node. README.md says how
# to use it.
#
#	cluster.sh up               start it; CNI=ptp|bridge, KUBE_PROXY=iptables|nftables,
#	                            KIND_NODE_IMAGE=<image> (kind's own if unset)
#	cluster.sh down             end all that "up" started
#	cluster.sh load FILE...     image archives into the node's containerd
#	cluster.sh exec CMD...      a command on the node
#	cluster.sh run CMD...       a command here, with KUBECONFIG and kubectl
#	cluster.sh reboot           pull the node's plug, and boot it
#	cluster.sh restart kubelet  kill it; systemd starts it again
#	cluster.sh api-server stop|start
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
verb=${1:-}

# thawing runs a command that ends containers, see local/docker.sh.
thawing() {
	local thaw status=0
	"$here/local/docker.sh" thaw &
	thaw=$!
	"$@" || status=$?
	kill "$thaw"
	wait "$thaw" 2>/dev/null || true
	return "$status"
}

# Where the node image is a local one, there is no docker either: local/docker.sh runs one in
# namespaces of its own, and this script once more in there.
if [ -z "${NMI_KIND_INSIDE:-}" ]; then
	if [ "$verb" = up ] && [[ ${KIND_NODE_IMAGE:-} == localhost/* ]]; then
		"$here/local/docker.sh" up
	fi
	if "$here/local/docker.sh" running; then
		if [ "$verb" != down ]; then
			exec "$here/local/docker.sh" enter "$here/cluster.sh" "$@"
		fi
		status=0
		thawing "$here/local/docker.sh" enter "$here/cluster.sh" down || status=$?
		thawing "$here/local/docker.sh" down
		exit "$status"
	fi
fi

kind() {
	local program
	program=$(cd "$root" && go tool -modfile=.ci/kind/go.mod -n kind)
	"$program" "$@"
}

# eventually tries a command until it succeeds, for a minute.
eventually() {
	local deadline=$((SECONDS + 60))
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -ge $deadline ]; then
			echo "a minute later this still fails: $*" >&2
			"$@" # and says why
			return
		fi
		sleep 0.1
	done
}

# config is what "kind create cluster" reads.
config() {
	local foreign_cni=false
	if [ -n "${NMI_KIND_INSIDE:-}" ]; then
		foreign_cni=true
	elif [ "${CNI:-ptp}" != ptp ]; then
		echo "CNI=$CNI: kind's own node images have ptp (kindnet) only" >&2
		return 1
	fi
	cat <<-EOF
		kind: Cluster
		apiVersion: kind.x-k8s.io/v1alpha4
		networking:
		  ipFamily: ipv4
		  podSubnet: $pods
		  kubeProxyMode: ${KUBE_PROXY:-iptables}
		  disableDefaultCNI: $foreign_cni
	EOF
	if [ -n "${NMI_KIND_INSIDE:-}" ]; then
		"$here/local/config.sh"
	fi
}

up() {
	if ! docker version >/dev/null; then
		echo "kind needs docker, unless its node image is one of make kind-node-image" >&2
		return 1
	fi
	if docker inspect "$node" >/dev/null 2>&1; then
		echo "the cluster is there already; to end it: $here/cluster.sh down" >&2
		return 1
	fi
	if [ -n "${NMI_KIND_INSIDE:-}" ] && ! docker image inspect "$KIND_NODE_IMAGE" >/dev/null 2>&1; then
		echo "there is no image $KIND_NODE_IMAGE: make kind-node-image makes one, and says its name; $here/cluster.sh down ends docker" >&2
		return 1
	fi
	mkdir -p "$state"
	config >"$state/kind.yaml"
	echo "CNI=${CNI:-ptp} KUBE_PROXY=${KUBE_PROXY:-iptables}" >"$state/network"
	"$here/imds.sh" start
	kind create cluster --name "$name" ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"} \
		--config "$state/kind.yaml" --kubeconfig "$state/kubeconfig" --retain
	"$here/imds.sh" connect
	load "$images/nmi.tar" "$images/asker.tar"
	run kubectl wait --for=condition=Ready "node/$node" --timeout=120s
	# Pods cannot be made before the controller manager has made it.
	eventually run kubectl get serviceaccount default
}

down() {
	"$here/imds.sh" stop
	if docker inspect "$node" >/dev/null 2>&1; then
		kind delete cluster --name "$name" --kubeconfig "$state/kubeconfig"
	fi
	rm -f "$state"/{kubeconfig,kind.yaml,network}
}

load() {
	local archive
	for archive in "$@"; do
		kind load image-archive "$archive" --name "$name"
	done
}

run() {
	# shellcheck disable=SC2046 # one word a variable
	env $(cat "$state/network") KUBECONFIG="$state/kubeconfig" NMI_CLUSTER="$here/cluster.sh" NMI_IMDS="$state/imds.sock" \
		PATH="$bin:$PATH" "$@"
}

# reboot kills all of the node at once, and with it the kernel's rules, whose network namespace
# ends. The metadata service's link is there again before systemd has started the kubelet.
reboot() {
	thawing docker kill "$node" >/dev/null
	docker start "$node" >/dev/null
	"$here/imds.sh" connect
	eventually docker exec "$node" systemctl is-active kubelet
}

kubelet_pid() { docker exec "$node" systemctl show --property=MainPID --value kubelet; }

is_another_kubelet() {
	local pid
	pid=$(kubelet_pid)
	[ "$pid" != 0 ] && [ "$pid" != "$1" ]
}

restart_kubelet() {
	local before
	before=$(kubelet_pid)
	docker exec "$node" systemctl kill --kill-whom=main --signal=KILL kubelet
	eventually is_another_kubelet "$before"
}

# The API server is a static pod: the kubelet runs what it finds in a directory. Left to end by
# itself it takes half a minute, for clients that watch.
api_server_stop() {
	docker exec "$node" mv /etc/kubernetes/manifests/kube-apiserver.yaml /etc/kubernetes/kube-apiserver.yaml.off
	eventually docker exec "$node" sh -c 'pkill -KILL -x kube-apiserver; sleep 1; ! pgrep -x kube-apiserver'
}

api_server_start() {
	docker exec "$node" mv /etc/kubernetes/kube-apiserver.yaml.off /etc/kubernetes/manifests/kube-apiserver.yaml
	eventually run kubectl get --raw /readyz
}

case "$*" in
up) up ;;
down) down ;;
reboot) reboot ;;
"restart kubelet") restart_kubelet ;;
"api-server stop") api_server_stop ;;
"api-server start") api_server_start ;;
"load "*) load "${@:2}" ;;
"exec "*) docker exec -i "$node" "${@:2}" ;;
"run "*) run "${@:2}" ;;
*)
	sed -n 's/^#\t//p' "$here/cluster.sh" >&2
	exit 2
	;;
esac
