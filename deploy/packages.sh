#!/bin/sh
# Installs the named commands, or files, where they are missing. Each is in the Debian
# package of its own name, or of the one behind its "=".
set -eu
missing=
for command in "$@"; do
	command -v "${command%%=*}" >/dev/null || [ -e "${command%%=*}" ] || missing="$missing ${command#*=}"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
	echo "These packages are needed and not on this machine:$missing" >&2
	echo "Install them with your package manager, then run this again." >&2
	exit 1
fi
echo "installing with apt-get:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
apt-get install -y -qq --no-install-recommends $missing >/dev/null
