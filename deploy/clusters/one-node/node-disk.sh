# Sourced by cluster.sh: what is on the node's disk, which is its /etc and /var. They last
# while it reboots. The rest of its file system is this machine's.
# shellcheck shell=bash disable=SC2154 # settings.sh sets them

# write_disk <CNI> <KUBE_PROXY>
write_disk() {
	local etc=$state/disk/etc var=$state/disk/var
	mkdir "$state/disk"
	cp -a /etc "$etc"
	mkdir -p "$var"/{lib,log,tmp} "$etc"/{containerd,cni/net.d,kubernetes,systemd/system/multi-user.target.wants}
	ln -s /run "$var/run"
	rm -f "$etc"/{hostname,hosts,resolv.conf} "$etc"/cni/net.d/*
	echo "$node_name" >"$etc/hostname"
	printf '%s\n' '127.0.0.1 localhost' "$node_ip $node_name" >"$etc/hosts" # the kubelet finds its address there
	echo "nameserver ${service_subnet%.0/*}.10" >"$etc/resolv.conf" # nobody: there is no DNS

	cp "$state/pki/ca.crt" "$state/kubelet.conf" "$state/kube-proxy.conf" "$etc/kubernetes/"
	containerd_config >"$etc/containerd/config.toml"
	"cni_$1" >"$etc/cni/net.d/10-pods.conflist"
	kubelet_config >"$etc/kubernetes/kubelet.yaml"
	kube_proxy_config "$2" >"$etc/kubernetes/kube-proxy.yaml"
	network_config >"$etc/network.sh"
}

containerd_config() {
	cat <<-END
		version = 2
		[plugins."io.containerd.internal.v1.opt"]
		  # A directory that containerd makes, by default below /opt, which is this machine's.
		  path = "/var/lib/containerd/opt"
		[plugins."io.containerd.grpc.v1.cri"]
		  sandbox_image = "localhost/pause:test"
		  # Without this no pod starts where root lacks CAP_SYS_RESOURCE, as in some containers.
		  restrict_oom_score_adj = true
		  [plugins."io.containerd.grpc.v1.cri".cni]
		    bin_dir = "/usr/lib/cni"
	END
}

# Neither plugin masquerades: the metadata service must see the pod's own address in a request that
# has bypassed the agent.
cni_ptp() {
	cni_conflist '"type": "ptp"'
}

cni_bridge() {
	cni_conflist '"type": "bridge", "bridge": "cbr0", "isGateway": true'
}

cni_conflist() {
	cat <<-END
		{
		  "cniVersion": "0.4.0",
		  "name": "pods",
		  "plugins": [{
		    $1,
		    "ipMasq": false,
		    "ipam": {
		      "type": "host-local",
		      "ranges": [[{"subnet": "$pod_subnet"}]],
		      "routes": [{"dst": "0.0.0.0/0"}]
		    }
		  }]
		}
	END
}

kubelet_config() {
	cat <<-END
		apiVersion: kubelet.config.k8s.io/v1beta1
		kind: KubeletConfiguration
		containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
		clusterDomain: cluster.local
		clusterDNS: ["${service_subnet%.0/*}.10"]
		authentication:
		  anonymous: {enabled: false}
		  webhook: {enabled: true}
		  x509: {clientCAFile: /etc/kubernetes/ca.crt}
		authorization: {mode: Webhook}
		failSwapOn: false
		# By default the kubelet refuses version 1 since 1.35.
		failCgroupV1: false
		cgroupDriver: cgroupfs
		cgroupRoot: /$CLUSTER
		# That would need cgroups for the node's own programs.
		enforceNodeAllocatable: []
		# What is free on the disk is this machine's business. An image that was collected could not
		# be pulled again.
		evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
		imageGCHighThresholdPercent: 100
		# A directory that the kubelet makes, by default below /usr, which is this machine's.
		volumePluginDir: /var/lib/kubelet/volume-plugins
	END
}

# kube_proxy_config <KUBE_PROXY>
kube_proxy_config() {
	cat <<-END
		apiVersion: kubeproxy.config.k8s.io/v1alpha1
		kind: KubeProxyConfiguration
		mode: $1
		clientConnection: {kubeconfig: /etc/kubernetes/kube-proxy.conf}
		clusterCIDR: $pod_subnet
		# The limit of conntrack is this machine's.
		conntrack: {maxPerCore: 0}
	END
}

# What brings up the node's network at boot. eth0 leads to the control plane, imds to the metadata
# service, which is to see the node's own address.
network_config() {
	cat <<-END
		ip link set lo up
		ip link set eth0 up
		ip address add $node_ip/24 dev eth0
		ip route add default via $control_plane_ip
		ip link set imds up
		ip route add $metadata_ip dev imds src $node_ip
		sysctl -qw net.ipv4.ip_forward=1
	END
}
