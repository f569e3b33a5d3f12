// Package handover lets a new agent take over from the one that runs on the node
// without refusing or losing a connection, as an upgrade of the DaemonSet needs it.
//
// The life of a takeover, over a Unix socket in a directory that both agents see:
//
//	new agent                 agent that runs
//	1. connects          ──▶  checks who that is (SO_PEERCRED)
//	2. receives          ◀──  its listeners and its lock, one by one, and the end of the
//	                          list; it goes on serving
//	3. syncs, then asks  ──▶  stops what only one agent may do, accepts no more, and
//	   for the duties         closes each connection with its next response
//	4. acquires them     ◀──  confirms
//	5. restores          ◀──  what it knows: interfaces, and cached tokens
//	6. serves                 exits when Kubernetes stops it
//
// Both have the same listeners: a connection that one does not accept waits for the
// other. The Unix connection stays open until either exits. If the new agent does, at
// whatever step, the other resumes its duties at once. If Kubernetes stops the other one
// before step 3, it releases its duties and confirms that unasked, while it finishes its
// requests. No more than two agents take part: the lock keeps a third out, and an agent
// offers nothing before the one that it took over from has exited.
//
// Receive, Succeeds, Inherit, Acquire, Offer and Close are the whole of it, called in that order. Lock
// is for programs that must not run beside an agent.
package handover

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// Handover is one agent's part in takeovers: first as the new agent, then as the one
// that runs. Its methods are for one goroutine at a time, except Status.
type Handover struct {
	dir     string
	private bool // no other pod sees the directory
	log     *slog.Logger
	lock    *os.File // nil without a directory, and until it can be made

	// The agent that ran before, from Receive. Without one conn is nil, and exited closed.
	conn      *net.UnixConn
	inherited map[string]*net.TCPListener // not claimed yet, by name
	released  chan struct{}               // closed when it has released its duties
	exited    chan struct{}               // closed when it has exited

	next        *net.UnixConn          // the agent that has the duties, once this one has been told to end
	predecessor atomic.Bool            // the agent that ran before has not exited
	handedOver  atomic.Bool            // a new agent has the duties
	lastError   atomic.Pointer[string] // why no agent can take over; nil when one can
}

// aLongTimeAgo is a deadline that has passed.
var aLongTimeAgo = time.Unix(1, 0)

// beside is what an operator should know of two agents, in /readyz and in the log.
const beside = "the agent that this one took over from still runs, and until it exits each of them uses half of what Azure " +
	"allows, and no other can take over: if this is no upgrade under way, two DaemonSets run agents on this node: delete one"

var errPrivate = errors.New("--handover-dir is in the file system of this container, which no other pod sees: " +
	"mount a hostPath of the node there, as deploy/manifests/daemonset.yaml does; until then pods are refused during an upgrade")

// New returns a Handover over a directory; with dir "" there are no takeovers.
func New(dir string, log *slog.Logger) *Handover {
	h := &Handover{dir: dir, log: log, inherited: make(map[string]*net.TCPListener), released: make(chan struct{}), exited: make(chan struct{})}
	close(h.exited)
	if h.private = dir != "" && inContainerFS(dir); h.private {
		log.Warn("no agent can take over from this one", "error", errPrivate)
	}
	return h
}

// Shared returns an error that says what to do if no other pod sees a directory, so that no
// agent can take over from this container's.
func Shared(dir string) error {
	if inContainerFS(dir) {
		return errPrivate
	}
	return nil
}

// Status is what an operator should know of takeovers, a sentence; "" for nothing.
func (h *Handover) Status() string {
	switch lastError := h.lastError.Load(); {
	case h.predecessor.Load():
		return beside
	case h.handedOver.Load():
		return "another agent has taken over; this one resumes if that agent exits"
	case lastError != nil:
		return "no agent can take over from this one without refusing connections: " + *lastError
	case h.private:
		return "no agent can take over from this one: " + errPrivate.Error()
	default:
		return ""
	}
}

// Close releases the node, and tells the agent that ran before, if it is still there,
// to resume its duties: stop those of this agent first. The agent that runs from now on hears
// that it is alone.
func (h *Handover) Close() {
	_ = h.lock.Close()
	if h.next != nil {
		_ = h.next.Close()
	}
	if h.conn != nil {
		_ = h.conn.Close()
		<-h.exited
	}
	for _, ln := range h.inherited {
		_ = ln.Close()
	}
}

// expire ends what waits on the connection when ctx ends, until stop is called.
func expire(ctx context.Context, conn *net.UnixConn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(aLongTimeAgo) })
}
