package ebpf

// make generate writes them, with Debian's clang and headers the same bytes each time.
//go:generate go tool bpf2go -go-package ebpf -target bpfel -type caller -type socket kernel programs.c -- -O2 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
