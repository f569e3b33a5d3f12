// Package ebpf redirects pods' connections to the metadata service to the agent by programs in
// the kernel, and says which pod each connection comes from. It needs neither iptables nor
// addresses: it works where rules are forbidden or without effect, where another program
// rewrites connect(), and where pods' packets are invisible to the node.
//
// The programs (programs.c) are attached to the cgroup that the kubelet puts all pods in. The
// life of a connection:
//
//  1. A process of a pod calls connect() with the address of the metadata service. connect4
//     notes by the socket's cookie which cgroups the process is in, and puts the agent's
//     address in the place of the other.
//  2. When the client's end is established, sock_ops stores the caller by the connection's
//     initial sequence numbers, with the client's address and port and the time.
//  3. When the agent's end is established, sock_ops finds the caller by the same numbers,
//     deletes the entry, and notes the caller on the agent's socket if the address and port
//     are the same and the entry is new.
//  4. The agent accepts the connection, and Caller reads the note: cgroup, then pod. A
//     connection without one was not redirected.
//
// No pod is known by its address: one that takes that of another is known as itself.
// The egress program drops whatever else pods send to the metadata service.
//
// The life of the programs:
//
//  1. Ensure finds the cgroup of all pods, from the one that the agent's own container is in.
//  2. It pins maps and links in the BPF file system: they stay when the process ends, and redirect to
//     the agent's address whether or not an agent listens there. A newer agent gives the
//     links its own programs, each atomically, with the same maps.
//  3. Ensure is called again and again, and mends what is missing. A link whose cgroup has been
//     removed is replaced.
//  4. Cleanup removes the links, and then the maps.
package ebpf
