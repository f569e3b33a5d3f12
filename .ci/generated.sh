#!/bin/sh
# Whether the compiled programs that are committed are those of their source. Other
# compilers than the one that made them make other bytes: then nothing is checked.
set -eu
cd "$(dirname "$0")/.."
deploy/packages.sh clang
case "$(clang --version)" in
*"Debian clang version 14."*) ;;
*) echo "iptables/ebpf is not compared with its source: that needs the clang of Debian 12" >&2; exit 0 ;;
esac
sums() { cat iptables/ebpf/kernel_bpfel.go iptables/ebpf/kernel_bpfel.o | sha256sum; }
before=$(sums)
make -s generate
[ "$before" = "$(sums)" ] && exit 0
echo "make generate has changed iptables/ebpf/kernel_bpfel.*: commit them with programs.c" >&2
exit 1
