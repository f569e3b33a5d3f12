#!/bin/bash
# Builds programs of Kubernetes, statically, into .cache/clusters/bin: those that are named, or
# all of tools.go. The version is that of go.mod. What has been built from it already stays as it
# is, so that this costs nothing the second time; the first time it takes some minutes.
set -euo pipefail
cd "$(dirname "$0")"
bin=../../../.cache/clusters/bin
[ $# -gt 0 ] || set -- kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubeadm kubectl

version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
IFS=. read -r major minor _ <<<"${version#v}"
# Without these a program of Kubernetes says that it is v0.0.0-master, which kubeadm refuses.
stamp=k8s.io/component-base/version
flags="-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor"

mkdir -p "$bin"
for program in "$@"; do
	if go version -m "$bin/$program" 2>/dev/null | grep -qP "\tk8s.io/kubernetes\t$version\t"; then
		continue
	fi
	echo "building $program $version; the first of them takes some minutes" >&2
	CGO_ENABLED=0 go build -p 2 -trimpath -ldflags "$flags" -o "$bin/$program" "k8s.io/kubernetes/cmd/$program"
done
