#!/bin/bash
# Makes a node image for kind from Debian's packages and Go modules, where no registry can be
# reached, and says its name. It does what kind's own build does (images/base/Dockerfile in
# kind's module, whose files it takes) and then "kind build node-image". Where it differs, it
# says why. Root; some minutes the first time.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
work=$cache/node-image
fs=$work/root # the node's file system

# programs builds what a node runs that is not in Debian.
programs() {
	"$root/deploy/clusters/kube/build.sh"
	(cd "$here/local/programs" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$bin/" ./coredns tool)
	"$root/deploy/clusters/images.sh"
}

# kubernetes_image makes one image with all programs of a control plane, in place of the six
# that kubeadm wants: it says which program each is to run, but for CoreDNS.
kubernetes_image() {
	local container
	mmdebstrap --quiet --variant=minbase --include=iptables,nftables bookworm "$work/debian.tar"
	container=$(buildah from scratch)
	buildah add --quiet "$container" "$work/debian.tar" / >/dev/null
	buildah add --quiet "$container" "$bin"/{kube-apiserver,kube-controller-manager,kube-scheduler,kube-proxy,coredns} \
		"$root/.cache/bin/etcd" /usr/local/bin/ >/dev/null
	buildah config --entrypoint '["coredns"]' "$container"
	buildah commit --quiet --rm "$container" "docker-archive:$work/kubernetes.tar:localhost/kubernetes:local" >/dev/null
}

# file_system makes the node's file system, but for the images.
file_system() {
	local kind
	(cd "$root" && go mod download -modfile=.ci/kind/go.mod sigs.k8s.io/kind) # for its folder
	kind=$(cd "$root" && go list -modfile=.ci/kind/go.mod -m -f '{{.Dir}}' sigs.k8s.io/kind)
	mmdebstrap --quiet --variant=minbase bookworm "$fs" --include=systemd,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,libseccomp2,pigz,e2fsprogs,bash,ca-certificates,curl,jq,procps,containerd,runc,containernetworking-plugins
	rm -rf "$fs"/usr/share/{doc,man,locale} "$fs"/var/cache/apt/* "$fs"/var/lib/apt/lists/*

	cp -r --no-preserve=mode "$kind"/images/base/files/{etc,kind,usr} "$fs/"
	chmod 755 "$fs"/kind/bin/* "$fs"/usr/local/bin/*
	cp "$bin"/{kubeadm,kubelet,kubectl} "$fs/usr/bin/"
	cp "$bin/crictl" "$here/local/runc" "$fs/usr/local/bin/"
	mkdir -p "$fs"/{opt/cni/bin,etc/kubernetes/manifests,etc/cni/net.d,kind/manifests}
	cp "$fs"/usr/lib/cni/* "$fs/opt/cni/bin/"
	echo -n "$version" >"$fs/kind/version"

	# systemd starts what a node needs and nothing else, as in kind's images.
	rm -f "$fs"/lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service \
		"$fs"/lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* "$fs"/etc/systemd/system/*.wants/* \
		"$fs"/lib/systemd/system/sockets.target.wants/*{udev,initctl}*
	echo ReadKMsg=no >>"$fs/etc/systemd/journald.conf"
	ln -sf /usr/lib/systemd/systemd "$fs/sbin/init"
	chroot "$fs" systemctl --quiet enable kubelet.service containerd.service undo-mount-hacks.service
	chroot "$fs" systemctl --quiet mask systemd-binfmt.service
	# These settings are the whole kernel's, which is the machine's.
	rm -f "$fs"/usr/lib/sysctl.d/* "$fs/etc/sysctl.d/99-sysctl.conf"

	# A node looks up a name when it boots. Without a name server that is in reach it waits for 5
	# seconds.
	sed -i 's/^hosts:.*/hosts: files/' "$fs/etc/nsswitch.conf"

	# Debian's containerd is elsewhere. Without CAP_SYS_RESOURCE, which a machine may lack (see
	# runc), nobody can lower an oom_score_adj.
	ln -s /usr/bin/{containerd,ctr,containerd-shim-runc-v2} "$fs/usr/local/bin/"
	sed -i '/^OOMScoreAdjust/d' "$fs/etc/systemd/system/containerd.service"
	sed -i -e 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' \
		-e "s|sandbox_image = .*|sandbox_image = \"$(kubeadm_images | grep /pause:)\"|" "$fs/etc/containerd/config.toml"
	chroot "$fs" ctr oci spec |
		jq '.hooks.createContainer += [{path: "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' >"$fs/etc/containerd/cri-base.json"

	# kind applies this file. What its own names is a provisioner of volumes, an image of its own.
	cat >"$fs/kind/manifests/default-storage.yaml" <<-EOF
		apiVersion: storage.k8s.io/v1
		kind: StorageClass
		metadata: {name: standard, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
		provisioner: kubernetes.io/no-provisioner
	EOF
}

# kubeadm_images lists the images that kubeadm wants.
kubeadm_images() { "$bin/kubeadm" config images list --kubernetes-version "$version"; }

# load_images puts the images into the node's containerd, which runs for that in a chroot: in a
# node that starts, kubeadm wants them before anybody could load them.
load_images() {
	cp "$work/kubernetes.tar" "$images/pause.tar" "$fs/tmp/"
	# shellcheck disable=SC2046 # one word an image
	unshare --mount --pid --fork --kill-child --mount-proc="$fs/proc" chroot "$fs" bash -s -- $(kubeadm_images) <<-"EOF"
		set -euo pipefail
		mount -t tmpfs tmpfs /run
		printf '%s\n' 'version = 2' 'disabled_plugins = ["io.containerd.grpc.v1.cri"]' >/run/containerd.toml
		containerd --config /run/containerd.toml --log-level error &
		for _ in $(seq 100); do
			[ ! -S /run/containerd/containerd.sock ] || break
			sleep 0.1
		done
		ctr --namespace k8s.io images import --no-unpack /tmp/kubernetes.tar >/dev/null
		ctr --namespace k8s.io images import --no-unpack /tmp/pause.tar >/dev/null
		for image in "$@"; do
			case $image in
			*/pause:*) from=localhost/pause:test ;;
			*) from=localhost/kubernetes:local ;;
			esac
			ctr --namespace k8s.io images tag "$from" "$image" >/dev/null
		done
		kill %1
		wait %1 || true
	EOF
	rm "$fs"/tmp/*.tar
}

if "$here/local/docker.sh" running; then
	echo "a cluster runs, with the node image that there is; to end it: $here/cluster.sh down" >&2
	exit 1
fi
"$root/deploy/packages.sh" mmdebstrap buildah jq
rm -rf "$work"
mkdir -p "$work"
programs
version=$("$bin/kubelet" --version | cut -d' ' -f2)
image=localhost/kind-node:$version
kubernetes_image
file_system
load_images
"$here/local/docker.sh" up
tar --directory "$fs" --create . | "$here/local/docker.sh" enter docker import --change 'ENV container=docker' \
	--change 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]' - "$image" >/dev/null
"$here/local/docker.sh" enter docker image prune --force >/dev/null # one that had that name before
"$here/local/docker.sh" down
rm -rf "$work"
echo "made $image; to use it: make e2e-kind KIND_NODE_IMAGE=$image"
