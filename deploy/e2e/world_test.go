//go:build e2e

// Package e2e runs the agent's real binary against real parts: the kernel's
// namespaces and iptables, a kube-apiserver with etcd, the project's manifests.
// Only Azure is a stand-in, at its own address. The scenarios are in
// scenarios_test.go, robustness_test.go, pages_test.go, handover_test.go and
// handover_trouble_test.go; this file builds their world.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// Identities that the node's virtual machine carries.
var (
	cart   = imdstest.Identity{ClientID: "ca470000-0000-4000-8000-000000000001", ObjectID: "ca470000-0b1e-4000-8000-000000000001", ResourceID: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/cart"}
	report = imdstest.Identity{ClientID: "4e904700-0000-4000-8000-000000000002", ResourceID: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/report"}
	third  = imdstest.Identity{ClientID: "74b1d000-0000-4000-8000-000000000003", ResourceID: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/third"}
)

const imdsLatency = 20 * time.Millisecond

// patience is for what must happen, on a machine that is busy with other things, too.
const patience = 30 * time.Second

// world is shared by the scenarios, each of which has pods of its own.
var world *testbed.World

func TestMain(m *testing.M) {
	if err := testbed.EnterNode(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	var err error
	world, err = testbed.NewWorld(ctx, imdstest.Config{
		Identities: []imdstest.Identity{cart, report, third},
		Latency:    imdsLatency,
	})
	if err == nil {
		err = world.CreateNamespace(ctx, "shop")
	}
	if err == nil {
		err = world.Bind(ctx, "shop", "cart", cart)
	}
	if err == nil {
		err = world.Bind(ctx, "shop", "report", report)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: building the world:", err)
		return 1
	}
	defer func() {
		if err := world.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: taking the world down:", err)
			code = 1
		}
	}()
	return m.Run()
}

// scenario is one test's part of the world.
type scenario struct {
	t    *testing.T
	pods *kubepods // of agents in mode ebpf; else nil
}

// The redirects that scenarios may be run with: the rules that mode auto chooses, and programs.
const (
	byRules    = "iptables"
	byPrograms = "ebpf"
)

var redirects = []string{byRules, byPrograms}

// beginWith is begin for agents and pods of one of redirects.
func beginWith(t *testing.T, redirect string) *scenario {
	t.Helper()
	s := begin(t)
	if redirect == byPrograms {
		s.pods = s.kubepods()
	}
	return s
}

// begin starts a scenario with an empty record at the metadata service. At its
// end no pod must have reached that service past the agent.
func begin(t *testing.T) *scenario {
	t.Helper()
	world.IMDS.Reset()
	t.Cleanup(func() { assert.Empty(t, world.Leaks(), "requests that reached IMDS past the agent") })
	return &scenario{t: t}
}

// within is a part of the scenario that is a test of its own.
func (s *scenario) within(t *testing.T) *scenario {
	t.Helper()
	return &scenario{t: t, pods: s.pods}
}

// agent starts the agent and waits until it is ready. When the test ends the
// agent is stopped, must have exited with 0, and its rules are removed.
func (s *scenario) agent(flags ...string) *testbed.Agent {
	s.t.Helper()
	a := s.agentNotReady(flags...)
	require.NoError(s.t, a.AwaitReady(s.t.Context()))
	return a
}

func (s *scenario) agentNotReady(flags ...string) *testbed.Agent {
	s.t.Helper()
	var a *testbed.Agent
	if s.pods != nil {
		a = s.pods.starts(flags...)
	} else {
		var err error
		a, err = testbed.StartAgent(world.Kubeconfig, flags...)
		require.NoError(s.t, err)
	}
	s.endsWell(a)
	return a
}

// endsWell stops the agent when the test ends, if it still runs; it must exit with 0.
// Then its rules are removed.
func (s *scenario) endsWell(a *testbed.Agent) {
	s.t.Helper()
	noUnits := s.t.TempDir() // instead of this machine's own
	s.t.Cleanup(func() {
		select {
		case <-a.Done():
		default:
			code, err := a.Stop()
			assert.NoError(s.t, err)
			assert.Zero(s.t, code, "exit code; the agent's log:\n%s", a.Log())
		}
		if s.t.Failed() {
			s.t.Log("the agent's log:\n" + a.Log())
		}
		s.nmi("cleanup", "--boot-guard-dir="+noUnits)
	})
}

// nmi runs the binary with other arguments and returns what it prints.
func (s *scenario) nmi(args ...string) (code int, output string) {
	s.t.Helper()
	code, output, err := testbed.RunAgent(nil, args...)
	require.NoError(s.t, err)
	return code, output
}

// nat is the node's nat table, as iptables-save shows it.
func (s *scenario) nat() string { return s.command("iptables-save", "-t", "nat") }

// command runs a command of the node and returns what it prints.
func (s *scenario) command(name string, args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.t.Context(), name, args...).CombinedOutput()
	require.NoError(s.t, err, string(out))
	return string(out)
}

// pod makes a pod of namespace shop, object and network both. Its label
// aadpodidbinding is the given one.
func (s *scenario) pod(name, addr string, shape testbed.Shape, binding string) *pod {
	s.t.Helper()
	p := s.network(addr, shape)
	p.name = name
	s.object("shop", name, addr, map[string]string{"aadpodidbinding": binding})
	if s.pods != nil {
		c, err := s.pods.NewContainer(s.pods.uid("shop", name), p.Namespace)
		require.NoError(s.t, err)
		p.Enter(c)
	}
	return p
}

// network connects a pod's namespace until the test ends.
func (s *scenario) network(addr string, shape testbed.Shape) *pod {
	s.t.Helper()
	p, err := world.AddPod(addr, shape)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, p.Close()) })
	return &pod{Pod: p, t: s.t}
}

// object makes a pod's object until the test ends.
func (s *scenario) object(namespace, name, addr string, labels map[string]string) {
	s.t.Helper()
	require.NoError(s.t, world.CreatePod(s.t.Context(), namespace, name, addr, labels))
	s.t.Cleanup(func() { _ = world.DeletePod(context.Background(), namespace, name) }) // may be gone already
}

// pod asks for tokens from its namespace.
type pod struct {
	*testbed.Pod
	t    *testing.T
	name string // of its object; "" if it has none
}

// answer is what the pod hears; status 0 when it hears nothing.
type answer struct {
	status     int
	subject    string // whose token it is; "" for none
	retryAfter string
	body       string
}

const tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="

const vault = "https://vault.azure.net"

// asks sends one request for a token of the resource, over a new connection.
func (p *pod) asks(resource string) answer {
	return p.get(tokenURL+resource, patience)
}

// probes asks for a vault token with the patience of an SDK's probe.
func (p *pod) probes() answer { return p.get(tokenURL+vault, time.Second) }

func (p *pod) get(url string, patience time.Duration) answer {
	client := p.Client(patience)
	defer client.CloseIdleConnections()
	return ask(p.t, client, url)
}

func ask(t *testing.T, client *http.Client, url string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if !assert.NoError(t, err) {
		return answer{}
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{body: err.Error()}
	}
	var in struct {
		Token string `json:"access_token"`
	}
	_ = json.Unmarshal(body, &in) // what passes through need not be ours
	return answer{
		status: resp.StatusCode, subject: imdstest.Subject(in.Token),
		retryAfter: resp.Header.Get("Retry-After"), body: string(body),
	}
}
