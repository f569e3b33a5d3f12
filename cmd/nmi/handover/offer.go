package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	firstRetry = time.Second
	maxRetry   = time.Minute

	// exitPatience is for the agent that ran before to exit: longer than a rolling update
	// leaves it beside a pod that is ready (minReadySeconds), and than that takes to end.
	exitPatience = 10 * time.Minute
	exitReminder = 6 * time.Hour
)

// Duties are what one agent of a node does at a time, and what it hands to the next.
type Duties struct {
	// Front accepts pods' connections. It is paused while another agent does.
	Front *Listener
	// Listeners returns the others that are open, by name.
	Listeners func() map[string]*net.TCPListener
	// Release stops the duties: when it has returned, another agent may do them.
	Release func()
	// Resume does all duties again that are not being done. It is called whenever this
	// agent is alone on the node: the agent that it took over from, or the one that took
	// over from it, has exited.
	Resume func()
	// Tokens sends what the next agent's restore is called with. A packet of more than
	// 64 KiB is left out.
	Tokens func(send func(packet []byte) error) error
}

// Offer waits until the agent that ran before has exited, and then for new agents to
// take over, until ctx ends. It reports whether another agent has the duties then. They
// have been released if there is another agent that could have them.
func (h *Handover) Offer(ctx context.Context, duties Duties) (handedOver bool) {
	if !h.awaitExit(ctx) {
		duties.Release()
		return false
	}
	if ctx.Err() == nil {
		duties.Resume()
	}
	if h.dir == "" {
		<-ctx.Done()
		return false
	}
	retry := firstRetry
	for ctx.Err() == nil {
		conn, err := h.await(ctx)
		if err == nil {
			retry = firstRetry
			if err = h.serve(ctx, conn, duties); ctx.Err() == nil {
				h.log.Warn("the new agent has exited; this one keeps serving", "error", err)
			}
			continue
		}
		if ctx.Err() != nil {
			break
		}
		h.fails(err)
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
		retry = min(2*retry, maxRetry)
	}
	return h.handedOver.Load()
}

// awaitExit waits until the agent that ran before has exited, and reports whether it has: it is
// false when ctx ends first. An agent that nobody stops is logged, now and then.
func (h *Handover) awaitExit(ctx context.Context) bool {
	h.predecessor.Store(h.conn != nil)
	defer h.predecessor.Store(false)
	began := time.Now()
	overdue := time.NewTimer(exitPatience)
	defer overdue.Stop()
	for {
		select {
		case <-h.exited:
			return true
		case <-ctx.Done():
			return false
		case <-overdue.C:
			h.log.Warn(beside, "since", began.UTC().Format(time.RFC3339))
			overdue.Reset(exitReminder)
		}
	}
}

// fails logs once why no agent can take over.
func (h *Handover) fails(err error) {
	text := err.Error()
	if last := h.lastError.Swap(&text); last == nil || *last != text {
		h.log.Warn("no agent can take over from this one without refusing connections; trying again", "error", err)
	}
}

// await returns the connection of a new agent. The socket is made anew each time: a new
// agent that came far enough had put its own in the place.
func (h *Handover) await(ctx context.Context) (_ *net.UnixConn, err error) {
	if h.lock == nil {
		if h.lock, err = lockNode(ctx, h.dir); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return nil, err
	}
	ln, err := listenUnix(ctx, filepath.Join(h.dir, handoverSocket))
	if err != nil {
		return nil, err
	}
	defer ln.Close() //nolint:errcheck // nothing was written to it
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	h.lastError.Store(nil)
	return ln.AcceptUnix()
}

// serve hands over, step by step, and returns when the new agent has exited, with the
// duties resumed. When ctx ends first, they are the new agent's, and conn stays open until
// Close: there are requests under way.
func (h *Handover) serve(ctx context.Context, conn *net.UnixConn, duties Duties) error {
	offered, told := false, false // told that the duties are the new agent's
	defer func() {
		if ctx.Err() != nil {
			duties.Release()
			if offered && (told || confirmUnasked(conn) == nil) {
				h.next = conn
				h.handedOver.Store(true)
				return
			}
		}
		_ = conn.Close() // the new agent may have done so
	}()
	defer expire(ctx, conn)()
	if err := checkPeer(conn); err != nil {
		return err
	}
	if err := h.offer(conn, duties); err != nil {
		return fmt.Errorf("offering the listeners: %w", err)
	}
	offered = true
	request, tokens, err := readPacket(conn)
	defer tokens.Close() //nolint:errcheck // nil, or closed when they were sent
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("it exited before it had taken over")
	case err != nil:
		return err
	case request != requestDuties && request != requestOtherPort:
		return fmt.Errorf("unknown request %q", request)
	}
	duties.Release()
	if request == requestDuties {
		duties.Front.pause()
	}
	h.handedOver.Store(true)
	defer func() {
		if ctx.Err() != nil {
			return
		}
		h.handedOver.Store(false)
		duties.Front.resume()
		duties.Resume()
	}()
	if err := writePacket(conn, dutiesReleased, nil); err != nil {
		return err
	}
	told = true
	if tokens != nil {
		if err := sendTokens(ctx, tokens, duties.Tokens); err != nil {
			h.log.Warn("the new agent did not take all tokens; it fetches the others again", "error", err)
		}
	}
	h.log.Info("handed over; finishing the requests under way")
	if _, err = conn.Read(make([]byte, maxMessage)); !errors.Is(err, io.EOF) { // until either exits
		return err
	}
	return errors.New("it exited after it had taken over")
}

// confirmUnasked tells a new agent that did not ask for the duties yet that they are its own.
func confirmUnasked(conn *net.UnixConn) error {
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	return writePacket(conn, dutiesReleased, nil)
}

// offer sends the listeners and the lock.
func (h *Handover) offer(conn *net.UnixConn, duties Duties) error {
	if err := writePacket(conn, FrontPort, duties.Front); err != nil {
		return err
	}
	for name, ln := range duties.Listeners() {
		if err := writePacket(conn, name, ln); err != nil {
			return err
		}
	}
	if err := writePacket(conn, lockFile, h.lock); err != nil {
		return err
	}
	return writePacket(conn, endOfOffer, nil)
}
