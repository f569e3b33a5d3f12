#!/bin/bash
# Writes what the cluster's configuration has besides cluster.sh's, for a node image of
# node-image.sh. That has no kindnet, kind's own network of pods: the configuration of a CNI
# plugin takes its place, CNI=ptp (as kindnet's) or CNI=bridge. Neither masquerades.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

case ${CNI:-ptp} in
ptp) plugin='"type": "ptp"' ;;
bridge) plugin='"type": "bridge", "bridge": "cbr0", "isGateway": true, "hairpinMode": true' ;;
*)
	echo "CNI=$CNI: want ptp or bridge" >&2
	exit 1
	;;
esac

# The only node has the first /24 of the pods' addresses. What is in use is forgotten with /run.
mkdir -p "$state/cni"
cat >"$state/cni/10-pods.conflist" <<EOF
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [{
    $plugin,
    "ipMasq": false,
    "ipam": {
      "type": "host-local",
      "ranges": [[{"subnet": "${pods%/16}/24"}]],
      "routes": [{"dst": "0.0.0.0/0"}],
      "dataDir": "/run/pod-addresses"
    }
  }]
}
EOF

# failCgroupV1: the machine may have version 1 of cgroups, which the kubelet refuses by default.
cat <<EOF
kubeadmConfigPatches:
- |
  kind: KubeletConfiguration
  failCgroupV1: false
nodes:
- role: control-plane
  extraMounts:
  - {hostPath: $state/cni, containerPath: /etc/cni/net.d, readOnly: true}
EOF
