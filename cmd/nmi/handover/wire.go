package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// What two agents say to each other on the socket (SOCK_SEQPACKET), a packet each. Agents
// of all versions speak this: a packet may come to mean more only where the other end
// ignores the addition.
//
// A packet with a file is the name of a listener, which is that of the flag that chooses
// its port, or lockFile. A request may have a file with it, too: one end of a socket pair,
// for the tokens. An agent that knows nothing of tokens reads the packet without the file,
// and the kernel then closes it (net/core/scm.c, scm_recv).
const (
	// FrontPort is the name of the listener at which pods' connections arrive.
	FrontPort = "nmi-port"

	endOfOffer    = "that is all"
	requestDuties = "take"
	// dutiesReleased confirms a request, or comes without one from an agent that is told to
	// end. One that has not asked, and does not know that, asks all the same when it is ready.
	dutiesReleased = "taken"
	// requestOtherPort is requestDuties from an agent whose pods' port is another. Until
	// its redirect is in place, connections come to the old port, and are accepted there.
	requestOtherPort = "take, for another port"
)

const (
	handoverSocket = "handover.sock"
	maxMessage     = 64 // bytes
	maxListeners   = 8
)

// writePacket sends a packet, with a file unless that is nil.
func writePacket(conn *net.UnixConn, text string, file syscall.Conn) error {
	if file == nil {
		_, err := conn.Write([]byte(text))
		return err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(fd uintptr) {
		_, _, failure = conn.WriteMsgUnix([]byte(text), unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, failure)
}

// readPacket receives a packet, and the file that is with it, nil for none.
func readPacket(conn *net.UnixConn) (text string, file *os.File, err error) {
	b, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, rn, _, _, err := conn.ReadMsgUnix(b, rights)
	if err != nil {
		return "", nil, err
	}
	control, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil || len(control) == 0 {
		return string(b[:n]), nil, err
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil {
		return "", nil, err
	}
	return string(b[:n]), os.NewFile(uintptr(fds[0]), "received"), nil
}

// checkPeer returns an error unless the process at the other end is one that the socket's
// mode, 0600, lets in: root, or this process's own user. The kernel notes the user when
// the connection is made (unix(7), SO_PEERCRED).
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var failure error
	err = raw.Control(func(fd uintptr) {
		peer, failure = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, failure); err != nil {
		return fmt.Errorf("peer credentials: %w", err)
	}
	return allowed(peer, os.Geteuid())
}

func allowed(peer *unix.Ucred, self int) error {
	if peer.Uid == 0 || int(peer.Uid) == self {
		return nil
	}
	return fmt.Errorf("process %d of user %d is neither root nor this agent's user: nothing is handed to it", peer.Pid, peer.Uid)
}
