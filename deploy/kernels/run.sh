#!/bin/bash
# Runs the tests of iptables/ebpf on kernels of Debian's and Ubuntu's, each in a virtual
# machine of qemu's that has nothing else: an init, the compiled tests, and what they call. The
# machines have no network. Packages are only unpacked, in .cache/kernels, where they are kept;
# remove it for newer ones.
#
# KERNELS="bookworm noble" takes some only, RUN=<regexp> some tests. Debian's packages come from the
# mirror that apt has here, or DEBIAN_MIRROR=<URL>; Ubuntu's from UBUNTU_MIRROR=<URL>, without which
# its kernels are left out. Without /dev/kvm, qemu interprets, and each kernel takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=$PWD/.cache/kernels
debian=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Label: Debian' | head -n 1)}
ubuntu=${UBUNTU_MIRROR:-}
limit=1800 # seconds for one kernel

# The distribution and a package that depends on the newest image of a kernel. Those of Ubuntu
# are the ones that AKS's nodes run.
kernel() {
	case $1 in
	jammy) echo "ubuntu jammy-updates linux-image-azure-lts-22.04" ;;
	bookworm) echo "debian bookworm linux-image-cloud-amd64" ;;
	noble) echo "ubuntu noble-updates linux-image-azure-lts-24.04" ;;
	trixie) echo "debian trixie linux-image-cloud-amd64" ;;
	trixie-backports) echo "debian trixie-backports linux-image-cloud-amd64" ;;
	*) echo "unknown kernel $1" >&2; return 1 ;;
	esac
}
KERNELS=${KERNELS:-${ubuntu:+jammy noble} bookworm trixie trixie-backports}

# What the machines load, where it is not built in: tcp_diag is what the agent needs, which kernels
# on nodes load by themselves; the others are for the tests.
modules="tcp_diag veth bridge nf_tables nft_compat nft_counter nft_chain_nat xt_REDIRECT xt_owner xt_tcpudp"

# packages runs a program of apt's for one suite, apart from the machine's own packages.
packages() { # <distribution> <suite> <program> <argument>...
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror=$debian state=$cache/apt/$2
	if [ "$1" = ubuntu ]; then
		mirror=$ubuntu keyring=$cache/keyring/usr/share/keyrings/ubuntu-archive-keyring.gpg
	fi
	if [ ! -d "$state" ]; then
		mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
		echo "deb [arch=amd64 signed-by=$keyring] $mirror $2 main" >"$state/sources.list"
		packages "$1" "$2" apt-get update -qq
	fi
	"$3" -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$state/lists" \
		-o Dir::Cache="$state/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root "${@:4}"
}

# unpack downloads packages and unpacks them into a directory.
unpack() { # <directory> <distribution> <suite> <package>...
	mkdir -p "$1"
	(cd "$1" && packages "$2" "$3" apt-get download -qq "${@:4}" && for deb in *.deb; do dpkg-deb --extract "$deb" . && rm "$deb"; done)
}

# depends names the packages that one depends on, as far as they match a pattern.
depends() { packages "$1" "$2" apt-cache depends "$3" | sed -nE "s/^ *Depends: ($4)\$/\1/p"; }

# fetch unpacks a kernel and its modules into the directory of its name.
fetch() { # <kernel> <distribution> <suite> <package>
	[ ! -d "$cache/$1" ] || return 0
	if [ "$2" = ubuntu ] && [ ! -d "$cache/keyring" ]; then
		unpack "$cache/keyring" debian trixie ubuntu-keyring
	fi
	local image rest
	image=$(depends "$2" "$3" "$4" 'linux-image-[0-9].*')
	rest=$(depends "$2" "$3" "$image" 'linux-(modules|binary)-[0-9].*')
	rm -rf "$cache/$1.new"
	# shellcheck disable=SC2086 # one word a package
	unpack "$cache/$1.new" "$2" "$3" "$image" $rest
	mv "$cache/$1.new" "$cache/$1"
}

# add copies a program into the directory of a root file system, with its libraries.
add() { # <root> <program> <name>
	install -D "$2" "$1/$3"
	ldd "$2" 2>/dev/null | grep -oE '/[^ ]+' | while read -r library; do install -D "$library" "$1/$library"; done || true
}

# pack makes the initramfs of a kernel: what all have in common, and its modules in the order in
# which they are loaded.
pack() { # <kernel> <version>
	local root=$cache/root base=$cache/$1 n=100
	[ -d "$base/lib/modules" ] || base=$base/usr
	depmod -b "$base" "$2" 2>/dev/null
	rm -rf "$root/modules" && mkdir "$root/modules"
	# shellcheck disable=SC2086 # one word a module
	modprobe -d "$base" -S "$2" --show-depends -a $modules 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r module; do
		n=$((n + 1))
		case $module in
		*.xz) xz -dc "$module" ;;
		*.zst) zstd -dqc "$module" ;;
		*) cat "$module" ;;
		esac >"$root/modules/$n-$(basename "${module%.ko*}").ko"
	done || true # those that it does not have: the tests will say
	(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$cache/initramfs.gz"
}

# boot runs a kernel. On a busy machine, an interpreter is too slow for its check of the timer.
boot() { # <vmlinuz>
	local accel=tcg
	[ ! -w /dev/kvm ] || accel=kvm
	timeout "$limit" qemu-system-x86_64 -accel "$accel" -cpu max,la57=off -smp 2 -m 1G -nodefaults -display none -no-reboot -serial stdio \
		-kernel "$1" -initrd "$cache/initramfs.gz" -append "console=ttyS0 quiet panic=-1 no_timer_check -- ${RUN:-}" </dev/null | tr -d '\r'
}

mkdir -p "$cache/logs"
rm -rf "$cache/root" && mkdir -p "$cache/root"/{bin,dev,mnt,proc,sys,tmp}
add "$cache/root" "$(command -v busybox)" bin/busybox
add "$cache/root" "$(readlink -f "$(command -v iptables-nft)")" bin/iptables-nft
for plugin in /usr/lib/*/xtables/lib{xt_standard,xt_owner,xt_tcp,xt_REDIRECT,ipt_REDIRECT}.so; do
	[ ! -e "$plugin" ] || install -D "$plugin" "$cache/root/$plugin"
done
install deploy/kernels/init "$cache/root/init"
CGO_ENABLED=0 go test -c -ldflags '-s -w' -o "$cache/root/ebpf.test" ./iptables/ebpf

failed=
for name in $KERNELS; do
	source=$(kernel "$name")
	# shellcheck disable=SC2086 # three words
	fetch "$name" $source
	vmlinuz=$(find "$cache/$name" -name 'vmlinuz*' -print -quit)
	version=$(basename "$(find "$cache/$name" -path '*/lib/modules/*' -prune -print -quit)")
	pack "$name" "$version"
	echo "== $name: Linux $version"
	boot "$vmlinuz" | tee "$cache/logs/$name" | grep -E '^ *--- ' || true
	grep -qx 'exit code 0' "$cache/logs/$name" || failed="$failed $name"
done
[ -z "$failed" ] || { echo "failed on$failed: see $cache/logs" >&2; exit 1; }
