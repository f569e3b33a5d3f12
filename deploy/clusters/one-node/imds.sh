# Sourced by cluster.sh: the fake metadata service. It is a machine of its own behind the node,
# like the hypervisor that answers on Azure, and goes on while the node reboots.
# shellcheck shell=bash disable=SC2154 # settings.sh sets them

start_imds() {
	ip netns add "$imds"
	ip -n "$imds" link set lo up
	ip -n "$imds" address add "$metadata_ip/32" dev lo
	start "$imds" imds "$programs/imds" -pods "$pod_subnet" -control "$state/imds.sock"
	await "the metadata service" test -S "$state/imds.sock"
}

# connect_imds is the cable to a node that boots. All answers of the service go to the node, those
# to the address of a pod that has bypassed the agent too. Nothing here masquerades, so that such
# a request is seen.
connect_imds() {
	ip -n "$node" link add imds type veth peer name "$node_name" netns "$imds"
	ip -n "$imds" link set "$node_name" up
	ip -n "$imds" route add default via "$node_ip" dev "$node_name" onlink
}
