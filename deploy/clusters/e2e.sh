#!/bin/bash
# e2e.sh one-node|kind: starts the cluster, runs the suite (./e2e) against it, and ends it. The exit
# code is 0 only if everything passed. In the environment:
#
#   CNI, KUBE_PROXY   the cluster's network. By default one-node is run twice: with ptp and
#                     iptables, then with bridge and nftables
#   RUN=<regexp>      some scenarios only
#   REBOOTS=<n>       how often to reboot with the boot guard; 20 by default
#   RESULTS=<folder>  where to write the results
#   KEEP=1            leave the cluster running, to look at it
set -euo pipefail
cd "$(dirname "$0")/../.."
cluster=$PWD/deploy/clusters/$1/cluster.sh
suite=$PWD/.cache/clusters/e2e.test

if "$cluster" exec true 2>/dev/null; then
	echo "the cluster runs already; this ends it: ${CLUSTER:+CLUSTER=$CLUSTER }$cluster down" >&2
	exit 1
fi

# shellcheck disable=SC2317 # the trap calls it
end() {
	trap '' INT TERM # once is enough
	if [ -n "${KEEP:-}" ]; then
		echo "the cluster is left running; ${CLUSTER:+CLUSTER=$CLUSTER }$cluster down ends it"
	else
		"$cluster" down
	fi
}
trap 'exit 130' INT TERM
trap end EXIT

go tool -modfile=.ci/helm/go.mod -n helm >/dev/null # builds it, which the suite could not: modules are out of its reach
go test -c -tags cluster -o "$suite" ./deploy/clusters/e2e

networks=("${CNI:-} ${KUBE_PROXY:-}")
if [ "$1" = one-node ] && [ -z "${CNI:-}${KUBE_PROXY:-}" ]; then
	networks=("ptp iptables" "bridge nftables")
fi
status=0
for network in "${networks[@]}"; do
	export CNI="${network% *}" KUBE_PROXY="${network#* }"
	"$cluster" up
	"$cluster" run "$suite" -test.v -test.timeout 90m -test.run "${RUN:-.}" -image localhost/nmi:test \
		${REBOOTS:+-reboots "$REBOOTS"} ${RESULTS:+-results "$(realpath "$RESULTS")"} || status=$?
	[ "$status" = 0 ] || [ -z "${KEEP:-}" ] || break
done
exit "$status"
