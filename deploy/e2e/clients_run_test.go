//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// client is one of Azure's SDKs, or a way to use it.
type client struct {
	name    string   // as the programs of deploy/clients know it
	program string   // "go" or "js"
	by      []string // the kinds of ID that it can name an identity by
	says    string   // when it is refused; docs/troubleshooting.md quotes it
	env     string   // a variable that the program has beside its own, NAME=value
}

// authorityHost is the variable that aad-pod-identity's users were told to set.
const authorityHost = "AZURE_POD_IDENTITY_AUTHORITY_HOST=http://169.254.169.254"

// String is the client's name in the report.
func (c client) String() string {
	if name, _, ok := strings.Cut(c.env, "="); ok {
		return c.name + ", " + name
	}
	return c.name
}

var clients = []client{
	{"azidentity", "go", []string{"client", "resource", "object"}, "the requested identity isn't assigned to this resource", ""},
	{"azidentity default", "go", []string{"client"}, "DefaultAzureCredential: failed to acquire a token.", ""},
	{"msal", "go", []string{"client", "resource", "object"}, "error: reply status code was 400:", ""},
	{"adal", "go", []string{"client", "resource"}, "adal: Refresh request failed. Status Code = '400'.", ""},
	{"@azure/identity", "js", []string{"client", "resource", "object"}, "CredentialUnavailableError: ManagedIdentityCredential: Authentication failed. Message invalid_request", ""},
	{"@azure/identity default", "js", []string{"client"}, "AggregateAuthenticationError: ChainedTokenCredential authentication failed.", ""},
	{"@azure/msal-node", "js", []string{"client", "resource", "object"}, "ServerError: invalid_request:", ""},
	{"@azure/identity", "js", []string{"client", "resource", "object"}, "CredentialUnavailableError: ManagedIdentityCredential: Authentication failed. Message invalid_request", authorityHost},
	{"@azure/identity default", "js", []string{"client"}, "AggregateAuthenticationError: ChainedTokenCredential authentication failed.", authorityHost},
	{"@azure/msal-node", "js", []string{"client", "resource", "object"}, "ServerError: invalid_request:", authorityHost},
}

// clientIn is a client in a pod, where it reports to, and the agent that it meets.
type clientIn struct {
	pod *pod
	client
	t       *testing.T
	results *clientReport
	agent   *testbed.Agent
}

// job and outcome are what the programs take and print, see deploy/clients/go.
type job struct {
	Client   string `json:"client"`
	By       string `json:"by,omitempty"`
	ID       string `json:"id,omitempty"`
	Resource string `json:"resource"`
	Times    int    `json:"times"`
}

type outcome struct {
	Subject string  `json:"subject"`
	Minutes float64 `json:"minutes"`
	Error   string  `json:"error"`
	MS      float64 `json:"ms"`
}

func (o outcome) took() time.Duration { return time.Duration(o.MS * float64(time.Millisecond)) }

// resources counts those made up.
var resources atomic.Int64

// unused is a resource that the agent has no token for.
func (c clientIn) unused() string {
	return fmt.Sprintf("https://client-%d.example", resources.Add(1))
}

func (c clientIn) run(j job) []outcome {
	c.t.Helper()
	results, err := c.client.run(c.pod.Pod, j)
	require.NoError(c.t, err)
	require.Len(c.t, results, j.Times)
	return results
}

// programTime is longer than any SDK tries.
const programTime = 2 * time.Minute

// run runs the client's program in a pod. All that it knows of the world is in the
// job: no variable, proxy or other tool can send it elsewhere.
func (c client) run(p *testbed.Pod, j job) ([]outcome, error) {
	j.Client = c.name
	argument, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	root, err := testbed.Root()
	if err != nil {
		return nil, err
	}
	programs := filepath.Join(root, ".cache", "clients")
	ctx, cancel := context.WithTimeout(context.Background(), programTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "go"), string(argument))
	if c.program == "js" {
		node, err := exec.LookPath("node")
		if err != nil {
			return nil, err
		}
		cmd = exec.CommandContext(ctx, node, filepath.Join(programs, "js", "clients.mjs"), string(argument))
	}
	home, err := os.MkdirTemp("", "nmi-client-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(home)
	var out, trouble bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = home, []string{"HOME=" + home, "PATH=" + home}, &out, &trouble
	if c.env != "" {
		cmd.Env = append(cmd.Env, c.env)
	}
	if err := p.Start(cmd); err != nil {
		return nil, fmt.Errorf("%w: run make sdks", err)
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, trouble.String())
	}
	var results []outcome
	return results, json.Unmarshal(out.Bytes(), &results)
}

// The columns of the report.
const (
	columnFirst     = "first token"
	columnSecond    = "second"
	columnAgain     = "another process"
	columnThrottled = "throttled once"
	columnEnds      = "3 min left"
	columnEndsAgain = "again"
	columnWaits     = "assigned 3 s later, agent waits"
	columnReturns   = "agent says 503"
	columnOther     = "names another identity"
	columnNone      = "has no identity"
)

// clientReport collects times, and what the clients say.
type clientReport struct {
	redirect string
	times    map[string]map[string]outcome // by client, by column
	errors   bytes.Buffer
}

func newClientReport(redirect string) *clientReport {
	return &clientReport{redirect: redirect, times: map[string]map[string]outcome{}}
}

func (r *clientReport) took(c client, column string, o outcome) {
	if r.times[c.String()] == nil {
		r.times[c.String()] = map[string]outcome{}
	}
	r.times[c.String()][column] = o
}

func (r *clientReport) byID(c client, by string, o outcome) { r.took(c, "by "+by+" ID", o) }

func (r *clientReport) refused(c client, what string, o outcome) {
	r.took(c, what, o)
	fmt.Fprintf(&r.errors, "%s, a pod that %s:\n\n```\n%s\n```\n\n", c, what, strings.TrimSpace(o.Error))
}

// table is the times of some columns in Markdown, in milliseconds.
func (r *clientReport) table(columns ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| client | %s |\n|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---:|", len(columns)))
	for _, c := range clients {
		fmt.Fprintf(&b, "| %s |", c)
		for _, column := range columns {
			o, ok := r.times[c.String()][column]
			switch {
			case !ok:
				b.WriteString(" - |")
			case o.Error != "":
				fmt.Fprintf(&b, " error, %s |", ms(o))
			default:
				fmt.Fprintf(&b, " %s |", ms(o))
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

func ms(o outcome) string {
	if o.MS < 10 {
		return fmt.Sprintf("%.1f", o.MS)
	}
	return fmt.Sprintf("%.0f", o.MS)
}

// writeClientReports prints the reports, and keeps them with other results.
func writeClientReports(reports []*clientReport) error {
	var kernel unix.Utsname
	if err := unix.Uname(&kernel); err != nil {
		return err
	}
	node, err := exec.Command("node", "--version").Output()
	if err != nil {
		return err
	}
	release := strings.SplitN(unix.ByteSliceToString(kernel.Release[:]), ".", 3)
	day := time.Now().Format(time.DateOnly)
	var b strings.Builder
	fmt.Fprintf(&b, clientsIntro, day, runtime.NumCPU(), strings.Join(release[:2], "."), runtime.Version(), strings.TrimSpace(string(node)),
		imdsLatency.Milliseconds())
	for _, r := range reports {
		fmt.Fprintf(&b, clientsTables, r.redirect,
			r.table(columnFirst, columnSecond, columnAgain, columnThrottled, columnEnds, columnEndsAgain),
			r.table("by client ID", "by resource ID", "by object ID"),
			r.table(columnWaits, columnReturns),
			r.table(columnOther, columnNone))
	}
	fmt.Fprintf(&b, clientsErrors, reports[0].errors.String())
	fmt.Print(b.String())
	return os.WriteFile("../../bench/results/"+day+"-clients.md", []byte(b.String()), 0o644)
}

const clientsIntro = `# Azure's SDKs in a pod, %s

Command: ` + "`sudo make clients`" + `. Machine: %d virtual cores, Linux %s, %s, node %s; etcd and kube-apiserver on the
same cores. The service in Azure's place takes %d ms for a token. Versions of the SDKs:
[deploy/clients](../../deploy/clients).

Each section is of one redirect: the rules of iptables that ` + "`--redirect-mode=auto`" + ` chooses, and the programs of ` + "`--redirect-mode=ebpf`" + `.
A client with a variable has it in its environment, with the address that SDKs ask anyway; those of JavaScript then end
the token path with a slash. All times in milliseconds, of the call that gets a token, the making of the connection and, in the first call of a
process, the SDK's own start included. *second*: in the same process, from the SDK's memory. *another process*: from the
agent's memory. *throttled once*: the service answers 429 once with Retry-After: 1. *3 min left*: the token has three
minutes to live, *again*: and is asked for again.
`

const clientsTables = `
## %s

%s
The identity named, from the agent's memory. The agent does not know object IDs, and refuses them:

%s
Standard mode; MIC assigns the identity 3 s after the start of the program. The agent holds the request until then, or,
with --identity-wait=1s, answers 503 with Retry-After: 5:

%s
Refused:

%s`

const clientsErrors = `
## What they say when they are refused

%s`
