package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const resource = "https://vault.azure.net"

func (d *demo) tell(ctx context.Context) error {
	fmt.Print(`
One node, four pods, and stand-ins for Azure's instance metadata service (IMDS) and Entra.
All of it is network namespaces of this process; nothing leaves this machine.

   pod shop/cart              10.244.0.11 --+
   pod shop/report            10.244.0.12 --+-- node 10.0.0.4 -- IMDS 169.254.169.254:80
   pod monitoring/collector   10.244.0.13 --+
   pod shop/ledger            10.244.0.14 --+

Applied from deploy/demo:
`)
	for _, o := range d.objects {
		fmt.Printf("   %-26s %s/%s\n", o.GetKind(), o.GetNamespace(), o.GetName())
	}

	heading("Without the agent")
	a, err := d.ask(ctx, "shop/report", "asks for a token. Nobody has given it an identity:")
	if err != nil {
		return err
	}
	row("answer", a.String())
	say("Any pod that asks gets the identity of the node. This is what the agent is for.")

	begin := time.Now()
	if err := d.start(ctx); err != nil {
		return err
	}
	heading("The agent starts")
	say(fmt.Sprintf("Listening, in sync and redirecting after %s. The rules, as iptables shows them:", took(begin)))
	rules, err := exec.CommandContext(ctx, "iptables", "-t", "nat", "-S").Output()
	if err != nil {
		return fmt.Errorf("showing the rules: %w", err)
	}
	for line := range strings.Lines(string(rules)) {
		if strings.Contains(line, "aad-metadata") {
			fmt.Print("      ", line)
		}
	}
	d.imds.Reset()
	d.asked = 0

	for _, step := range []struct{ title, pod, how string }{
		{"A bound pod asks", "shop/cart", "asks for a token, the first time:"},
		{"It asks again", "shop/cart", "asks for the same token:"},
		{"A pod that nobody bound asks", "shop/report", "asks again, now with the agent there:"},
		{"An excepted pod asks", "monitoring/collector", "asks for a token:"},
		{"A pod whose identity the node does not have", "shop/ledger", "asks IMDS like the others:"},
	} {
		heading(step.title)
		if err := d.askAndExplain(ctx, step.pod, step.how); err != nil {
			return err
		}
	}

	heading("Sixty at once")
	if err := d.manyAtOnce(ctx); err != nil {
		return err
	}

	heading("In all")
	say(fmt.Sprintf("With the agent there, pods asked for %d tokens, IMDS %s, and Entra %s.", d.asked, wasAsked(d.imds.Requests()), wasAsked(d.entra.Tokens())))
	fmt.Println("\nDone. The namespaces are gone with this process.")
	return nil
}

// askAndExplain lets a pod ask, and shows how the agent came to its answer.
func (d *demo) askAndExplain(ctx context.Context, name, how string) error {
	before, exchanged := d.imds.Requests(), d.entra.Tokens()
	a, err := d.ask(ctx, name, how)
	if err != nil {
		return err
	}
	pod, err := d.resolver.Resolve(ctx, d.pods[name].Addr)
	if err != nil {
		return err
	}
	row("caller", fmt.Sprintf("%s is the address of pod %s", d.pods[name].Addr, pod))
	identity, err := pod.Identity(podresolver.Selector{})
	switch {
	case pod.Exception() != "":
		row("decision", fmt.Sprintf("AzurePodIdentityException %q applies: passed through to IMDS as it is", pod.Exception()))
	case err != nil:
		row("decision", err.Error())
	case identity.Annotated():
		row("decision", fmt.Sprintf("ServiceAccount %q names client ID %s:", identity.Name, identity.ClientID))
		row("", "its own token is exchanged at Entra for one of that identity")
	default:
		row("decision", fmt.Sprintf("AzureIdentityBinding %q gives it AzureIdentity %q,", identity.Binding, identity.Name))
		row("", "client ID "+identity.ClientID)
	}
	row("IMDS", wasAsked(d.imds.Requests()-before))
	if n := d.entra.Tokens() - exchanged; n > 0 {
		row("Entra", wasAsked(n))
	}
	row("answer", a.String())
	return nil
}

// ask lets a pod ask for a token over a new connection.
func (d *demo) ask(ctx context.Context, name, how string) (answer, error) {
	say("Pod " + name + " " + how)
	row("request", "GET http://169.254.169.254/metadata/identity/oauth2/token")
	row("", "    ?api-version=2018-02-01&resource="+resource+", header Metadata: true")
	client := d.pods[name].Client(10 * time.Second)
	defer client.CloseIdleConnections()
	a, err := getToken(ctx, client, resource)
	if err != nil {
		return answer{}, fmt.Errorf("pod %s asking: %w", name, err)
	}
	d.asked++
	return a, nil
}

// manyAtOnce lets sixty callers ask at the same moment for what is not cached. A pod may have
// 64 connections (proxy.DefaultMaxConnectionsPerPod).
func (d *demo) manyAtOnce(ctx context.Context) error {
	const callers = 60
	before := d.imds.Tokens()
	client := d.pods["shop/cart"].Client(10 * time.Second)
	defer client.CloseIdleConnections()
	var mu sync.Mutex // guards the two below
	var failure error
	served := 0
	begin := time.Now()
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			a, err := getToken(ctx, client, "https://management.azure.com")
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failure = err
			} else if a.subject != "" {
				served++
			}
		})
	}
	wg.Wait()
	if failure != nil {
		return fmt.Errorf("asking many times at once: %w", failure)
	}
	say(fmt.Sprintf("Pod shop/cart opens %d connections and asks for another resource on each:", callers))
	d.asked += callers
	row("IMDS", wasAsked(d.imds.Tokens()-before))
	row("answer", fmt.Sprintf("%d tokens after %s", served, took(begin)))
	return nil
}

// answer is what a pod hears.
type answer struct {
	status  int
	subject string // whose token, "" for none
	token   string
	reason  string
	took    string
}

func (a answer) String() string {
	if a.subject == "" {
		return fmt.Sprintf("%d %q after %s", a.status, a.reason, a.took)
	}
	// Tokens are secrets, these made-up ones as well by habit.
	return fmt.Sprintf("%d after %s, token %.12s... of %s", a.status, a.took, a.token, a.subject)
}

func getToken(ctx context.Context, client *http.Client, resource string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://"+testbed.MetadataAddress+"/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+resource, nil)
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Metadata", "true")
	begin := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	var in struct {
		Token  string `json:"access_token"`
		Reason string `json:"error_description"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return answer{}, fmt.Errorf("the answer is not JSON: %w", err)
	}
	return answer{took: took(begin), status: resp.StatusCode, subject: imdstest.Subject(in.Token), token: in.Token, reason: in.Reason}, nil
}

func heading(text string) {
	fmt.Printf("\n-- %s %s\n", text, strings.Repeat("-", max(0, 74-len(text))))
}

func say(text string) { fmt.Println("   " + text) }

func row(name, text string) { fmt.Printf("      %-9s %s\n", name, text) }

func took(begin time.Time) string {
	return fmt.Sprintf("%.1f ms", float64(time.Since(begin).Microseconds())/1000)
}

func wasAsked(n int) string {
	switch n {
	case 0:
		return "was not asked"
	case 1:
		return "was asked once"
	}
	return fmt.Sprintf("was asked %d times", n)
}
