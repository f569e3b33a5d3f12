#!/bin/bash
# Builds what the suite's migrations start from: the NMI of aad-pod-identity, from its module.
#
#   .cache/clusters/images/old-nmi.tar         localhost/old-nmi:<version>, with the iptables of our own image
#   .cache/clusters/old-nmi/{managed,standard}.yaml   its manifests, as they were released
#
# images.sh must have run. What is there and current is left alone; the first time takes a minute or two.
set -euo pipefail
cd "$(dirname "$0")"
cache=$(cd ../../.. && pwd)/.cache/clusters
go mod download github.com/Azure/aad-pod-identity # for its folder
read -r version module < <(go list -mod=mod -m -f '{{.Version}} {{.Dir}}' github.com/Azure/aad-pod-identity)

mkdir -p "$cache/bin" "$cache/old-nmi"
install -m 644 "$module/deploy/infra/managed-mode-deployment.yaml" "$cache/old-nmi/managed.yaml"
install -m 644 "$module/deploy/infra/deployment-rbac.yaml" "$cache/old-nmi/standard.yaml"

CGO_ENABLED=0 nice go build -trimpath -ldflags "-s -w -X github.com/Azure/aad-pod-identity/version.NMIVersion=$version" \
	-o "$cache/bin/old-nmi" github.com/Azure/aad-pod-identity/cmd/nmi
archive=$cache/images/old-nmi.tar
sum=$(sha256sum <"$cache/bin/old-nmi") # and not its time, which "go build" renews
if [ -f "$archive" ] && [ "$(cat "$archive.sum" 2>/dev/null)" = "$sum" ]; then
	exit
fi
image=localhost/old-nmi:$version
container=$(buildah from --quiet --pull-never "docker-archive:$cache/images/nmi.tar")
buildah add --quiet "$container" "$cache/bin/old-nmi" /usr/bin/nmi >/dev/null
rm -f "$archive.new"
buildah commit --quiet --rm "$container" "docker-archive:$archive.new:$image" >/dev/null
buildah rmi localhost/nmi:test >/dev/null # the base, of nmi.tar
mv "$archive.new" "$archive"
echo "$sum" >"$archive.sum"
echo "$archive: $image"
