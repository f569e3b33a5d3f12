//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The pages' ports, as the testbed starts agents.
const (
	probePort   = 8085
	metricsPort = 9090
)

// page is what a client gets of a page of the node; status 0 when nothing.
func page(client *http.Client, address string, port int, path string) (status int, body string) {
	resp, err := client.Get("http://" + net.JoinHostPort(address, strconv.Itoa(port)) + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(b)
}

// flood opens TCP connections from the pod to a port of the node, sends a request on
// each that is cut short or whole, reads nothing, and returns the function that closes
// them.
func (p *pod) flood(port, n int, request string) (closeAll func()) {
	p.t.Helper()
	fds := make([]int, 0, n)
	require.NoError(p.t, p.Do(func() error {
		to := &unix.SockaddrInet4{Port: port, Addr: [4]byte(net.ParseIP(testbed.NodeAddress).To4())}
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<10)
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 100_000})
			if unix.Connect(fd, to) == nil { // or it is reset, or the backlog is full
				_ = unix.Sendto(fd, []byte(request), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
			}
		}
		return nil
	}))
	return func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
}

// TestAPodCannotKillTheAgentByItsPages has the memory limit of the manifest in force.
func TestAPodCannotKillTheAgentByItsPages(t *testing.T) {
	const connections, mostMemory = 10_400, 100 << 20
	for name, tc := range map[string]struct{ request, path string }{
		"half-sent requests": {"GET / HTTP/1.1\r\nHost: " + strings.Repeat("h", 2000), ""},
		"tiny headers":       {"GET / HTTP/1.1\r\n" + strings.Repeat("a:\n", 1300), ""},
		"unread answers":     {"GET %s HTTP/1.1\r\nHost: node\r\n\r\n", ""},
	} {
		for page1, port := range map[string]int{"/readyz": probePort, "/metrics": metricsPort} {
			t.Run(fmt.Sprintf("%s, port %d", name, port), func(t *testing.T) {
				s := begin(t)
				bad := s.network("10.244.0.21", testbed.Ptp)
				good := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
				a, limit := s.limitedAgent()

				ctx, stop := context.WithCancel(t.Context())
				var scraping sync.WaitGroup
				scrapes, failed, slowest := 0, "", time.Duration(0)
				scraping.Go(func() {
					client := good.Client(10 * time.Second)
					for ctx.Err() == nil {
						start := time.Now()
						if status, text := page(client, testbed.NodeAddress, port, page1); status != http.StatusOK {
							failed = text
						}
						slowest = max(slowest, time.Since(start))
						scrapes++
					}
				})
				request := tc.request
				if strings.Contains(request, "%s") {
					request = fmt.Sprintf(request, page1)
				}
				start := time.Now()
				closeAll := bad.flood(port, connections, request)
				flooded := time.Since(start)
				select { // more than the agent gives such a request
				case <-a.Done():
				case <-time.After(3 * time.Second):
				}
				stop()
				scraping.Wait()
				closeAll()
				kills, err := limit.OOMKills()
				require.NoError(t, err)
				peak, err := limit.Peak()
				require.NoError(t, err)
				t.Logf("%d connections in %s: %d OOM kills, peak %.1f MiB; %d scrapes meanwhile, slowest %s", connections, flooded, kills, float64(peak)/(1<<20), scrapes, slowest)
				assert.Zero(t, kills)
				assert.Less(t, peak, int64(mostMemory))
				assert.Empty(t, failed)
				assert.Greater(t, scrapes, 10)
				assert.Equal(t, cart.ClientID, good.asks(vault).subject)
			})
		}
	}
}

func (s *scenario) listens(address string, port int) net.Listener {
	s.t.Helper()
	ln, err := net.Listen("tcp4", fmt.Sprintf("%s:%d", address, port))
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// readyWith waits until the agent is ready, and returns what it says then.
func readyWith(t *testing.T, a *testbed.Agent) string {
	t.Helper()
	require.NoError(t, a.AwaitReady(t.Context()))
	_, text := a.Ready(t.Context())
	return text
}

func TestTakenPagePortsEndNothing(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	probes, metrics := s.listens("0.0.0.0", probePort), s.listens("127.0.0.1", metricsPort)
	a := s.agentNotReady()
	text := readyWith(t, a)
	assert.Contains(t, text, "--http-probe-port cannot be served; trying again: port 8085 is taken")
	assert.Contains(t, text, "--prometheus-port cannot be served; trying again: port 9090 is taken")
	assert.Contains(t, s.nat(), "-A aad-metadata")
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
	assert.Equal(t, 2, strings.Count(a.Log(), "level=WARN"), a.Log())

	// A successor is given what there is, and tries for the rest itself.
	b := s.successor()
	_, text = b.Ready(t.Context())
	assert.Contains(t, text, "port 8085 is taken")
	s.stops(a)
	require.NoError(t, probes.Close())
	require.NoError(t, metrics.Close())
	local := &http.Client{Timeout: patience}
	for port, path := range map[int]string{probePort: "/readyz", metricsPort: "/metrics"} {
		require.Eventually(t, func() bool {
			status, _ := page(local, "127.0.0.1", port, path)
			return status == http.StatusOK
		}, 2*patience, 20*time.Millisecond, path) // the pauses grow
	}
	_, text = b.Ready(t.Context())
	assert.NotContains(t, text, "trying again")
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
}

func TestUnusableAddressesAndSocketsOfPagesEndNothing(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	dir := t.TempDir()
	a := s.agentNotReady("--metrics-address=192.0.2.9", "--probe-socket="+dir+"/none/probe.sock", "--http-probe-address=127.0.0.1")
	local := &http.Client{Timeout: patience}
	var text string
	require.Eventually(t, func() bool {
		var status int
		status, text = page(local, "127.0.0.1", probePort, "/readyz")
		return status == http.StatusOK
	}, patience, 20*time.Millisecond)
	assert.Contains(t, text, "--prometheus-port cannot be served; trying again: 192.0.2.9 is not an address of this node")
	assert.Contains(t, text, "--probe-socket cannot be served; trying again: listen unix "+dir+"/none/probe.sock")
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
	status, _ := page(p.Client(time.Second), testbed.NodeAddress, probePort, "/readyz")
	assert.Zero(t, status, "on loopback alone")

	require.NoError(t, exec.Command("ip", "address", "add", "192.0.2.9/32", "dev", "lo").Run())
	t.Cleanup(func() { assert.NoError(t, exec.Command("ip", "address", "delete", "192.0.2.9/32", "dev", "lo").Run()) })
	require.NoError(t, exec.Command("mkdir", dir+"/none").Run())
	require.Eventually(t, func() bool {
		status, text = page(local, "192.0.2.9", metricsPort, "/metrics")
		code, _ := s.nmi("probe", "ready", "--probe-socket="+dir+"/none/probe.sock")
		return status == http.StatusOK && code == 0
	}, 2*patience, 20*time.Millisecond)
	s.stops(a)
}

// TestAddressOfThePagesChangesWithTheSuccessor is what an upgrade from the manifest
// without --http-probe-address does.
func TestAddressOfThePagesChangesWithTheSuccessor(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	outside := p.Client(time.Second)
	status, _ := page(outside, testbed.NodeAddress, probePort, "/readyz")
	require.Equal(t, http.StatusOK, status)
	l := startLoad(p, 2, 2)
	b := s.successor("--http-probe-address=127.0.0.1")
	_, text := b.Ready(t.Context())
	assert.Contains(t, text, "port 8085 is taken", "its predecessor's")
	start := time.Now()
	s.stops(a)
	require.Eventually(t, func() bool {
		status, _ := page(&http.Client{Timeout: time.Second}, "127.0.0.1", probePort, "/readyz")
		return status == http.StatusOK
	}, patience, 10*time.Millisecond)
	t.Logf("served %s after its predecessor was stopped", time.Since(start))
	status, _ = page(outside, testbed.NodeAddress, probePort, "/readyz")
	assert.Zero(t, status)
	l.losesNothing(t)
}
