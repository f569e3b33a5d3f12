#!/bin/bash
# The fake metadata service, in a network namespace of its own behind the node:
#
#	pod ── node ── imds: 10.99.0.1/30 ── 10.99.0.2/30 :node ── 169.254.169.254, port 80
#
#	imds.sh start    start it, without a link to the node
#	imds.sh connect  connect the node with it, after each boot of the node
#	imds.sh stop
#
# The node forwards pods' packets to it, as it would on Azure. Packets that bypass the agent have the
# pod's own address, or that of the link if the cluster's network masquerades them, as kindnet
# does: the service takes both for pods'. The node's own requests have its other address, which
# the route names.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
metadata=169.254.169.254

start() {
	stop
	setsid unshare --net "$here/imds.sh" serve >"$state/imds.log" 2>&1 </dev/null &
	echo $! >"$state/imds.pid"
	local deadline=$((SECONDS + 30))
	until [ -S "$state/imds.sock" ]; do
		if [ $SECONDS -ge $deadline ] || ! kill -0 $! 2>/dev/null; then
			echo "the fake metadata service does not start, see $state/imds.log:" >&2
			tail -n 5 "$state/imds.log" >&2
			return 1
		fi
		sleep 0.1
	done
}

serve() {
	ip link set lo up
	ip address add $metadata/32 dev lo
	exec "$bin/imds" -pods "$pods,10.99.0.1/32" -control "$state/imds.sock"
}

connect() {
	local service address inside
	service=$(cat "$state/imds.pid")
	inside=$(docker inspect --format '{{.State.Pid}}' "$node")
	address=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$node")
	# The last boot's link goes with that boot's namespace, but the kernel takes its time.
	nsenter --target "$service" --net ip link delete node 2>/dev/null || true
	nsenter --target "$inside" --net ip link add imds type veth peer name node netns "$service"
	nsenter --target "$service" --net ip -batch - <<-EOF
		address add 10.99.0.2/30 dev node
		link set node up
		route add default via 10.99.0.1
	EOF
	nsenter --target "$inside" --net ip -batch - <<-EOF
		address add 10.99.0.1/30 dev imds
		link set imds up
		route add $metadata via 10.99.0.2 src $address
	EOF
}

stop() {
	[ -e "$state/imds.pid" ] || return 0
	local pid
	pid=$(cat "$state/imds.pid")
	if is_program "$pid" "$bin/imds"; then
		end_process "$pid"
	fi
	rm -f "$state/imds.pid" "$state/imds.sock"
}

case ${1:-} in
start | serve | connect | stop) "$1" ;;
*)
	sed -n 's/^#\timds/imds/p' "$here/imds.sh" >&2
	exit 2
	;;
esac
