package bootguard_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/bootguard"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/iptables"
)

const patience = 30 * time.Second

var metadata = netip.MustParseAddrPort(testbed.MetadataAddress)

// execStart returns the commands of the unit that an agent keeps on its node, as systemd
// reads them from there.
func execStart(t *testing.T) (commands []string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "multi-user.target.wants"), 0o755))
	ctx, cancel := context.WithCancel(t.Context())
	guard := bootguard.New(bootguard.Config{
		Dir: dir, Commands: iptables.RoutingFence(metadata.Addr()), Interval: time.Minute, Logger: slog.New(slog.DiscardHandler),
	})
	var running sync.WaitGroup
	running.Go(func() { guard.Run(ctx) })
	enabled := filepath.Join(dir, "multi-user.target.wants", bootguard.Unit)
	require.Eventually(t, func() bool { _, err := os.Stat(enabled); return err == nil }, patience, time.Millisecond)
	cancel()
	running.Wait()

	unit, err := os.ReadFile(enabled)
	require.NoError(t, err)
	for line := range strings.Lines(string(unit)) {
		if command, ok := strings.CutPrefix(strings.TrimSpace(line), "ExecStart=-"); ok {
			commands = append(commands, command)
		}
	}
	require.NotEmpty(t, commands)
	return commands
}

// play runs commands one after the other, and returns what failed. Its thread is that of
// the caller, and so is its network namespace.
func play(commands []string) (failed []string) {
	for _, command := range commands {
		words := strings.Fields(command)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v: %s", command, err, out))
		}
	}
	return failed
}

// boot boots a node in a fresh network namespace, which runs commands before it has a
// network, and then pods that ask the metadata service from their first moment. It
// returns how many requests of pods the service was sent.
func boot(t *testing.T, commands []string, pods, requests int) (leaks int) {
	t.Helper()
	node, err := testbed.NewNamespace()
	require.NoError(t, err)
	defer func() { assert.NoError(t, node.Close()) }()
	var fromPods, fromNode atomic.Int32
	require.NoError(t, node.Do(func() error {
		assert.Empty(t, play(commands))
		network, err := testbed.NewNetwork()
		if err != nil {
			return err
		}
		defer func() { assert.NoError(t, network.Close()) }()
		ln, err := network.Metadata.Listen(testbed.MetadataAddress)
		if err != nil {
			return err
		}
		server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.RemoteAddr, testbed.NodeAddress+":") {
				fromNode.Add(1)
			} else {
				fromPods.Add(1)
			}
		})}
		go func() { _ = server.Serve(ln) }()
		defer server.Close()

		var asking sync.WaitGroup
		for i := range pods {
			pod, err := network.AddPod(fmt.Sprintf("10.244.0.%d", 10+i), testbed.Ptp)
			if err != nil {
				return err
			}
			defer func() { assert.NoError(t, pod.Close()) }()
			asking.Go(func() {
				for range requests {
					ask(pod.Namespace, 200*time.Millisecond)
				}
			})
		}
		asking.Wait()
		ask(node, patience)
		return nil
	}))
	assert.EqualValues(t, 1, fromNode.Load(), "the node itself reaches the metadata service")
	return int(fromPods.Load())
}

// ask sends one request from a namespace over a new connection.
func ask(from *testbed.Namespace, patience time.Duration) {
	client := from.Client(patience)
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token")
	if err == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}

func TestBoots(t *testing.T) {
	const boots, pods, requests = 20, 3, 3
	commands := execStart(t)
	assert.NotZero(t, boot(t, nil, pods, requests), "without the unit it leaks")
	var leaks int
	for range boots {
		leaks += boot(t, commands, pods, requests)
	}
	t.Logf("%d boots, %d requests of pods, %d leaks", boots, boots*pods*requests, leaks)
	assert.Zero(t, leaks)
}

// The agent finds the rules of the unit, keeps them, and adds none. If the unit runs again,
// that changes nothing. Cleanup leaves nothing of either.
func TestAgentTakesOver(t *testing.T) {
	commands := execStart(t)
	before := ipRules(t)
	require.Empty(t, play(commands))
	closed := ipRules(t)
	require.Equal(t, strings.Count(before, "\n")+3, strings.Count(closed, "\n"), closed)

	var log testlog.Buffer
	cfg := iptables.Config{
		Mode: iptables.Redirect, Metadata: metadata, Port: 2579, Address: iptables.DefaultAddress,
		Interval: time.Minute, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}
	rules, err := iptables.New(cfg)
	require.NoError(t, err)
	require.NoError(t, rules.Fence(t.Context()))
	assert.Contains(t, log.String(), `msg="fences put in place" rules=[guard]`, "the routing fence is there")
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { rules.Run(ctx) })
	defer func() { cancel(); running.Wait() }()
	require.Eventually(t, func() bool { return rules.Status().Err == nil }, patience, time.Millisecond)
	assert.Equal(t, closed, ipRules(t))

	assert.Len(t, play(commands), 3, "ip(8) finds that the rules exist")
	assert.Equal(t, closed, ipRules(t))
	assert.EqualValues(t, 1, rules.Stats().Repairs, "writing the redirect is the only change")
	for part, lost := range rules.Stats().Lost {
		assert.Zero(t, lost, part)
	}
	assert.NotContains(t, log.String(), "level=WARN")
	assert.NotContains(t, log.String(), "[routing", "never written")

	cancel()
	running.Wait()
	require.NoError(t, iptables.Cleanup(t.Context(), cfg))
	assert.Equal(t, before, ipRules(t))
}

// ipRules is what ip-rule(8) says of the node's rules.
func ipRules(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ip", "-4", "-details", "rule", "list").CombinedOutput()
	require.NoError(t, err, string(out))
	return string(out)
}
