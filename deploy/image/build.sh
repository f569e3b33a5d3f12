#!/bin/sh
# Builds the image of the agent with buildah, or, where IMAGE_TOOL says so, docker. In the
# environment: IMAGE is its name, VERSION and ARCH (amd64 or arm64) are its; GO_IMAGE and
# DEBIAN_IMAGE are other base images.
#
# With LOCAL=1 no registry is needed: the base is bootstrapped from Debian's mirror, once, and
# Go with its modules and its build cache is this machine's.
set -eu
cd "$(dirname "$0")/../.."
ARCH=${ARCH:-$(go env GOARCH)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

set -- --platform "linux/$ARCH" --build-arg "VERSION=$VERSION" --build-arg "REVISION=$(git rev-parse HEAD)" --tag "$IMAGE" --file Dockerfile
if [ -n "${LOCAL:-}" ]; then
	GO_IMAGE=localhost/nmi-base:bookworm DEBIAN_IMAGE=localhost/nmi-base:bookworm
	if ! buildah inspect "$DEBIAN_IMAGE" >/dev/null 2>&1; then
		base=$(mktemp -d)
		mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$base/base.tar" # from its default mirrors, updates included
		container=$(buildah from scratch)
		buildah add --quiet "$container" "$base/base.tar" /
		buildah commit --quiet --rm "$container" "$DEBIAN_IMAGE"
		rm -rf "$base"
	fi
	go mod download # the build sees the modules read-only
	# buildah 1.28 does not know BUILDPLATFORM by itself.
	set -- "$@" --pull-never --build-arg "BUILDPLATFORM=linux/$(go env GOHOSTARCH)" --isolation chroot --volume "$(go env GOROOT):/usr/local/go:ro" \
		--volume "$(go env GOMODCACHE):/go/pkg/mod:ro" --volume "$(go env GOCACHE):/root/.cache/go-build"
fi
[ -z "${GO_IMAGE:-}" ] || set -- "$@" --build-arg "GO_IMAGE=$GO_IMAGE"
[ -z "${DEBIAN_IMAGE:-}" ] || set -- "$@" --build-arg "DEBIAN_IMAGE=$DEBIAN_IMAGE"
case ${IMAGE_TOOL:-buildah} in
buildah) exec buildah build --timestamp "$SOURCE_DATE_EPOCH" "$@" . ;;
docker) exec docker buildx build --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" --output type=docker,rewrite-timestamp=true "$@" . ;;
esac
