package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/iptables"
)

func TestChecks(t *testing.T) {
	var fine Report
	t.Run("healthy", func(t *testing.T) { n := newNode(t); fine = Run(t.Context(), n.cfg, Silent{}) })
	for name, s := range situations {
		t.Run(name, func(t *testing.T) {
			report := fine
			if s.breaks != nil {
				n := newNode(t)
				s.breaks(n)
				report = Run(t.Context(), n.cfg, Silent{})
			}
			found := about(t, report, s.anchor)
			assert.Equal(t, s.result, found[0].Result, "%+v", found[0])
			if s.result == Success {
				assert.Contains(t, found[0].Description, s.says)
				assert.Empty(t, found[0].Error)
			} else {
				assert.Contains(t, found[0].Error, s.says)
			}
		})
	}
}

// about returns the results that have an anchor.
func about(t *testing.T, report Report, anchor string) (found []Result) {
	t.Helper()
	for _, category := range report.Categories {
		for _, r := range category.Checks {
			if r.Hint == hintPage+anchor {
				found = append(found, r)
			}
		}
	}
	require.NotEmpty(t, found, "no check has the hint %s", anchor)
	return found
}

func TestPrivilegesAreMissing(t *testing.T) {
	n := newNode(t)
	var report Report
	require.NoError(t, powerless(func() error {
		report = Run(t.Context(), n.cfg, Silent{})
		return nil
	}))
	for anchor, result := range map[string]string{"privileges": Error, "backend": Skipped, "writable": Skipped, "guard": Skipped, "earlier-rules": Skipped} {
		found := about(t, report, anchor)[0]
		assert.Equal(t, result, found.Result, anchor)
		assert.Contains(t, found.Error, "NET_ADMIN", anchor)
	}
}

// powerless runs fn on a thread without capabilities.
func powerless(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		err := unix.Capset(&header, &none[0])
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

func TestConnect4(t *testing.T) {
	parent, child := ownCgroup(t)
	found, err := otherConnect4([]string{"/proc", child})
	require.NoError(t, err)
	assert.Empty(t, found)

	detach := attachConnect4(t, parent, "cil_sock4")
	found, err = otherConnect4([]string{child})
	require.NoError(t, err)
	assert.Equal(t, "Cilium's alone: cil_sock4", found)
	detach()

	attachConnect4(t, parent, "redirect_imds")
	_, err = otherConnect4([]string{child})
	assert.ErrorAs(t, err, new(warning))
	assert.ErrorContains(t, err, "attached to connect4 of "+child+" or above: redirect_imds")

	err = powerless(func() error {
		_, err := otherConnect4([]string{child})
		return err
	})
	assert.ErrorAs(t, err, new(skipped))
	assert.ErrorContains(t, err, "needs CAP_BPF")
}

// A check that fails is repeated until it does not, or until the time is over.
func TestWait(t *testing.T) {
	attempts := 0
	c := check{anchor: "x", run: func(context.Context) (string, error) {
		attempts++
		if attempts < 3 {
			return "", errors.New("not yet")
		}
		return "now", nil
	}}
	assert.Equal(t, Success, c.repeat(t.Context(), time.Now().Add(time.Minute)).Result)
	assert.Equal(t, 3, attempts)
	attempts = 0
	assert.Equal(t, Error, c.repeat(t.Context(), time.Now()).Result)
	assert.Equal(t, 1, attempts, "without --wait")
	for _, err := range []error{warnf("x"), skipf("x")} {
		attempts = 0
		c.run = func(context.Context) (string, error) { attempts++; return "", err }
		c.repeat(t.Context(), time.Now().Add(time.Minute))
		assert.Equal(t, 1, attempts, "only what fails is repeated")
	}
}

func TestSkew(t *testing.T) {
	at := time.Date(2026, 11, 27, 12, 0, 0, 500e6, time.UTC)
	for after, fine := range map[time.Duration]bool{
		0: true, -500 * time.Millisecond: true, 9 * time.Second: true, -10 * time.Second: true, 12 * time.Second: false, -12 * time.Second: false,
	} {
		_, err := skew(at, at.Add(100*time.Millisecond), at.Add(after).Truncate(time.Second))
		assert.Equal(t, fine, err == nil, "%s: %v", after, err)
	}
}

// attachConnect4 attaches a program that changes nothing to a cgroup, until the test ends or
// detach is called.
func attachConnect4(t *testing.T, dir, name string) (detach func()) {
	t.Helper()
	program, err := loadConnect4(name)
	require.NoError(t, err)
	cgroup, err := os.Open(dir)
	require.NoError(t, err)
	require.NoError(t, progAttach(unix.BPF_PROG_ATTACH, cgroup, program))
	done := false
	detach = func() {
		if !done {
			done = true
			assert.NoError(t, progAttach(unix.BPF_PROG_DETACH, cgroup, program))
			assert.NoError(t, errors.Join(cgroup.Close(), unix.Close(program)))
		}
	}
	t.Cleanup(detach)
	return detach
}

func TestHints(t *testing.T) {
	page, err := os.ReadFile("../../../docs/doctor.md")
	require.NoError(t, err)
	anchors := make(map[string]bool)
	for _, pre := range []bool{false, true} {
		d := &doctor{cfg: Config{Pre: pre}}
		d.settings.StartupTaint.Key, d.settings.Rules.BlockWireserver = "k", true
		d.settings.Ports = []Port{{Flag: "nmi-port"}}
		d.cluster = &cluster{doctor: d}
		programs := &doctor{cfg: Config{Pre: pre}}
		programs.settings.Rules.Mode = iptables.EBPF
		for _, checks := range [][]check{programs.ruleChecks(), programs.networkChecks(), d.agentChecks(), d.ruleChecks(), d.networkChecks(), d.metadataChecks(), d.clusterChecks(), d.nodeChecks()} {
			for _, c := range checks {
				anchors[c.anchor] = true
			}
		}
	}
	for anchor := range anchors {
		assert.Contains(t, string(page), fmt.Sprintf("\n### %s\n", anchor))
	}
	documented := headings(string(page))
	for _, heading := range documented {
		assert.True(t, anchors[heading], "docs/doctor.md has %s, and no check does", heading)
	}
	assert.Len(t, documented, len(anchors))
	for _, s := range situations {
		assert.True(t, anchors[s.anchor], s.anchor)
	}
}

// Whoever may create pods chooses their size, and this process shares the agent's memory limit.
func TestManyAndLargePods(t *testing.T) {
	n := newNode(t)
	pods := make([]corev1.Pod, 25)
	for i := range pods {
		pods[i].Namespace, pods[i].Name = "shop", fmt.Sprint("p", i)
		pods[i].ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubectl"}}
	}
	n.mu.Lock()
	n.pods = pods
	n.mu.Unlock()
	list := func() ([]corev1.Pod, error) {
		d := &doctor{cfg: n.cfg, settings: n.settings}
		d.cluster = &cluster{doctor: d}
		return d.cluster.listPods(t.Context())
	}
	listed, err := list()
	require.NoError(t, err)
	require.Len(t, listed, len(pods), "of all pages")
	assert.Empty(t, listed[0].ManagedFields)
	for size, want := range map[int]string{
		400 << 10: "the node's pods have more than 8 MiB together",
		4 << 20:   "listing the node's pods: the response has more than 4 MiB",
	} {
		for i := range pods {
			pods[i].Annotations = map[string]string{"large": strings.Repeat("x", size)}
		}
		_, err = list()
		assert.ErrorContains(t, err, want)
		assert.ErrorAs(t, err, new(skipped))
	}
}
