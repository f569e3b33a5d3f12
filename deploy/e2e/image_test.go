//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podidentity/nmi/cmd/nmi/bootguard"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// image is the root file system of an image, and what starts programs in it.
type image struct{ root, container, mounts string }

// image skips the test if there is none: make image-test gives it.
func (s *scenario) image() image {
	s.t.Helper()
	root := os.Getenv("NMI_IMAGE_ROOT")
	if root == "" {
		s.t.Skip("NMI_IMAGE_ROOT is not set: run make image-test")
	}
	container := filepath.Join(s.t.TempDir(), "container")
	s.command("go", "build", "-o", container, "../testbed/container")
	return image{root, container, filepath.Dir(world.Kubeconfig)}
}

// launcher is the command that starts the one after it in the image.
func (i image) launcher(capabilities []string) []string {
	return []string{i.container, "-root=" + i.root, "-capabilities=" + strings.Join(capabilities, ","), "-mount=" + i.mounts}
}

// start starts the agent in the image, and removes its rules when the test ends.
func (i image) start(s *scenario, capabilities []string, flags ...string) *testbed.Agent {
	s.t.Helper()
	a, err := testbed.StartAgentIn(i.launcher(capabilities), "/usr/bin/nmi", world.Kubeconfig, flags...)
	require.NoError(s.t, err)
	s.endsWell(a)
	return a
}

// nmi runs another command of the agent's in the image, which must succeed.
func (i image) nmi(s *scenario, capabilities []string, args ...string) string {
	s.t.Helper()
	out, err := i.command(s, capabilities, "/usr/bin/nmi", args...)
	require.NoError(s.t, err, out)
	return out
}

// command runs a program in the image and returns what it prints.
func (i image) command(s *scenario, capabilities []string, program string, args ...string) (string, error) {
	s.t.Helper()
	command := append(append(i.launcher(capabilities), program), args...)
	cmd := exec.CommandContext(s.t.Context(), command[0], command[1:]...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+world.Kubeconfig)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestImage runs the agent from the image with the capabilities of the DaemonSet, and no others.
func TestImage(t *testing.T) {
	ds, err := world.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	capabilities := names(ds.Spec.Template.Spec.Containers[0].SecurityContext.Capabilities.Add)
	for _, backend := range []string{"nft", "legacy"} {
		for _, mode := range []string{"redirect", "dnat"} {
			t.Run(backend+" "+mode, func(t *testing.T) {
				s := begin(t)
				i := s.image()
				a := i.start(s, capabilities, "--iptables-backend="+backend, "--redirect-mode="+mode, "--block-wireserver")
				require.NoError(t, a.AwaitReady(t.Context()))
				p := s.pod("image-0", "10.244.0.90", testbed.Ptp, "cart")
				assert.Equal(t, answer{status: http.StatusOK, subject: cart.ClientID}, withoutBody(p.asks(vault)))
				assert.Contains(t, s.command("iptables-"+backend+"-save"), "-A aad-metadata ")
				_, text := a.Ready(t.Context())
				assert.NotContains(t, text, "permitted")
				assert.Contains(t, i.nmi(s, nil, "probe", "ready", "--probe-socket="+a.ProbeSocket), "ready")

				s.stops(a)
				i.nmi(s, capabilities, "cleanup")
				assert.NotContains(t, s.command("iptables-"+backend+"-save"), "aad-metadata")
				assert.Equal(t, http.StatusOK, p.asks(vault).status, "the node's")
				world.IMDS.Reset()
			})
		}
	}
}

// TestImageByTheManifests starts the agent, probes it and cleans up after it with the commands,
// capabilities and mounts of deploy/manifests/daemonset.yaml and deploy/cleanup.yaml. cleanup begins
// while the agent runs, as it does when Helm replaces one DaemonSet by the other.
func TestImageByTheManifests(t *testing.T) {
	s := begin(t)
	i := s.image()
	manifests, err := testbed.ReadManifests(os.DirFS(".."), "manifests/daemonset.yaml", "cleanup.yaml")
	require.NoError(t, err)
	var agent, cleanup appsv1.DaemonSet
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(manifests[0].Object, &agent))
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(manifests[1].Object, &cleanup))
	container, first, last := agent.Spec.Template.Spec.Containers[0], cleanup.Spec.Template.Spec.InitContainers[0], cleanup.Spec.Template.Spec.Containers[0]
	node, pod, units := t.TempDir(), t.TempDir(), t.TempDir()
	with := func(c corev1.Container) (image, []string) {
		i := i
		for _, m := range c.VolumeMounts {
			switch m.Name {
			case "handover":
				i.mounts += "," + node + ":" + m.MountPath
			case "probe":
				i.mounts += "," + pod + ":" + m.MountPath
			case "systemd-units":
				i.mounts += "," + units + ":" + m.MountPath
			}
		}
		return i, names(c.SecurityContext.Capabilities.Add)
	}
	inAgent, capabilities := with(container)
	command := append(inAgent.launcher(capabilities), "/usr/bin/nmi")
	for _, arg := range container.Args {
		command = append(command, strings.ReplaceAll(arg, "$(NODE_NAME)", testbed.NodeName))
	}
	program, err := testbed.StartProgram(command[0], []string{"KUBECONFIG=" + world.Kubeconfig}, command[1:]...)
	require.NoError(t, err)
	a := &testbed.Agent{Program: program, ProbeSocket: filepath.Join(pod, "probe.sock")}
	s.endsWell(a)
	require.NoError(t, a.AwaitReady(t.Context()))
	for _, probe := range []*corev1.Probe{container.LivenessProbe, container.ReadinessProbe} {
		inAgent.nmi(s, nil, probe.Exec.Command[1:]...)
	}
	p := s.pod("image-1", "10.244.0.90", testbed.Ptp, "cart")
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)

	// The boot guard is an option of the agent, and always removed.
	require.NoError(t, os.Mkdir(filepath.Join(units, "multi-user.target.wants"), 0o755))
	guard, link := filepath.Join(units, bootguard.Unit), filepath.Join(units, "multi-user.target.wants", bootguard.Unit)
	guarding, stopGuarding := context.WithCancel(t.Context())
	go bootguard.New(bootguard.Config{Dir: units, Interval: time.Minute, Logger: slog.New(slog.DiscardHandler)}).Run(guarding)
	require.Eventually(t, func() bool { _, err := os.Lstat(link); return err == nil }, patience, time.Millisecond)
	stopGuarding()

	inCleanup, capabilities := with(first)
	cleaned := make(chan string, 1)
	started := time.Now()
	go func() {
		out, err := inCleanup.command(s, capabilities, "/usr/bin/nmi", first.Args...)
		cleaned <- fmt.Sprint(out, err)
	}()
	select {
	case out := <-cleaned:
		require.Fail(t, "cleaned up beside an agent", out)
	case <-time.After(2 * time.Second):
	}
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
	world.IMDS.Reset()
	s.stops(a)
	select {
	case out := <-cleaned:
		assert.Contains(t, out, "cleaned up")
	case <-time.After(patience):
		require.Fail(t, "cleanup still waits", "%s", time.Since(started))
	}
	assert.NoFileExists(t, guard)
	for _, backend := range []string{"nft", "legacy"} {
		assert.NotRegexp(t, "aad-metadata|nmi-", s.command("iptables-"+backend+"-save"))
	}
	assert.NotRegexp(t, `(?m)^1[012]:`, s.command("ip", "rule"))
	assert.NotContains(t, s.command("ip", "address", "show", "lo"), "169.254.169.252")
	assert.Equal(t, imdstest.Node, p.asks(vault).subject)
	world.IMDS.Reset()

	// The container that runs afterwards, without any capability: it stays.
	inLast, capabilities := with(last)
	assert.Empty(t, capabilities)
	wait, err := testbed.StartProgram(inLast.launcher(nil)[0], nil, append(inLast.launcher(nil)[1:], "/usr/bin/nmi", last.Args[0])...)
	require.NoError(t, err)
	select {
	case <-wait.Done():
		require.Fail(t, "it has ended", wait.Log())
	case <-time.After(time.Second):
	}
	require.NoError(t, wait.Kill())
}

// TestCapabilities shows that each of the DaemonSet's capabilities is needed, by what fails
// without it. The agent says so at its start.
func TestCapabilities(t *testing.T) {
	for without, test := range map[string]struct {
		capabilities []string
		fails, works []string
	}{
		"NET_ADMIN": {capabilities: []string{"NET_RAW"}, fails: []string{"iptables-nft", "iptables-legacy"}},
		// iptables-legacy reads and writes tables by options of a raw socket, iptables-nft by netlink.
		"NET_RAW": {capabilities: []string{"NET_ADMIN"}, fails: []string{"iptables-legacy"}, works: []string{"iptables-nft"}},
	} {
		t.Run("without "+without, func(t *testing.T) {
			s := begin(t)
			i := s.image()
			rule := []string{"-t", "mangle", "-N", "nmi-capability"}
			for _, name := range test.fails {
				out, err := i.command(s, test.capabilities, "/usr/sbin/"+name, rule...)
				assert.Error(t, err, name)
				assert.Regexp(t, "ermission denied|Operation not permitted|must be root", out)
			}
			for _, name := range test.works {
				out, err := i.command(s, test.capabilities, "/usr/sbin/"+name, rule...)
				assert.NoError(t, err, out)
				s.command(name, "-t", "mangle", "-X", "nmi-capability")
			}
			out, err := i.command(s, test.capabilities, "/usr/bin/nmi", "--node="+testbed.NodeName, "--operation-mode=managed")
			assert.Error(t, err)
			assert.Contains(t, out, "run as root with the capabilities NET_ADMIN and NET_RAW (missing: "+without+")")
		})
	}
}

func withoutBody(a answer) answer {
	a.body = ""
	return a
}
