#!/bin/bash
# Builds the images of the test clusters, without a registry, as archives in .cache/clusters/images:
#
#   nmi.tar    localhost/nmi:test     the agent, by the project's Dockerfile
#   asker.tar  localhost/asker:test   what test pods run
#   pause.tar  localhost/pause:test   what keeps a pod's namespaces; kind has its own
#
# An archive is made only if what goes into it has changed. The programs are compiled here to find
# that out, which is cheap with Go's build cache.
set -euo pipefail
cd "$(dirname "$0")/../.."
images=$PWD/.cache/clusters/images
mkdir -p "$images"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CGO_ENABLED=0

# is_current <name> <file>...: whether the archive was made of these files. If not, they are noted,
# and valid once the archive is written.
is_current() {
	local name=$1
	shift
	cat "$@" | sha256sum >"$work/$name.sum"
	[ -f "$images/$name.tar" ] && cmp --silent "$work/$name.sum" "$images/$name.sum"
}

# publish <name>: the archive appears in one step, since a cluster may be reading the old one.
publish() {
	mv "$work/$1.tar" "$work/$1.sum" "$images/"
	echo "$images/$1.tar: localhost/$1:test"
}

nmi() {
	local image=localhost/nmi:test
	go build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=test' -o "$work/nmi" ./cmd/nmi
	if ! is_current nmi "$work/nmi" Dockerfile deploy/image/*; then
		IMAGE=$image VERSION=test LOCAL=1 ARCH='' deploy/image/build.sh >&2
		buildah push --quiet "$image" "docker-archive:$work/nmi.tar:$image"
		buildah rmi "$image" >/dev/null # the archive is enough
		publish nmi
	fi
}

# program <name>: an image of one static program of this folder.
program() {
	local container
	go build -buildvcs=false -trimpath -ldflags '-s -w' -o "$work/$1" "./deploy/clusters/$1"
	if ! is_current "$1" "$work/$1"; then
		container=$(buildah from scratch)
		buildah add --quiet "$container" "$work/$1" "/usr/bin/$1" >/dev/null
		buildah config --entrypoint "[\"/usr/bin/$1\"]" "$container"
		buildah commit --quiet --rm "$container" "docker-archive:$work/$1.tar:localhost/$1:test" >/dev/null
		publish "$1"
	fi
}

nmi
program asker
program pause
