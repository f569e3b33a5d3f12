package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	offerTimeout = 3 * time.Second
	takeTimeout  = 60 * time.Second // the predecessor may be waiting for the xtables lock
)

// predecessor is the agent that runs on this node already. A nil one has nothing
// to give.
type predecessor struct {
	conn      *net.UnixConn
	sockets   sockets
	lock      *os.File      // nil if it has none
	elsewhere bool          // pods are to come to another port than its
	taken     chan struct{} // closed when it says so
	gone      chan struct{} // closed when it has ended
}

// succeed finds the agent that runs on this node, nil for none, and what makes this one
// the owner of the node's rules. It returns errOwned where another is, and does not hand
// over.
func succeed(ctx context.Context, dir string, log *slog.Logger) (p *predecessor, owned *os.File, err error) {
	p = findPredecessor(dir, log)
	owned, err = p.ownership(ctx, dir)
	if errors.Is(err, errOwned) {
		// It may have been between two successors, or just have lost its own
		// predecessor, and not have listened yet.
		p = findPredecessor(dir, log)
		owned, err = p.ownership(ctx, dir)
	}
	return p, owned, err
}

// findPredecessor asks the agent that runs on this node for its sockets. It
// returns nil when there is none that hands over, whatever else is there: if that
// one has the ports, this agent will find out.
func findPredecessor(dir string, log *slog.Logger) *predecessor {
	if dir == "" {
		return nil
	}
	path := filepath.Join(dir, handoverSocket)
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return nil
	case err == nil:
		p := &predecessor{conn: conn, sockets: sockets{}, taken: make(chan struct{}), gone: make(chan struct{})}
		if err = p.receiveOffer(); err == nil {
			go p.listenTo()
			log.Info("another agent runs on this node; taking over from it when in sync")
			return p
		}
		p.letGo()
		_ = conn.Close()
	}
	log.Warn("whatever is there for handing over does not hand over; starting without", "path", path, "error", err)
	return nil
}

// listenTo reads what the predecessor says after its offer: "taken", and no more.
func (p *predecessor) listenTo() {
	defer close(p.gone)
	b := make([]byte, maxMessage)
	if n, err := p.conn.Read(b); err == nil && string(b[:n]) == messageTaken {
		close(p.taken)
		_, _ = p.conn.Read(b) // until one of us ends
	}
}

func (p *predecessor) receiveOffer() error {
	if err := p.conn.SetReadDeadline(time.Now().Add(offerTimeout)); err != nil {
		return err
	}
	for {
		name, f, err := p.receive()
		if err != nil {
			return err
		}
		if name == messageAll {
			return p.conn.SetReadDeadline(time.Time{})
		}
		if err := p.keep(name, f); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
}

// receive reads a packet, and the file that comes with it if one does.
func (p *predecessor) receive() (name string, f *os.File, err error) {
	b, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, rn, _, _, err := p.conn.ReadMsgUnix(b, rights)
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
	return string(b[:n]), os.NewFile(uintptr(fds[0]), "handed over"), nil
}

// keep takes a file as what its name says it is.
func (p *predecessor) keep(name string, f *os.File) error {
	if f == nil {
		return errors.New("nothing came with it")
	}
	if name == lockFile && p.lock == nil {
		p.lock = f
		return nil
	}
	defer f.Close() //nolint:errcheck // the listener has a copy
	if len(p.sockets) == maxSockets || p.sockets[name] != nil || name == lockFile {
		return errors.New("there is one already")
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return err
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		_ = ln.Close()
		return errors.New("it is not a TCP listener")
	}
	p.sockets[name] = tcp
	return nil
}

// letGo closes what was offered and nobody has taken.
func (p *predecessor) letGo() {
	p.closeUnused()
	_ = p.lock.Close()
}

// ownership returns the predecessor's lock, or one of our own where there is none.
// That it cannot be made is no reason not to start; handover.await tries again.
func (p *predecessor) ownership(ctx context.Context, dir string) (*os.File, error) {
	switch {
	case p != nil:
		return p.lock, nil
	case dir == "":
		return nil, nil // documented: there is no handover
	}
	f, err := lock(ctx, dir)
	if errors.Is(err, errOwned) {
		return nil, err
	}
	return f, nil
}

// listen returns the predecessor's listener at an endpoint, or a new one.
func (p *predecessor) listen(ctx context.Context, at endpoint) (*net.TCPListener, error) {
	if ln := p.adopt(at); ln != nil {
		return ln, nil
	}
	return listen(ctx, at)
}

// adopt returns the predecessor's listener at an endpoint; nil where it offered none
// with that very address and port.
func (p *predecessor) adopt(at endpoint) *net.TCPListener {
	if p == nil {
		return nil
	}
	ln := p.sockets[at.flag]
	if ln == nil || ln.Addr().String() != at.addr.String() {
		return nil
	}
	delete(p.sockets, at.flag)
	return ln
}

// closeUnused closes the listeners that were not adopted, so that their ports are
// free when the predecessor has ended.
func (p *predecessor) closeUnused() {
	if p == nil {
		return
	}
	p.elsewhere = p.sockets[flagPort] != nil
	for _, ln := range p.sockets {
		_ = ln.Close()
	}
	clear(p.sockets)
}

// take waits until this agent is able to serve, and then until the predecessor
// has let go of what only one may have. It returns at once when there is none any
// more, and with ctx's error when ctx ends.
func (p *predecessor) take(ctx context.Context, able <-chan struct{}) error {
	if p == nil {
		return nil
	}
	select {
	case <-able:
		message := messageTake
		if p.elsewhere {
			message = messageTakeElsewhere
		}
		_, _ = p.conn.Write([]byte(message)) // fails if it has just ended
	case <-p.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-p.taken:
		return nil
	case <-p.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(takeTimeout):
		return fmt.Errorf("the agent that runs on this node did not let go of the iptables rules in %s", takeTimeout)
	}
}

// outlive waits until the predecessor has ended, or ctx has, and reports which.
func (p *predecessor) outlive(ctx context.Context) bool {
	if p == nil {
		return true
	}
	select {
	case <-p.gone:
		return true
	case <-ctx.Done():
		return false
	}
}

// close lets the predecessor know that this agent is ending.
func (p *predecessor) close() {
	if p != nil {
		_ = p.conn.Close()
		<-p.gone
	}
}
