package handover

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testlog"
)

// testAgent is as much of an agent as a takeover needs.
type testAgent struct {
	*Handover
	t     *testing.T
	log   testlog.Buffer
	front *Listener
	pages map[string]*net.TCPListener
	sends []string      // tokens
	ended chan bool     // what Offer returned
	stop  func()        // ends Offer
	acts  chan string   // "release" or "resume", as they happen
	ready chan struct{} // for Acquire

	mu       sync.Mutex // guards received
	received []string
}

func newTestAgent(t *testing.T, dir string) *testAgent {
	t.Helper()
	a := &testAgent{
		t: t, pages: make(map[string]*net.TCPListener), acts: make(chan string, 100), ready: make(chan struct{}),
	}
	a.Handover = New(dir, a.log.Logger())
	t.Cleanup(func() {
		if a.stop != nil {
			a.stop()
		}
		a.Close()
	})
	return a
}

// listens opens or inherits the agent's listeners.
func (a *testAgent) listens(front, page netip.AddrPort) {
	a.t.Helper()
	open := func(name string, at netip.AddrPort) *net.TCPListener {
		ln := a.Inherit(name, at)
		if ln == nil {
			var err error
			ln, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
			require.NoError(a.t, err)
		}
		a.t.Cleanup(func() { _ = ln.Close() })
		return ln
	}
	a.front = &Listener{TCPListener: open(FrontPort, front)}
	a.pages["prometheus-port"] = open("prometheus-port", page)
}

func (a *testAgent) restore(packet []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.received = append(a.received, string(packet))
	return nil
}

// offers runs Offer until stop.
func (a *testAgent) offers() {
	ctx, cancel := context.WithCancel(a.t.Context())
	a.ended = make(chan bool, 1)
	go func() {
		a.ended <- a.Offer(ctx, Duties{
			Front: a.front, Listeners: func() map[string]*net.TCPListener { return a.pages },
			Release: func() { a.acts <- "release" }, Resume: func() { a.acts <- "resume" },
			Tokens: func(send func([]byte) error) error {
				for _, token := range a.sends {
					if err := send([]byte(token)); err != nil {
						return err
					}
				}
				return nil
			},
		})
	}()
	a.stop = sync.OnceFunc(func() { cancel(); <-a.ended })
}

func (a *testAgent) does(want string) {
	a.t.Helper()
	select {
	case got := <-a.acts:
		require.Equal(a.t, want, got)
	case <-time.After(patience):
		require.Fail(a.t, "does nothing", "want %s; log:\n%s", want, a.log.String())
	}
}

func (a *testAgent) says(what string) {
	a.t.Helper()
	require.Eventually(a.t, func() bool { return strings.Contains(a.log.String(), what) }, patience, time.Millisecond, what)
}

var anyPort = netip.MustParseAddrPort("127.0.0.1:0")

// running is the first agent of a node, with its duties, that can be taken over from.
func running(t *testing.T, dir string, tokens ...string) *testAgent {
	t.Helper()
	a := newTestAgent(t, dir)
	a.sends = tokens
	require.NoError(t, a.Receive(t.Context()))
	a.listens(anyPort, anyPort)
	require.NoError(t, a.Acquire(t.Context(), nil, a.restore), "there is no other: it does not wait to be ready")
	a.offers()
	a.does("resume")
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(dir, handoverSocket))
		return err == nil
	}, patience, time.Millisecond)
	return a
}

func (a *testAgent) addrs() (front, page netip.AddrPort) {
	return netip.MustParseAddrPort(a.front.Addr().String()), netip.MustParseAddrPort(a.pages["prometheus-port"].Addr().String())
}

// accepts accepts at the front as a server does, and returns a value for each connection.
func (a *testAgent) accepts() <-chan struct{} {
	accepted := make(chan struct{}, 10)
	go func() {
		for {
			conn, err := a.front.Accept()
			if err != nil {
				return
			}
			conn.Close()
			accepted <- struct{}{}
		}
	}()
	a.t.Cleanup(func() { _ = a.front.Close() })
	return accepted
}

// dials connects to the address, and waits until one of the agents has accepted.
func dials(t *testing.T, at netip.AddrPort, accepted <-chan struct{}) {
	t.Helper()
	conn, err := net.Dial("tcp4", at.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	select {
	case <-accepted:
	case <-time.After(patience):
		require.Fail(t, "not accepted")
	}
}

func drain(acts chan string) (all []string) {
	for {
		select {
		case act := <-acts:
			all = append(all, act)
		default:
			return all
		}
	}
}
