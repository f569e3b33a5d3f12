//go:build e2e

package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// oldNMI does what the NMI of aad-pod-identity v1.8.17 does to its node: it has the ports
// 2579, 8085 and 9090, sends pods' requests there with two rules of the chain
// aad-metadata, and checks them periodically. At SIGTERM it removes them, and serves for
// 10 more seconds (cmd/nmi/main.go, pkg/nmi/iptables, pkg/nmi/server's
// handleTermination). Every pod gets the token of one identity.
type oldNMI struct {
	identity imdstest.Identity
	stop     chan struct{} // closed by terminate
	running  sync.WaitGroup
	served   atomic.Int64
}

const (
	oldNMILinger = 10 * time.Second
	// The old NMI checks its rules every 60 s; here its fight with the agent is part of
	// each test.
	oldNMIInterval = 500 * time.Millisecond
)

// oldNMI starts one, as soon as its ports are free.
func (s *scenario) oldNMI(identity imdstest.Identity) *oldNMI {
	s.t.Helper()
	// kube-proxy allows DNAT to loopback.
	const routeLocalnet = "/proc/sys/net/ipv4/conf/all/route_localnet"
	require.NoError(s.t, os.WriteFile(routeLocalnet, []byte("1"), 0o600))
	s.t.Cleanup(func() { _ = os.WriteFile(routeLocalnet, []byte("0"), 0o600) })

	o := &oldNMI{identity: identity, stop: make(chan struct{})}
	servers := make([]*http.Server, 0, 3)
	for address, handler := range map[string]http.Handler{
		"127.0.0.1:2579": http.HandlerFunc(o.token), ":8085": http.NotFoundHandler(), ":9090": http.NotFoundHandler(),
	} {
		var ln net.Listener
		require.Eventually(s.t, func() (ok bool) {
			var err error
			ln, err = net.Listen("tcp4", address)
			return err == nil
		}, patience, 20*time.Millisecond, address)
		server := &http.Server{Handler: handler}
		servers = append(servers, server)
		o.running.Go(func() { _ = server.Serve(ln) })
	}
	o.ensureRules()
	o.running.Go(func() {
		o.checkRules()
		o.removeRules()
		time.Sleep(oldNMILinger)
		for _, server := range servers {
			_ = server.Close()
		}
	})
	s.t.Cleanup(func() {
		o.terminate()
		o.running.Wait()
		o.removeRules()
	})
	return o
}

// terminate is SIGTERM. Wait on running for the end.
func (o *oldNMI) terminate() {
	select {
	case <-o.stop:
	default:
		close(o.stop)
	}
}

func (o *oldNMI) checkRules() {
	tick := time.NewTicker(oldNMIInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			o.ensureRules()
		case <-o.stop:
			return
		}
	}
}

func iptablesNAT(args ...string) (output string, ok bool) {
	// Not what it warns of, such as tables of the other backend: the lines are counted.
	out, err := exec.Command("iptables", append([]string{"-w", "-t", "nat"}, args...)...).Output()
	return string(out), err == nil
}

// ensureRules counts the lines of its chain, and writes it anew if there are not three.
func (o *oldNMI) ensureRules() {
	rules, ok := iptablesNAT("-S", "aad-metadata")
	if !ok {
		iptablesNAT("-N", "aad-metadata")
	}
	if strings.Count(rules, "\n") != 3 {
		iptablesNAT("-F", "aad-metadata")
		iptablesNAT("-A", "aad-metadata", "-p", "tcp", "!", "-s", "127.0.0.1/32", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:2579")
		iptablesNAT("-A", "aad-metadata", "-j", "RETURN")
	}
	if _, ok := iptablesNAT("-C", "PREROUTING", "-j", "aad-metadata"); !ok {
		iptablesNAT("-I", "PREROUTING", "1", "-j", "aad-metadata")
	}
}

func (o *oldNMI) removeRules() {
	iptablesNAT("-D", "PREROUTING", "-j", "aad-metadata")
	iptablesNAT("-F", "aad-metadata")
	iptablesNAT("-X", "aad-metadata")
}

// token asks IMDS for the identity's token, as the node.
func (o *oldNMI) token(w http.ResponseWriter, r *http.Request) {
	o.served.Add(1)
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "http://"+testbed.MetadataAddress+r.URL.RequestURI()+"&client_id="+o.identity.ClientID, nil)
	if err == nil {
		req.Header.Set("Metadata", "true")
		var resp *http.Response
		if resp, err = http.DefaultClient.Do(req); err == nil {
			defer resp.Body.Close()
			w.WriteHeader(resp.StatusCode)
			_, _ = io.Copy(w, resp.Body)
			return
		}
	}
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

// askers are a pod's programs that ask for tokens all the time, and count whose they get.
type askers struct {
	own, node, foreign, refused atomic.Int64
	fresh                       atomic.Int64 // own, over a new connection
	lastRefusal                 atomic.Pointer[answer]

	cancel context.CancelFunc
	asking sync.WaitGroup
}

// startAskers begins with three programs that open a connection for each request, and one
// that keeps its own.
func startAskers(t *testing.T, p *pod, own imdstest.Identity) *askers {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	a := &askers{cancel: cancel}
	for i := range 4 {
		a.asking.Go(func() {
			client := p.Client(time.Second)
			for ctx.Err() == nil {
				got := ask(t, client, tokenURL+vault)
				switch got.subject {
				case own.ClientID:
					a.own.Add(1)
					if i > 0 {
						a.fresh.Add(1)
					}
				case imdstest.Node:
					a.node.Add(1)
				case "":
					a.refused.Add(1)
					a.lastRefusal.Store(&got)
				default:
					a.foreign.Add(1)
				}
				if i > 0 || got.status == 0 {
					client.CloseIdleConnections()
				}
			}
		})
	}
	t.Cleanup(a.end)
	return a
}

func (a *askers) end() {
	a.cancel()
	a.asking.Wait()
}

// areServed waits until the pod gets tokens of its own again, over new connections: one
// from before may be to an NMI that has removed its rules.
func (a *askers) areServed(t *testing.T) {
	t.Helper()
	before := a.fresh.Load()
	if !assert.Eventually(t, func() bool { return a.fresh.Load() > before+20 }, patience, 10*time.Millisecond) {
		require.Fail(t, "the pod gets no tokens of its own", "last refusal: %+v", a.lastRefusal.Load())
	}
}
