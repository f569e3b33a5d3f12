package listener

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// established is TCP_ESTABLISHED (include/net/tcp_states.h).
const established = 1

// socketUID returns the user whose process has the socket at the remote end of a connection
// within this network namespace (sock_diag(7)). The socket must be established and open: the
// kernel reports user 0 for a closed one (inet_diag.c, inet_twsk_diag_fill), and for one that
// no process has any more, which has no inode either.
func socketUID(remote, local net.Addr) (uint32, error) {
	from, to := tcpAddr(remote), tcpAddr(local)
	if !from.Addr().Is4() || !to.Addr().Is4() {
		return 0, errors.New("not a TCP connection over IPv4")
	}
	// Not a dump (NLM_F_DUMP, as in netlink.SocketGet), which goes through all sockets of the
	// node and matches ports only.
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.AddData(diagRequest{from, to})
	answers, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	switch {
	case err != nil:
		return 0, err
	case len(answers) != 1 || len(answers[0]) < diagMessageLen:
		return 0, errors.New("the kernel did not answer with one socket")
	}
	// struct inet_diag_msg (include/uapi/linux/inet_diag.h)
	state, uid, inode := answers[0][1], binary.NativeEndian.Uint32(answers[0][64:]), binary.NativeEndian.Uint32(answers[0][68:])
	if state != established || inode == 0 {
		return 0, errors.New("the socket at the other end is closed")
	}
	return uid, nil
}

const (
	diagRequestLen = 56
	diagMessageLen = 72
)

// diagRequest asks for one socket by its addresses: struct inet_diag_req_v2.
type diagRequest struct{ from, to netip.AddrPort }

// Len implements nl.NetlinkRequestData.
func (diagRequest) Len() int { return diagRequestLen }

// Serialize implements nl.NetlinkRequestData.
func (d diagRequest) Serialize() []byte {
	b := make([]byte, diagRequestLen)
	b[0], b[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[8:], d.from.Port())
	binary.BigEndian.PutUint16(b[10:], d.to.Port())
	copy(b[12:], d.from.Addr().AsSlice())
	copy(b[28:], d.to.Addr().AsSlice())
	for i := range 8 { // no cookie: INET_DIAG_NOCOOKIE, twice
		b[48+i] = 0xff
	}
	return b
}

func tcpAddr(a net.Addr) netip.AddrPort {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return netip.AddrPortFrom(tcp.AddrPort().Addr().Unmap(), tcp.AddrPort().Port())
	}
	return netip.AddrPort{}
}
