#!/bin/sh
# files.sh <architecture> <directory>: puts into the directory what the image has besides the
# agent: iptables with both backends, the libraries that it is linked with, and certificates.
# They are unpacked from Debian's packages of that architecture, and none of them is run.
set -eu
arch=$1 root=$2
packages="iptables libxtables12 libip4tc2 libip6tc2 libmnl0 libnftnl11 libnetfilter-conntrack3 libnfnetlink0 libc6"

dpkg --add-architecture "$arch"
apt-get update -qq
work=$(mktemp -d)
cd "$work"
chown _apt . # or apt warns
for package in $packages; do
	apt-get download -qq "$package:$arch"
done
apt-get download -qq ca-certificates
for deb in *.deb; do
	name=$(dpkg-deb --field "$deb" Package)
	dpkg-deb --extract "$deb" "$work/$name"
	# For programs that look for known vulnerabilities, as in distroless images.
	mkdir -p "$root/var/lib/dpkg/status.d" "$root/usr/share/doc/$name"
	dpkg-deb --field "$deb" >"$root/var/lib/dpkg/status.d/$name"
	cp "$name/usr/share/doc/$name/copyright" "$root/usr/share/doc/$name/"
done

# iptables finds its matches and targets by the names of these files. Rules of other programs may
# have any: without its file, iptables-save fails. Those for bridges, ARP and IPv6 are left out.
lib=$(cd iptables/usr/lib && echo *-linux-gnu*)
mkdir -p "$root/usr/sbin" "$root/usr/lib/$lib/xtables" "$root/lib/$lib"
cp iptables/usr/sbin/xtables-nft-multi iptables/usr/sbin/xtables-legacy-multi "$root/usr/sbin/"
cp -P iptables/usr/lib/"$lib"/xtables/libxt_* iptables/usr/lib/"$lib"/xtables/libipt_* "$root/usr/lib/$lib/xtables/"
for backend in nft legacy; do
	for suffix in "" -save -restore; do
		ln -s xtables-$backend-multi "$root/usr/sbin/iptables-$backend$suffix"
	done
done
for suffix in "" -save -restore; do
	ln -s xtables-nft-multi "$root/usr/sbin/iptables$suffix"
done

for package in libxtables12 libip4tc2 libip6tc2 libmnl0 libnftnl11 libnetfilter-conntrack3 libnfnetlink0; do
	find "$package" -name '*.so.*' -exec cp -P {} "$root/usr/lib/$lib/" \;
done
# The loader is at the path that programs name, a link on some architectures.
(cd libc6 && find . -name 'ld-linux-*.so.*' | tar -cf - -T -) | tar -xf - -C "$root"
cp -P libc6/lib/"$lib"/libc.so.6 libc6/lib/"$lib"/libm.so.6 "$root/lib/$lib/"

mkdir -p "$root/etc/ssl/certs"
cat ca-certificates/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
# Mount points, since the root file system is read-only.
mkdir -p "$root/run/nmi" "$root/run/nmi-probe" "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
touch "$root/run/xtables.lock"
rm -rf "$work"
