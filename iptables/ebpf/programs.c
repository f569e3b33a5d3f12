//go:build ignore

// The programs that run in the kernel for the sockets of all pods. They are attached to the
// cgroup that all pods' cgroups are in ("kubepods"), so each runs for sockets that were created
// below it; see doc.go for what they do together.
//
// They use no GPL-only helper, no structure of the kernel whose layout changes, and nothing
// that is newer than Linux 5.15. Addresses and ports are in network byte order, unless said
// otherwise.

#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char __license[] SEC("license") = "Dual MIT/GPL";

#define SOCK_STREAM 1
#define AF_INET 2
#define AF_INET6 10

// Set when the programs are loaded, and constant for the verifier.
volatile const __be32 metadata_addr;
volatile const __be16 metadata_port;
volatile const __be32 agent_addr;
volatile const __be16 agent_port;
volatile const __u64 kubepods_id;     // cgroup ID
volatile const __u64 host_netns;      // cookie of the node's network namespace
volatile const __u8 host_network_all; // redirect each host-network pod, and not only the bound

// A caller is named by the two cgroups below kubepods that its task is in. The pod's is the
// outer one if the pod is Guaranteed, else the inner one, in that of its QoS class. What
// cgroups a pod makes of its own are below these and do not count.
struct caller {
	__u64 outer;
	__u64 inner;
};

// The initial sequence numbers of a TCP connection, after the SYNs. Both ends know them. The
// kernel draws them (RFC 6528), but they are no secret: it draws alike in all network
// namespaces, a packet of a pod's own making has what number it likes, and a server in a pod
// may be in the agent's place. What else a connection must share with its entry: see client.
// It is one number and no structure: without CAP_PERFMON, old verifiers refuse to write two
// halves of a word to the stack, where the second "corrupts" the first (seen on 6.1;
// check_stack_write_fixed_off).
typedef __u64 handshake;

static __always_inline handshake sequence_numbers(__u32 client, __u32 server)
{
	return (__u64)server << 32 | client;
}

// An address, and a port in host byte order; one number for the same reason.
typedef __u64 endpoint;

static __always_inline endpoint address_port(__be32 addr, __u32 port)
{
	return (__u64)addr << 32 | port;
}

// What connect() has noted of a socket.
struct note {
	struct caller caller;
	__u64 direct; // it may send to the metadata service itself
};

// The notes, by the sockets' cookies, which are not used again: from connect() until the client's
// end is established. It may never be, and that is up to the pod. So what is noted costs the same
// whatever pods do: it is no storage of the socket, which the kernel would charge to the agent
// that made the map for as long as the socket lives. Many notes push each other out, the oldest
// first; a connection without one is refused.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct note);
} connecting SEC(".maps");

// A client whose end of the connection is established.
struct client {
	struct caller caller;
	endpoint local; // as it sees it
	__u64 since;    // bpf_ktime_get_ns
};

// The callers of connections that the client's end has established and the agent's end has
// not: for some microseconds. Who would take another pod's entry has to speak from that pod's
// address and port, to where the answers go, with both of its numbers, and before the entry is
// too old. A pod that talks to a server of its own which has the agent's address leaves
// entries; many of these push each other out, the oldest first.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, handshake);
	__type(value, struct client);
} clients SEC(".maps");

// How old an entry of clients may be, in nanoseconds. If the client's ACK is lost, the agent's
// end repeats its SYN-ACK after one second, and after three (TCP_TIMEOUT_INIT).
#define CLIENT_MAX_AGE 5000000000ULL

struct socket {
	struct caller caller;
	__u64 unused; // the map is that of agents before this one, too, which have a number here
	__u64 direct; // a client that may send to the metadata service itself
};

// What is known of established sockets: of those that the agent has accepted, which user space
// looks up by their descriptors, and of those that go to the metadata service itself. There are no
// more than the agent allows of the former, and than the node has ports of the latter. It ends
// with the socket.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket);
} sockets SEC(".maps");

// The cgroups that reach the metadata service: the containers of agents. User space keeps two
// at most. The value is when it was added, in nanoseconds since boot.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u64);
	__type(value, __u64);
} exempt SEC(".maps");

// The cgroups of the host-network pods that have identities of their own.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u8);
} bound SEC(".maps");

// No deeper is the cgroup of all pods.
#define MAX_LEVEL 16

// who names the caller by its task, and reports whether it is below kubepods. The level of
// kubepods is searched for: user space, in a cgroup namespace, may not see how deep it is.
static __always_inline bool who(struct caller *c)
{
	for (int level = 0; level < MAX_LEVEL; level++) {
		if (bpf_get_current_ancestor_cgroup_id(level) != kubepods_id)
			continue;
		c->outer = bpf_get_current_ancestor_cgroup_id(level + 1);
		c->inner = bpf_get_current_ancestor_cgroup_id(level + 2);
		return c->outer;
	}
	return false;
}

// goes_direct reports whether a caller on the host network may reach the metadata service itself.
static __always_inline bool goes_direct(struct caller *c)
{
	return !host_network_all && !bpf_map_lookup_elem(&bound, &c->outer) &&
	       !bpf_map_lookup_elem(&bound, &c->inner);
}

// get_note copies a socket's note. The second look-up tells whether it was this socket's still
// when it had been copied: entries of an LRU map are used again at once (prealloc_lru_pop), and
// what the first has found may have become another pod's.
static __always_inline bool get_note(__u64 cookie, struct note *copy)
{
	struct note *n = bpf_map_lookup_elem(&connecting, &cookie);

	if (!n)
		return false;
	*copy = *n;
	return bpf_map_lookup_elem(&connecting, &cookie);
}

enum verdict { PASS, REDIRECT, REFUSE };

// judge decides about a connect() to addr and port, and notes the caller. The socket may
// have come from another process: what counts is who connects it.
static __always_inline enum verdict judge(struct bpf_sock_addr *ctx, __be32 addr)
{
	bool metadata = addr == metadata_addr && ctx->user_port == metadata_port;
	// A proxy in the pod, such as a service mesh's, has seen the rewritten address.
	bool agent = addr == agent_addr && ctx->user_port == agent_port;
	struct note note = {};
	__u64 self, cookie;

	if (!metadata && !agent)
		return PASS;
	// Also MPTCP, whose protocol is another one; UDP to the metadata service is the fence's.
	if (ctx->type != SOCK_STREAM)
		return PASS;
	self = bpf_get_current_cgroup_id();
	if (bpf_map_lookup_elem(&exempt, &self))
		return PASS;
	// Somebody on the node who got hold of a pod's socket is no pod.
	if (!who(&note.caller))
		return REFUSE;
	if (metadata && bpf_get_netns_cookie(ctx) == host_netns && goes_direct(&note.caller))
		note.direct = 1;
	cookie = bpf_get_socket_cookie(ctx);
	if (bpf_map_update_elem(&connecting, &cookie, &note, BPF_ANY))
		return REFUSE;
	return note.direct ? PASS : REDIRECT;
}

SEC("cgroup/connect4")
int nmi_connect4(struct bpf_sock_addr *ctx)
{
	enum verdict v = judge(ctx, ctx->user_ip4);

	if (v == REDIRECT) {
		ctx->user_ip4 = agent_addr;
		ctx->user_port = agent_port;
	}
	return v != REFUSE;
}

// An IPv6 socket may dial ::ffff:169.254.169.254; the kernel then connects by IPv4, and does
// not run connect4 (tcp_v6_connect).
SEC("cgroup/connect6")
int nmi_connect6(struct bpf_sock_addr *ctx)
{
	enum verdict v;

	if (ctx->user_ip6[0] || ctx->user_ip6[1] || ctx->user_ip6[2] != bpf_htonl(0xffff))
		return 1;
	v = judge(ctx, ctx->user_ip6[3]);
	if (v == REDIRECT) {
		ctx->user_ip6[3] = agent_addr;
		ctx->user_port = agent_port;
	}
	return v != REFUSE;
}

// A client has had the server's SYN-ACK, and has not answered it yet (tcp_finish_connect, before
// tcp_send_ack): the server cannot have established the connection.
static __always_inline void client_established(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	// remote_port is a port in network byte order, in the upper half.
	bool agent = ctx->remote_ip4 == agent_addr && ctx->remote_port == (__u32)agent_port << 16;
	bool metadata = ctx->remote_ip4 == metadata_addr &&
			ctx->remote_port == (__u32)metadata_port << 16;
	struct client client = {};
	struct note note;
	struct socket *s;
	handshake h;
	__u64 cookie;

	if (!metadata && !agent)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	// While a link is replaced the old program may run besides, and have used the note.
	if (!get_note(cookie, &note))
		return;
	bpf_map_delete_elem(&connecting, &cookie);
	if (metadata) {
		if (!note.direct)
			return;
		s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (s) { // it may have been connected before
			s->caller = note.caller;
			s->direct = 1;
		}
		return;
	}
	client.caller = note.caller;
	client.local = address_port(ctx->local_ip4, ctx->local_port);
	client.since = bpf_ktime_get_ns();
	h = sequence_numbers(ctx->snd_una, ctx->rcv_nxt);
	// If two sockets claim one handshake, by whatever chance, neither gets it.
	if (bpf_map_update_elem(&clients, &h, &client, BPF_NOEXIST))
		bpf_map_delete_elem(&clients, &h);
}

// The agent's end has had the last part of the handshake. accept() waits for the lock that this
// runs under (tcp_child_process, inet_accept), so it sees the result.
static __always_inline void server_established(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	handshake h = sequence_numbers(ctx->rcv_nxt, ctx->snd_nxt);
	struct client *c = bpf_map_lookup_elem(&clients, &h), client;
	struct socket *s;
	bool still;

	if (!c)
		return;
	client = *c;
	still = bpf_map_lookup_elem(&clients, &h); // see get_note
	bpf_map_delete_elem(&clients, &h);
	if (!still || client.local != address_port(ctx->remote_ip4, bpf_ntohl(ctx->remote_port)) ||
	    bpf_ktime_get_ns() > client.since + CLIENT_MAX_AGE)
		return;
	s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (s)
		s->caller = client.caller;
}

SEC("sockops")
int nmi_sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		client_established(ctx, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (ctx->local_ip4 == agent_addr && ctx->local_port == bpf_ntohs(agent_port))
			server_established(ctx, sk);
		break;
	}
	return 1;
}

// The fence: whatever else a pod sends to the metadata service is dropped, by whatever socket,
// and on connections from before the programs, too. It is not asked about packets of
// AF_PACKET sockets.
SEC("cgroup_skb/egress")
int nmi_egress(struct __sk_buff *skb)
{
	struct note note;
	struct socket *s;
	struct bpf_sock *sk;
	__be32 daddr;
	__u64 self;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return 1;
	// Not by skb->data: without CAP_PERFMON, old verifiers forbid to compare that with
	// skb->data_end (seen on 5.15; check_cond_jmp_op).
	if (bpf_skb_load_bytes(skb, offsetof(struct iphdr, daddr), &daddr, sizeof(daddr)))
		return 0;
	if (daddr != metadata_addr)
		return 1;
	self = bpf_skb_cgroup_id(skb);
	if (bpf_map_lookup_elem(&exempt, &self))
		return 1;
	sk = skb->sk;
	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 0;
	s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	// Asked for each packet: the caller may have been bound since.
	if (s && s->direct && goes_direct(&s->caller))
		return 1;
	// A SYN comes before that is known.
	return get_note(bpf_get_socket_cookie(skb), &note) && note.direct &&
	       goes_direct(&note.caller);
}
