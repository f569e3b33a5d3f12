package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A new agent takes over from the one that runs on the node over a Unix socket
// in a directory that both see:
//
//	successor                  predecessor
//	connects           ──▶
//	                   ◀──     its listening sockets and its lock, one by one
//	                   ◀──     "that is all"; it goes on as if nothing were
//	syncs
//	"take"             ──▶
//	                   ◀──     "taken": it has let go of the iptables rules,
//	                           accepts no more, and closes each connection that
//	                           it has with its next answer
//	serves, keeps the rules
//
// The sockets are the same in both processes, so that no connection is refused or
// lost in between: what one does not accept the other does. The Unix connection
// stays open until one of them is told to stop, or dies. If that is the successor,
// at whatever stage, the predecessor takes everything back. No more than two take
// part: a successor offers nothing to a third agent before its own predecessor has
// ended, and the lock keeps that one out.

const (
	handoverSocket = "handover.sock"
	maxMessage     = 64 // bytes
	maxSockets     = 8
)

// What the two say to each other, a packet each. A packet that brings a file is
// the name of the flag that chooses a socket's port, or lockFile.
const (
	messageAll   = "that is all"
	messageTake  = "take"
	messageTaken = "taken"
	// To the port of a successor that listens elsewhere pods come when its rules
	// are in place; until then they are the predecessor's to accept.
	messageTakeElsewhere = "take, for another port"
)

// sockets are TCP listeners by the names of the flags that choose their ports.
type sockets map[string]*net.TCPListener

// handover gives this agent's place to a successor, and takes it back when that
// one ends.
type handover struct {
	dir    string
	lock   *os.File   // nil while it could not be had
	front  *gate      // pods come in by
	pages  []*page    // those on ports, whose listeners a successor is offered too
	retire func(bool) // end connections, or do not
	parts  []*part    // that one agent at a time may do
	begin  func(*part)
	log    *slog.Logger

	given   atomic.Bool            // away, at the moment
	trouble atomic.Pointer[string] // why no successor can come; nil when one can
}

const (
	firstPause = time.Second
	maxPause   = time.Minute
)

// run waits for successors until ctx ends.
func (h *handover) run(ctx context.Context) {
	pause := firstPause
	for h.dir != "" && ctx.Err() == nil {
		conn, err := h.await(ctx)
		if err == nil {
			pause = firstPause
			if err = h.give(ctx, conn); ctx.Err() == nil {
				h.log.Warn("the agent that was to take over has ended; this one goes on", "error", err)
			}
			continue
		}
		if ctx.Err() != nil {
			return
		}
		h.fails(err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, maxPause)
	}
}

// fails says once why no successor can come.
func (h *handover) fails(err error) {
	why := err.Error()
	if was := h.trouble.Swap(&why); was == nil || *was != why {
		h.log.Warn("no agent can take over from this one without refusing connections meanwhile; trying again", "error", err)
	}
}

// note is what /readyz says of it, in lines of their own.
func (h *handover) note() string {
	switch why := h.trouble.Load(); {
	case h.given.Load():
		return "\nanother agent has taken over; this one goes on if that ends"
	case why != nil:
		return "\nno agent can take over from this one without refusing connections meanwhile: " + *why
	default:
		return ""
	}
}

// await returns the connection of a successor. The socket is made anew each time:
// a successor that came far enough had put its own in the place.
func (h *handover) await(ctx context.Context) (_ *net.UnixConn, err error) {
	if h.lock == nil {
		if h.lock, err = lock(ctx, h.dir); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return nil, err
	}
	ln, err := listenUnix(ctx, "unixpacket", filepath.Join(h.dir, handoverSocket))
	if err != nil {
		return nil, err
	}
	defer ln.Close() //nolint:errcheck // nobody can be told
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	h.trouble.Store(nil)
	return ln.AcceptUnix()
}

// give hands over, step by step, and returns when the successor has ended, with
// everything taken back. When ctx ends first, the successor hears of it after the
// parts have ended.
func (h *handover) give(ctx context.Context, conn *net.UnixConn) error {
	defer conn.Close() //nolint:errcheck // nobody can be told
	defer func() {
		if ctx.Err() != nil {
			h.end()
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })()
	if err := h.offer(conn); err != nil {
		return fmt.Errorf("offering the sockets: %w", err)
	}
	b := make([]byte, maxMessage)
	n, err := conn.Read(b)
	if errors.Is(err, io.EOF) {
		return errors.New("it took nothing")
	}
	if err != nil {
		return err
	}
	message := string(b[:n])
	if message != messageTake && message != messageTakeElsewhere {
		return fmt.Errorf("it said %q", message)
	}
	h.end()
	if message == messageTake {
		h.front.shut()
	}
	h.retire(true)
	h.given.Store(true)
	defer func() {
		if ctx.Err() != nil {
			return
		}
		h.given.Store(false)
		h.retire(false)
		h.front.open()
		for _, p := range h.parts {
			h.begin(p)
		}
	}()
	if _, err := conn.Write([]byte(messageTaken)); err != nil {
		return err
	}
	h.log.Info("handed over; finishing what was begun")
	if _, err = conn.Read(b); !errors.Is(err, io.EOF) { // until one of us ends
		return err
	}
	return errors.New("it had taken over")
}

// end ends all parts that run.
func (h *handover) end() {
	for _, p := range h.parts {
		p.end()
	}
}

func (h *handover) offer(conn *net.UnixConn) error {
	send := func(name string, what syscall.Conn) error {
		raw, err := what.SyscallConn()
		if err != nil {
			return err
		}
		var failure error
		err = raw.Control(func(fd uintptr) {
			_, _, failure = conn.WriteMsgUnix([]byte(name), unix.UnixRights(int(fd)), nil)
		})
		return errors.Join(err, failure)
	}
	if err := send(flagPort, h.front); err != nil {
		return err
	}
	for _, p := range h.pages {
		if ln := p.tcp(); ln != nil {
			if err := send(p.flag, ln); err != nil {
				return err
			}
		}
	}
	if err := send(lockFile, h.lock); err != nil {
		return err
	}
	_, err := conn.Write([]byte(messageAll))
	return err
}
