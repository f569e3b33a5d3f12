#!/bin/sh
# Runs the agent from an image that buildah has, with the capabilities of the DaemonSet: IMAGE is
# its name. It needs root, and what "make e2e" needs.
set -eu
cd "$(dirname "$0")/../.."
container=$(buildah from --pull-never "$IMAGE")
trap 'buildah rm "$container" >/dev/null' EXIT
NMI_IMAGE_ROOT=$(buildah mount "$container")
export NMI_IMAGE_ROOT
for label in title description source licenses version revision; do
	value=$(buildah inspect --type image --format "{{index .OCIv1.Config.Labels \"org.opencontainers.image.$label\"}}" "$IMAGE")
	[ -n "$value" ] || { echo "$IMAGE: no label $label" >&2; exit 1; }
done
megabytes=$(du -sm "$NMI_IMAGE_ROOT" | cut -f1)
echo "$IMAGE: $megabytes MB unpacked"
[ "$megabytes" -lt 40 ]
go test -tags e2e -count=1 -v -run '^(TestImage|TestCapabilities|TestImageByTheManifests)$' ./deploy/e2e
