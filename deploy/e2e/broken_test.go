//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/entratest"
)

// fault is something that is broken on purpose. The tables are in broken_pods_test.go and
// broken_node_test.go; docs/when-things-break.md shows what is data in them.
type fault struct {
	what   string // is broken
	reason string // of requests that are refused for it; "" for none
	fix    string // words of what to do, which each face has
	faces  faces
	breaks func(*breakage) // sets what examine and mend need
}

// faces are the places that tell of a fault, each in a sentence. What a code span has is to be
// found there, in one line of the log. "none: " is followed by why the fault is not told of.
type faces struct {
	metric  string // a series, which "grows" or "is" a value
	event   string // "on the pod" or "on the node"
	log     string
	status  string // of nmi status -o json; "the pod" for its own part
	explain string
	doctor  string // the anchor of a check, its mark, and words of it
}

// all names them, in the order of the page.
func (f faces) all() [][2]string {
	return [][2]string{{"metric", f.metric}, {"Event", f.event}, {"log", f.log}, {"status", f.status}, {"explain", f.explain}, {"doctor", f.doctor}}
}

// refusal is what all faces say of a pod that is refused for a reason.
func refusal(reason string) faces {
	return faces{
		metric:  "`nmi_requests_refused_total{reason=\"" + reason + "\"}` grows",
		event:   "on the pod: `" + reason + "`",
		log:     "`not served`, `reason=" + reason + "`",
		status:  "the pod: `failed`, `" + reason + "`",
		explain: "`reason: " + reason + "`",
		doctor:  "`pods` ‼ `" + reason + "`",
	}
}

// saying is faces with others.
func (f faces) saying(change func(*faces)) faces {
	change(&f)
	return f
}

// passes is faces without an Event.
func (f faces) passes(why string) faces {
	return f.saying(func(f *faces) { f.event = "none: " + why })
}

var spans = regexp.MustCompile("`([^`]+)`")

// words are the code spans of what a face says.
func words(face string) (all []string) {
	for _, span := range spans.FindAllStringSubmatch(face, -1) {
		all = append(all, span[1])
	}
	return all
}

func isNone(face string) bool { return strings.HasPrefix(face, "none: ") }

func containsAll(text string, words []string) bool {
	return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(text, word) })
}

// faulty is a node where things are broken.
type faulty struct {
	test       *scenario // whose end all of it lasts to
	serving    *testbed.Agent
	kubeconfig string // of that agent
	fakeEntra  *entratest.Server
	authority  string               // of service principals and federated identities
	refuse     func(pattern string) // has the first agent's iptables-restore fail for what contains it; "" is nothing
	bystander  *pod
	requests   int // sent so far
}

// breakage is a fault while it lasts.
type breakage struct {
	*scenario
	*faulty
	fault
	pod    *pod
	name   string        // of the pod in namespace shop that is affected
	asks   func() answer // sends a request of the pod, each time for another resource; nil if none is refused
	args   []string      // of nmi explain
	mend   func()
	logged int                // bytes of the agent's log before
	before map[string]float64 // metrics
}

// begins breaks something, and waits until the pod is refused for it: for a moment it may be for
// something else, while not all of it is known.
func (n *faulty) begins(t *testing.T, f fault) *breakage {
	t.Helper()
	b := &breakage{scenario: &scenario{t: t}, faulty: n, fault: f, name: bystander, logged: len(n.serving.Log()), mend: func() {}}
	b.before = b.metrics()
	f.breaks(b)
	if b.asks != nil {
		var got answer
		require.True(t, poll(patience, func() bool {
			got = b.asks()
			return got.status != http.StatusOK && poll(time.Second, func() bool { ok, _ := b.logSays(b.faces.log); return ok })
		}), "%d %s; the agent's log:\n%s", got.status, got.body, b.serving.Log())
		t.Logf("%d %s", got.status, got.body)
	}
	return b
}

// examine requires each face to tell of the fault, and to name the fix.
func (b *breakage) examine() *breakage {
	b.t.Helper()
	for _, face := range b.faces.all() {
		if isNone(face[1]) {
			continue
		}
		check := map[string]func(string) (bool, string){
			"metric": b.metricSays, "Event": b.eventSays, "log": b.logSays, "status": b.statusSays, "explain": b.explainSays, "doctor": b.doctorSays,
		}[face[0]]
		var says string
		ok := poll(patience, func() (ok bool) { ok, says = check(face[1]); return ok })
		assert.True(b.t, ok, "%s: want %s, and what to do: %q; it says %s", face[0], face[1], b.fix, says)
	}
	if b.reason != "" && isNone(b.faces.event) {
		assert.NotContains(b.t, b.eventsOn("shop", b.name), b.reason)
	}
	return b
}

// poll checks until it is so, in this goroutine, unlike require.Eventually: a check that takes long must
// not go on after the test.
func poll(patience time.Duration, check func() bool) bool {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !check(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// ends mends it, and requires the pod to be served and no face to say more than that it was refused.
func (b *breakage) ends() {
	b.t.Helper()
	b.mend()
	if b.asks == nil {
		b.asks = b.asksAnew(b.bystander, "")
	}
	var got answer
	require.Eventually(b.t, func() bool { got = b.asks(); return got.status == http.StatusOK }, 2*patience, 200*time.Millisecond, "not served yet: %+v", &got)
	pod := b.podStatus()
	assert.NotEqual(b.t, "failed", pod["state"], "%v", pod)
	assert.Empty(b.t, pod["answer"])
	if strings.HasPrefix(b.faces.explain, "`‼") {
		require.Eventually(b.t, func() bool { there, _ := b.explainSays(b.faces.explain); return !there }, patience, 100*time.Millisecond, "nmi explain still says %s", b.faces.explain)
	}
}

// metrics are those of the agent, by series; none if they are not served.
func (b *breakage) metrics() map[string]float64 {
	client := &http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	all := make(map[string]float64)
	status, text := page(client, "127.0.0.1", metricsPort, "/metrics")
	if status != http.StatusOK {
		return nil
	}
	for line := range strings.Lines(text) {
		if end := strings.LastIndexByte(line, ' '); end > 0 && !strings.HasPrefix(line, "#") {
			all[line[:end]], _ = strconv.ParseFloat(strings.TrimSpace(line[end:]), 64)
		}
	}
	return all
}

func (b *breakage) metricSays(face string) (bool, string) {
	series := words(face)[0]
	value, there := b.metrics()[series]
	says := fmt.Sprintf("%v %v, and before %v", there, value, b.before[series])
	if _, want, ok := strings.Cut(face, "` is "); ok {
		return there && strconv.FormatFloat(value, 'f', -1, 64) == want, says
	}
	return there && value > b.before[series], says
}

func (b *breakage) eventSays(face string) (bool, string) {
	on := b.eventsOn("shop", b.name)
	if strings.HasPrefix(face, "on the node") {
		on = b.eventsOn("default", testbed.NodeName)
	}
	event, there := on[b.reason]
	return there && strings.Contains(event.Note, ". Fix: ") && strings.Contains(event.Note, b.fix), fmt.Sprint(slices.Collect(maps.Keys(on)), event.Note)
}

func (b *breakage) logSays(face string) (bool, string) {
	text := b.serving.Log()[b.logged:]
	for line := range strings.Lines(text) {
		if containsAll(line, append(words(face), b.fix)) {
			return true, line
		}
	}
	return false, text
}

// podStatus is the affected pod's part of the status.
func (b *breakage) podStatus() map[string]any {
	b.t.Helper()
	var page struct {
		Pods []map[string]any `json:"pods"`
	}
	require.NoError(b.t, json.Unmarshal([]byte(b.status()), &page))
	for _, pod := range page.Pods {
		if pod["name"] == b.name {
			return pod
		}
	}
	return nil
}

func (b *breakage) status() string {
	b.t.Helper()
	_, output := b.nmi("status", "-o", "json", "--probe-socket="+b.serving.ProbeSocket)
	return output
}

func (b *breakage) statusSays(face string) (bool, string) {
	if strings.HasPrefix(face, "the pod") {
		pod := b.podStatus()
		fix, _ := pod["fix"].(string)
		said := fmt.Sprint(pod["state"], " ", pod["reason"], " ", fix)
		return containsAll(said, append(words(face), b.fix)), said
	}
	text := b.status()
	return containsAll(text, append(words(face), b.fix)), text
}

func (b *breakage) explainSays(face string) (bool, string) {
	_, output := b.explains(world.Kubeconfig, append(b.args, "--probe-socket="+b.serving.ProbeSocket, "shop/"+b.name)...)
	return containsAll(output, append(words(face), b.fix)), output
}

// doctorSays looks for a line of the doctor. What to do is in the line, or where its anchor leads.
func (b *breakage) doctorSays(face string) (bool, string) {
	says := words(face)
	results := map[string]string{"×": "error", "‼": "warning", "√": "success"}
	_, mark, _ := strings.Cut(face, "` ")
	mark, _, _ = strings.Cut(mark, " ")
	found := b.diagnose(b.kubeconfig, asAgent, "--node="+testbed.NodeName, "--probe-socket="+b.serving.ProbeSocket).about(says[0])
	return slices.ContainsFunc(found, func(f finding) bool {
		line := f.Error
		if says[0] == "pods" {
			return f.Result == results[mark] && containsAll(line, append(says[1:], b.name, b.fix))
		}
		return f.Result == results[mark] && containsAll(line, says[1:])
	}), fmt.Sprintf("%+v", found)
}

// bystander is the name of a pod that is served, but for what is wrong with the node.
const bystander = "bystander"

// asksAnew returns a function that sends a pod's request, each time for another resource: the last
// answer, which may be another pod's, too, may be remembered.
func (n *faulty) asksAnew(p *pod, parameters string) func() answer {
	return func() answer {
		n.requests++
		return p.asks(resource(n.requests) + parameters)
	}
}

// TestWhatIsBroken breaks one thing after the other, mends it, and asks each face each time. The
// first of the node's faults lasts meanwhile: its Event takes 20 seconds.
func TestWhatIsBroken(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	n := &faulty{test: s, kubeconfig: world.Kubeconfig}
	var path string
	path, n.refuse = stubbornIptables(t)
	n.fakeEntra, n.authority = s.entra(1000)
	n.serving = s.agentWithPath(path, "--iptables-backend=nft", "--pod-wait=100ms", "--entra-authority="+n.authority)
	require.NoError(t, n.serving.AwaitReady(t.Context()))
	n.bystander = s.pod(bystander, "10.244.0.120", testbed.Ptp, "cart")
	n.bystander.hears(vault, cart.ClientID)
	lasting := n.begins(t, nodeFaults[0])
	for _, f := range podFaults {
		t.Run(f.what, func(t *testing.T) { n.begins(t, f).examine().ends() })
	}
	t.Run(lasting.what, func(t *testing.T) {
		lasting.scenario = &scenario{t: t}
		lasting.examine().ends()
	})
	for _, f := range nodeFaults[1:] {
		t.Run(f.what, func(t *testing.T) { n.begins(t, f).examine().ends() })
	}
}

// The page of what breaks.
const brokenPage = "../../docs/when-things-break.md"

// TestThePageOfWhatBreaks requires the page to have what the tables have, and no more.
func TestThePageOfWhatBreaks(t *testing.T) {
	page, err := os.ReadFile(brokenPage)
	require.NoError(t, err)
	_, text, _ := strings.Cut(string(page), "\n## A pod is refused\n")
	has := func(block string) {
		assert.Contains(t, text, "\n"+block, "%s lacks", brokenPage)
	}
	has(refusal("<reason>").table())
	rows := 2 + len(refusal("").all()) + 2 + len(podFaults) // with headings and rulers
	has(tableOf(podFaults))
	for _, f := range nodeFaults {
		has(f.section())
		rows += 2 + len(f.faces.all())
	}
	assert.Equal(t, rows, strings.Count(text, "\n|"), "rows of tables")
	assert.Equal(t, len(nodeFaults), strings.Count(text, "\n### "), "sections")
}

// table is faces as a table.
func (f faces) table() string {
	text := "| place | what it says |\n|---|---|\n"
	for _, face := range f.all() {
		text += fmt.Sprintf("| %s | %s |\n", face[0], face[1])
	}
	return text
}

// tableOf is faults as a table, with the faces that differ from others of the reason.
func tableOf(faults []fault) string {
	text := "| what is broken | reason | what is different |\n|---|---|---|\n"
	for _, f := range faults {
		var different []string
		usual := refusal(f.reason)
		for i, face := range f.faces.all() {
			if face != usual.all()[i] {
				different = append(different, face[0]+": "+face[1])
			}
		}
		text += fmt.Sprintf("| %s | `%s` | %s |\n", sentence(f.what), f.reason, strings.Join(different, "; "))
	}
	return text
}

// section is a fault as a section.
func (f fault) section() string {
	text := "### " + sentence(f.what) + "\n"
	if f.reason != "" {
		text += "Reason: `" + f.reason + "`. "
	}
	return text + "What to do: *" + f.fix + "*.\n\n" + f.faces.table()
}

func sentence(text string) string { return strings.ToUpper(text[:1]) + text[1:] }
