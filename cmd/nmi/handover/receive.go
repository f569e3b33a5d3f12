package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	offerTimeout = 3 * time.Second
	// releaseTimeout is longer than the other agent may wait for the xtables lock.
	releaseTimeout = 60 * time.Second
)

// Receive connects to the agent that runs on this node and receives its listeners and its
// lock. Without one it locks the node itself; that the directory cannot be used is no
// error, and Offer tries again. The error says that another agent runs and does not hand
// over.
func (h *Handover) Receive(ctx context.Context) error {
	err := h.receiveOrLock(ctx)
	if errors.Is(err, errLocked) {
		// The other agent may have been between two new agents, or just have lost the one
		// that it took over from, and not have listened yet.
		err = h.receiveOrLock(ctx)
	}
	return err
}

func (h *Handover) receiveOrLock(ctx context.Context) (err error) {
	if h.dir == "" || h.connect() {
		return nil
	}
	if h.lock, err = lockNode(ctx, h.dir); errors.Is(err, errLocked) {
		return err
	}
	return nil
}

// connect receives the offer of the agent that runs on this node, and reports whether
// there is one. Whatever else is in its place is no reason not to start: if it has the
// ports, this agent will find out.
func (h *Handover) connect() bool {
	path := filepath.Join(h.dir, handoverSocket)
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return false
	case err == nil:
		if err = h.receiveOffer(conn); err == nil {
			h.conn, h.exited = conn, make(chan struct{})
			go h.listen()
			h.log.Info("another agent runs on this node; taking over from it once in sync")
			return true
		}
		h.closeInherited()
		_ = h.lock.Close()
		h.lock = nil
		_ = conn.Close()
	}
	h.log.Warn("the handover socket is not an agent's that hands over; starting without a takeover", "path", path, "error", err)
	return false
}

// listen notes what the other agent says after its offer: that it has released its
// duties, and that it has exited.
func (h *Handover) listen() {
	defer close(h.exited)
	b := make([]byte, maxMessage)
	if n, err := h.conn.Read(b); err == nil && string(b[:n]) == dutiesReleased {
		close(h.released)
		_, _ = h.conn.Read(b) // until either exits
	}
}

func (h *Handover) receiveOffer(conn *net.UnixConn) error {
	if err := checkPeer(conn); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(offerTimeout)); err != nil {
		return err
	}
	for {
		name, file, err := readPacket(conn)
		if err != nil {
			return err
		}
		if name == endOfOffer {
			return conn.SetReadDeadline(time.Time{})
		}
		if err := h.keep(name, file); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
}

// keep takes a file as what its name says it is.
func (h *Handover) keep(name string, file *os.File) error {
	if file == nil {
		return errors.New("no file came with it")
	}
	if name == lockFile && h.lock == nil {
		h.lock = file
		return nil
	}
	defer file.Close() //nolint:errcheck // the listener has a duplicate
	if len(h.inherited) == maxListeners || h.inherited[name] != nil || name == lockFile {
		return errors.New("duplicate, or too many listeners")
	}
	ln, err := net.FileListener(file)
	if err != nil {
		return err
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		_ = ln.Close()
		return errors.New("not a TCP listener")
	}
	h.inherited[name] = tcp
	return nil
}

// Succeeds reports whether another agent ran on this node when Receive was called.
func (h *Handover) Succeeds() bool { return h.conn != nil }

// Inherit returns the listener of that name from the agent that ran before, for the
// caller to close; nil if none came, or one with another address or port.
func (h *Handover) Inherit(name string, addr netip.AddrPort) *net.TCPListener {
	ln := h.inherited[name]
	if ln == nil || ln.Addr().String() != addr.String() {
		return nil
	}
	delete(h.inherited, name)
	return ln
}

func (h *Handover) closeInherited() {
	for _, ln := range h.inherited {
		_ = ln.Close()
	}
	clear(h.inherited)
}

// Acquire takes over from the agent that ran before: it waits until this agent is ready
// to serve, then until the other has released its duties, and then calls restore with
// each packet of its tokens, if that one sends any. Then the duties are this agent's. They
// are at once where there is no other agent, or where it exits or is told to meanwhile.
// Acquire returns ctx's error when ctx ends. Listeners that were not inherited by then are
// closed.
func (h *Handover) Acquire(ctx context.Context, ready <-chan struct{}, restore func(packet []byte) error) error {
	if h.conn == nil {
		return nil
	}
	request := requestDuties
	if h.inherited[FrontPort] != nil {
		request = requestOtherPort
	}
	h.closeInherited() // so that their ports are free when the other agent has exited
	select {
	case <-ready:
	case <-h.released:
		return nil
	case <-h.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	tokens, far, err := newTokenPipe()
	if err != nil {
		return err
	}
	defer tokens.Close()                  //nolint:errcheck // it was for reading
	_ = writePacket(h.conn, request, far) // fails if the other agent has just exited
	_ = far.Close()                       // tokens ends when the other agent closes its copy
	select {
	case <-h.released:
	case <-h.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(releaseTimeout):
		return fmt.Errorf("the agent that runs on this node did not release its duties, the iptables rules among them, within %s", releaseTimeout)
	}
	n, err := receiveTokens(ctx, tokens, restore)
	if err != nil {
		h.log.Warn("not all tokens came from the agent that ran before; the others will be fetched", "received", n, "error", err)
	}
	h.log.Info("took over from the agent that ran before; this one serves now")
	return nil
}
