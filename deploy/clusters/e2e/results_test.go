//go:build cluster

package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// result is a line of the table.
type result struct {
	Scenario    string // the test's name
	Promise     string
	Requests    int
	Failed      int     // requests whose answer was not the right one, but for the next two
	Wrong       int     // tokens of another identity, of pods
	NodeTokens  int     // tokens of the node, given to pods that are not excepted
	Leaks       int     // requests that the metadata service got from a pod's own address
	Retried     int     // requests that took more than one try
	WorstMillis float64 // of the right answers
	Seconds     float64
	Outcome     string
	Notes       []string `json:",omitempty"`
	Failures    []string `json:",omitempty"` // the first ones
}

// How many failures are described.
const (
	maxFailures        = 20
	maxAllowedFailures = 3 // of a scenario that allows them
)

// results are those of all scenarios so far.
var results struct {
	sync.Mutex
	all []*result
}

func addResult(t *testing.T, promise string) *result {
	t.Helper()
	r := &result{Scenario: strings.TrimPrefix(t.Name(), "Test"), Promise: promise, Outcome: "failed"} // until it has passed
	results.Lock()
	defer results.Unlock()
	results.all = append(results.all, r)
	return r
}

// suiteReport is what the suite prints at its end.
type suiteReport struct {
	Cluster  string
	Date     time.Time
	Versions [][2]string // what, which
	Seconds  float64
	Results  []*result
}

// newReport reports on a run that began then.
func newReport(ctx context.Context, begin time.Time) *suiteReport {
	r := &suiteReport{Date: begin.UTC(), Seconds: time.Since(begin).Seconds(), Results: results.all}
	add := func(what, which string) { r.Versions = append(r.Versions, [2]string{what, which}) }
	if v, err := world.kube.Discovery().ServerVersion(); err == nil {
		add("API server", v.GitVersion)
	}
	nodes, err := world.kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err == nil && len(nodes.Items) > 0 {
		info := nodes.Items[0].Status.NodeInfo
		add("kubelet", info.KubeletVersion)
		add("kernel", info.KernelVersion)
		add("container runtime", info.ContainerRuntimeVersion)
		add("node OS", info.OSImage)
	}
	plugin, proxy := os.Getenv("CNI"), os.Getenv("KUBE_PROXY") // "cluster.sh run" sets them
	add("network plugin", cmp.Or(plugin, unknown))
	add("kube-proxy", cmp.Or(proxy, unknown))
	add("agent", *imageFlag+", commit "+world.commit(ctx))
	if r.Cluster = *nameFlag; r.Cluster == "" {
		name := []string{filepath.Base(filepath.Dir(world.script)), plugin, proxy}
		r.Cluster = strings.Join(slices.DeleteFunc(name, func(part string) bool { return part == "" || part == "." }), "-")
	}
	return r
}

// unknown stands for a version that could not be found out.
const unknown = "unknown"

func (c *cluster) commit(ctx context.Context) string {
	out, err := c.command(ctx, "git", "describe", "--always", "--dirty")
	if err != nil {
		return unknown
	}
	return strings.TrimSpace(out)
}

func (r *suiteReport) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Scenarios on %s, %s\n\n", r.Cluster, r.Date.Format(time.DateOnly))
	for _, v := range r.Versions {
		fmt.Fprintf(&b, "* %s: %s\n", v[0], v[1])
	}
	fmt.Fprintf(&b, "* time of the suite: %.0f s\n\n", r.Seconds)
	b.WriteString("*failed*: requests whose answer was not the right one. *wrong*: tokens of another identity. *node*: tokens of the node given\n" +
		"to pods that are not excepted. *leaks*: requests that came to the metadata service from a pod's own address, past the agent.\n" +
		"*worst*: the slowest right answer.\n\n")
	b.WriteString("| scenario | what is promised | requests | failed | wrong | node | leaks | worst, ms | s | |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|\n")
	var sum result
	for _, s := range r.Results {
		if strings.HasPrefix(s.Outcome, "skipped") {
			fmt.Fprintf(&b, "| %s | %s | | | | | | | | %s |\n", s.Scenario, s.Promise, s.Outcome)
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %d | %d | %.0f | %.0f | %s |\n",
			s.Scenario, s.Promise, s.Requests, s.Failed, s.Wrong, s.NodeTokens, s.Leaks, s.WorstMillis, s.Seconds, s.Outcome)
		sum.Requests += s.Requests
		sum.Failed += s.Failed
		sum.Wrong += s.Wrong
		sum.NodeTokens += s.NodeTokens
		sum.Leaks += s.Leaks
	}
	fmt.Fprintf(&b, "| all | | %d | %d | %d | %d | %d | | | |\n", sum.Requests, sum.Failed, sum.Wrong, sum.NodeTokens, sum.Leaks)
	for _, s := range r.Results {
		for i, line := range append(s.Notes, s.Failures...) {
			if i == 0 {
				fmt.Fprintf(&b, "\n%s:\n", s.Scenario)
			}
			fmt.Fprintf(&b, "* %s\n", line)
		}
	}
	return b.String()
}

// write writes the two files.
func (r *suiteReport) write(dir string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, r.Date.Format(time.DateOnly)+"-"+r.Cluster)
	if err := os.WriteFile(path+".json", append(text, '\n'), 0o644); err != nil { //nolint:gosec // for everybody to read
		return err
	}
	return os.WriteFile(path+".md", []byte(r.markdown()), 0o644) //nolint:gosec // likewise
}
