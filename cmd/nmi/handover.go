package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A new agent takes over from the one that runs on the node over a Unix socket
// in a directory that both see:
//
//	successor                  predecessor
//	connects           ──▶
//	                   ◀──     its listening sockets, one by one; it has stopped
//	                           answering probes: the successor's answers count
//	                   ◀──     "that is all"
//	syncs
//	"take"             ──▶
//	                   ◀──     "taken": it has let go of the iptables rules, and
//	                           closes each connection with its next answer
//	serves, keeps the rules
//
// The sockets are the same in both processes, so that no connection is refused or
// lost in between: what one does not accept the other does. The Unix connection
// stays open for as long as both live. If it ends, the successor has died, at
// whatever stage, and the predecessor takes everything back.

const (
	handoverSocket = "handover.sock"
	maxMessage     = 64 // bytes
	offerTimeout   = 5 * time.Second
	takeTimeout    = 60 * time.Second // the predecessor may be waiting for the xtables lock
)

// What the two say to each other, a packet each. A packet that brings a socket is
// the name of the flag that chooses its port.
var (
	messageAll   = []byte("that is all")
	messageTake  = []byte("take")
	messageTaken = []byte("taken")
)

// sockets are TCP listeners by the names of the flags that choose their ports.
type sockets map[string]*net.TCPListener

func (s sockets) close() {
	for _, ln := range s {
		_ = ln.Close()
	}
}

// predecessor is the agent that runs on this node already. A nil one has nothing
// to give.
type predecessor struct {
	conn    *net.UnixConn
	sockets sockets
	taken   chan struct{} // closed when it says so
	gone    chan struct{} // closed when it has ended
}

// findPredecessor asks the agent that runs on this node for its sockets. It
// returns nil when there is none, and an error when there is one that does not
// answer.
func findPredecessor(dir string) (*predecessor, error) {
	if dir == "" {
		return nil, nil //nolint:nilnil // documented: handover is turned off
	}
	path := filepath.Join(dir, handoverSocket)
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return nil, nil //nolint:nilnil // documented: nobody is there
	case err != nil:
		return nil, fmt.Errorf("asking for the agent that runs on this node: %w", err)
	}
	p := &predecessor{conn: conn, taken: make(chan struct{}), gone: make(chan struct{})}
	if p.sockets, err = receiveOffer(p.conn); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the agent that runs on this node does not hand over on %s: %w", path, err)
	}
	go func() {
		defer close(p.gone)
		b := make([]byte, maxMessage)
		for {
			n, err := conn.Read(b)
			if err != nil || n == 0 {
				return
			}
			if bytes.Equal(b[:n], messageTaken) {
				close(p.taken)
				break
			}
		}
		_, _ = conn.Read(b) // until one of us ends
	}()
	return p, nil
}

func receiveOffer(conn *net.UnixConn) (received sockets, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(offerTimeout)); err != nil {
		return nil, err
	}
	received = sockets{}
	defer func() {
		if err != nil {
			received.close()
		}
	}()
	for {
		b, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
		n, rn, _, _, err := conn.ReadMsgUnix(b, rights)
		if err != nil {
			return nil, err
		}
		if bytes.Equal(b[:n], messageAll) {
			return received, conn.SetReadDeadline(time.Time{})
		}
		ln, err := receiveListener(rights[:rn])
		if err != nil {
			return nil, fmt.Errorf("socket %q: %w", b[:n], err)
		}
		received[string(b[:n])] = ln
	}
}

func receiveListener(rights []byte) (*net.TCPListener, error) {
	control, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	if len(control) != 1 {
		return nil, errors.New("it did not come")
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "handed over")
	defer f.Close() //nolint:errcheck // the listener has a copy
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		_ = ln.Close()
		return nil, errors.New("it is not a TCP listener")
	}
	return tcp, nil
}

// listen returns the predecessor's socket for a flag if it has the port that is
// wanted, else a new one.
func (p *predecessor) listen(ctx context.Context, flagName string, port uint16) (*net.TCPListener, error) {
	if p != nil {
		want := netip.AddrPortFrom(netip.IPv4Unspecified(), port).String()
		if ln := p.sockets[flagName]; ln != nil && ln.Addr().String() == want {
			delete(p.sockets, flagName)
			return ln, nil
		}
	}
	return listen(ctx, flagName, port)
}

// take waits until this agent can serve, and then until the predecessor has let
// go, or has ended by itself.
func (p *predecessor) take(ctx context.Context, able <-chan struct{}) error {
	if p == nil {
		return nil
	}
	select {
	case <-able:
	case <-p.gone:
		return nil
	case <-ctx.Done():
		return nil
	}
	if _, err := p.conn.Write(messageTake); err != nil {
		return nil //nolint:nilerr // it has just ended
	}
	select {
	case <-p.taken:
	case <-p.gone:
	case <-ctx.Done():
	case <-time.After(takeTimeout):
		return fmt.Errorf("the agent that runs on this node did not let go of the iptables rules in %s", takeTimeout)
	}
	return nil
}

// close lets the predecessor know that this agent has ended, if there is one, and
// lets go of what it sent and nobody wanted.
func (p *predecessor) close() {
	if p == nil {
		return
	}
	p.sockets.close()
	_ = p.conn.Close()
	<-p.gone
}

// handover gives this agent's place to a successor, and takes it back when that
// one ends.
type handover struct {
	dir     string
	sockets sockets
	pages   []*part    // that answer for the node: the successor's do from when it has the sockets
	rules   *part      // only one agent at a time may have them
	retire  func(bool) // send connections elsewhere, or do not
	log     *slog.Logger
}

// run waits for successors until ctx ends.
func (h *handover) run(ctx context.Context) {
	if h.dir == "" {
		return
	}
	for ctx.Err() == nil {
		conn, err := h.await(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			h.log.Info("no agent can take over from this one without refusing connections meanwhile", "why", err)
			return
		}
		if err := h.give(ctx, conn); ctx.Err() == nil {
			h.log.Warn("the agent that was taking over has ended; going on in its place", "error", err)
		}
	}
}

// await returns the connection of a successor. The socket is made anew each time:
// a successor that came far enough had put its own in the place.
func (h *handover) await(ctx context.Context) (*net.UnixConn, error) {
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(h.dir, handoverSocket)
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failure error
		err := c.Control(func(fd uintptr) { failure = unix.Fchmod(int(fd), 0o600) }) // before there is a file
		return errors.Join(err, failure)
	}}
	ln, err := lc.Listen(ctx, "unixpacket", fresh)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	ln.(*net.UnixListener).SetUnlinkOnClose(false) //nolint:errcheck // by then the name may be another's
	if err := os.Rename(fresh, path); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	conn, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil //nolint:errcheck // it is one, of this listener
}

// give hands over, step by step, and returns when the successor has ended, with
// everything taken back.
func (h *handover) give(ctx context.Context, conn *net.UnixConn) error {
	defer conn.Close() //nolint:errcheck // the other side is told all the same
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	h.log.Info("another agent is taking over")

	takeBack := func(what func()) { // unless this agent is ending too
		if ctx.Err() == nil {
			what()
		}
	}
	for _, p := range h.pages {
		p.end()
		defer takeBack(func() { p.begin(ctx) })
	}
	if err := h.offer(conn); err != nil {
		return fmt.Errorf("offering the sockets: %w", err)
	}
	b := make([]byte, maxMessage)
	n, err := conn.Read(b)
	if err != nil || !bytes.Equal(b[:n], messageTake) {
		return errors.Join(err, errors.New("it took nothing"))
	}
	h.rules.end()
	defer takeBack(func() { h.rules.begin(ctx) })
	h.retire(true)
	defer takeBack(func() { h.retire(false) })
	if _, err := conn.Write(messageTaken); err != nil {
		return err
	}
	h.log.Info("handed over; finishing what was begun")
	_, err = conn.Read(b) // until one of us ends
	return err
}

func (h *handover) offer(conn *net.UnixConn) error {
	for name, ln := range h.sockets {
		raw, err := ln.SyscallConn()
		if err != nil {
			return err
		}
		var failure error
		err = raw.Control(func(fd uintptr) {
			_, _, failure = conn.WriteMsgUnix([]byte(name), unix.UnixRights(int(fd)), nil)
		})
		if err = errors.Join(err, failure); err != nil {
			return err
		}
	}
	_, err := conn.Write(messageAll)
	return err
}
