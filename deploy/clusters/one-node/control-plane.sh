# Sourced by cluster.sh: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, in a
# network namespace of their own. They go on while the node reboots.
# shellcheck shell=bash disable=SC2154 # settings.sh sets them

start_control_plane() {
	ip netns add "$control_plane"
	ip -n "$control_plane" link set lo up
	ip -n "$control_plane" address add "$control_plane_ip/32" dev lo # kube-apiserver wants it before there is a node
	write_certificates
	write_users

	start "$control_plane" etcd "$etcd" --data-dir="$state/etcd" --unsafe-no-fsync
	start_api_server
	# It makes the directory of plugins, by default below this machine's /usr.
	start "$control_plane" kube-controller-manager "$programs/kube-controller-manager" \
		--kubeconfig="$state/kube-controller-manager.conf" --leader-elect=false \
		--use-service-account-credentials --service-account-private-key-file="$state/pki/service-accounts.key" \
		--root-ca-file="$state/pki/ca.crt" --flex-volume-plugin-dir="$state/volume-plugins"
	start "$control_plane" kube-scheduler "$programs/kube-scheduler" \
		--kubeconfig="$state/kube-scheduler.conf" --leader-elect=false
	# No pod can be created before its service account.
	await "the service account of namespace default" kubectl get serviceaccount default
}

# connect_control_plane is the cable to a node that boots.
connect_control_plane() {
	ip -n "$node" link add eth0 type veth peer name "$node_name" netns "$control_plane"
	ip -n "$control_plane" address add "$control_plane_ip/24" dev "$node_name"
	ip -n "$control_plane" link set "$node_name" up
	ip -n "$control_plane" route add "$pod_subnet" via "$node_ip"
}

start_api_server() {
	start "$control_plane" kube-apiserver "$programs/kube-apiserver" \
		--etcd-servers=http://127.0.0.1:2379 --advertise-address="$control_plane_ip" \
		--service-cluster-ip-range="$service_subnet" --allow-privileged \
		--tls-cert-file="$state/pki/kube-apiserver.crt" --tls-private-key-file="$state/pki/kube-apiserver.key" \
		--client-ca-file="$state/pki/ca.crt" --token-auth-file="$state/users.csv" \
		--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
		--service-account-issuer=https://kubernetes.default.svc \
		--service-account-key-file="$state/pki/service-accounts.key" \
		--service-account-signing-key-file="$state/pki/service-accounts.key" \
		--kubelet-client-certificate="$state/pki/kubelet-client.crt" --kubelet-client-key="$state/pki/kubelet-client.key" \
		--kubelet-preferred-address-types=InternalIP
	await "kube-apiserver" kubectl get --raw /readyz
}

kubectl() {
	nsenter --net="/run/netns/$control_plane" -- "$programs/kubectl" --kubeconfig="$state/admin.conf" "$@"
}

write_certificates() {
	mkdir "$state/pki"
	openssl req -x509 -days 30 -subj /CN=test-cluster -out "$state/pki/ca.crt" \
		-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -keyout "$state/pki/ca.key" 2>/dev/null
	certificate kube-apiserver /CN=kube-apiserver \
		"subjectAltName=DNS:kubernetes.default.svc,IP:$control_plane_ip,IP:${service_subnet%.0/*}.1"
	# With it the API server asks the kubelet for logs, and for exec.
	certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client extendedKeyUsage=clientAuth
	openssl genrsa -out "$state/pki/service-accounts.key" 2048 2>/dev/null # Entra accepts RS256 alone
}

# certificate <name> <subject> <extension>
certificate() {
	local file=$state/pki/$1
	openssl req -subj "$2" -out "$file.csr" -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -keyout "$file.key" 2>/dev/null
	openssl x509 -req -days 30 -in "$file.csr" -CA "$state/pki/ca.crt" -CAkey "$state/pki/ca.key" -CAcreateserial \
		-extfile <(echo "$3") -out "$file.crt" 2>/dev/null
}

# write_users makes a bearer token for each client of the API server, and the kubeconfig with it.
write_users() {
	local file user groups token
	while read -r file user groups; do
		token=$(openssl rand -hex 16)
		echo "$token,$user,$user,$groups" >>"$state/users.csv"
		cat >"$state/$file.conf" <<-END
			apiVersion: v1
			kind: Config
			clusters:
			- name: $CLUSTER
			  cluster:
			    server: https://$control_plane_ip:6443
			    certificate-authority-data: $(base64 -w 0 "$state/pki/ca.crt")
			users:
			- name: $user
			  user: {token: "$token"}
			contexts:
			- name: $CLUSTER
			  context: {cluster: $CLUSTER, user: "$user"}
			current-context: $CLUSTER
		END
	done <<-END
		admin admin system:masters
		kube-controller-manager system:kube-controller-manager
		kube-scheduler system:kube-scheduler
		kube-proxy system:kube-proxy
		kubelet system:node:$node_name system:nodes
	END
}
