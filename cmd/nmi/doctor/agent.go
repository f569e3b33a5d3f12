package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/cmd/nmi/handover"
)

func (d *doctor) agentChecks() []check {
	if d.cfg.Pre {
		return d.portChecks()
	}
	return append([]check{
		{"agent", "an agent answers on " + d.cfg.Socket, d.agentAnswers},
		{"ready", "the agent is ready", d.agentReady},
		{"notes", "the agent reports no trouble", d.agentNotes},
		{"pods", "no pod of the node is refused", d.podsServed},
		{"handover", "a new agent can take over (--handover-dir)", d.handover},
	}, check{"ports", "the agent has its ports", func(ctx context.Context) (string, error) { return "", d.portsServed(ctx) }})
}

// agentAnswers asks the agent for its settings, which all other checks use.
func (d *doctor) agentAnswers(ctx context.Context) (string, error) {
	status, text, err := d.cfg.Ask(ctx, ConfigPage)
	if err != nil {
		return "", fmt.Errorf("%w. The other checks use this command's flags. Run it in an agent's pod (kubectl -n kube-system exec <agent's pod> -- nmi doctor), or with --pre before there is an agent", err)
	}
	var page AgentPage
	if status == http.StatusOK {
		err = json.Unmarshal([]byte(text), &page)
	}
	if status != http.StatusOK || err != nil || page.Doctor.Node == "" {
		return "", fmt.Errorf("the agent is of another version than this program: %s says %d, without settings for the checks", ConfigPage, status)
	}
	d.agent, d.settings = true, page.Doctor
	return fmt.Sprintf("node %s, %s mode, --redirect-mode=%s", d.settings.Node, d.settings.Mode, d.settings.Rules.Mode), nil
}

// ready returns the lines of the agent's readyPage after the first.
func (d *doctor) ready(ctx context.Context) (status int, lines []string, err error) {
	if !d.agent {
		return 0, nil, skipf("no agent answers")
	}
	status, text, err := d.cfg.Ask(ctx, readyPage)
	if err != nil {
		return 0, nil, err
	}
	lines = strings.Split(strings.TrimSpace(text), "\n")
	return status, lines[1:], nil
}

func (d *doctor) agentReady(ctx context.Context) (string, error) {
	status, lines, err := d.ready(ctx)
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", errors.New(strings.Join(lines, "\n"))
	}
	return lines[0], nil // the mode, and why
}

// agentNotes are what the agent says of itself while it is ready.
func (d *doctor) agentNotes(ctx context.Context) (string, error) {
	status, lines, err := d.ready(ctx)
	switch {
	case err != nil:
		return "", err
	case status != http.StatusOK:
		return "", skipf("the agent is not ready")
	case len(lines) > 1:
		return "", warnf("%s", strings.Join(lines[1:], "\n"))
	}
	return "", nil
}

// podsServed lists the pods that the agent refuses, or has refused in the last ten minutes.
func (d *doctor) podsServed(ctx context.Context) (string, error) {
	if !d.agent {
		return "", skipf("no agent answers")
	}
	status, text, err := d.cfg.Ask(ctx, statusPage)
	if err != nil {
		return "", err
	}
	var page struct {
		Cluster struct {
			Synced bool `json:"synced"`
		} `json:"cluster"`
		Pods []struct{ Namespace, Name, State, Reason, Fix string } `json:"pods"`
	}
	if status != http.StatusOK {
		return "", skipf("%s says %d", statusPage, status)
	}
	if err := json.Unmarshal([]byte(text), &page); err != nil {
		return "", fmt.Errorf("%s: %w", statusPage, err)
	}
	if !page.Cluster.Synced {
		return "", skipf("the agent does not know the pods yet")
	}
	const most = 10
	var refused []string
	for _, pod := range page.Pods {
		if pod.State != "failed" && pod.State != "warning" {
			continue
		}
		if len(refused) == most {
			refused = append(refused, "and more: nmi status")
			break
		}
		refused = append(refused, fmt.Sprintf("%s/%s: %s: %s", pod.Namespace, pod.Name, pod.Reason, pod.Fix))
	}
	if len(refused) > 0 {
		return "", warnf("%s", strings.Join(refused, "\n"))
	}
	return fmt.Sprintf("it knows %d", len(page.Pods)), nil
}

func (d *doctor) handover(context.Context) (string, error) {
	dir := d.settings.HandoverDir
	switch {
	case !d.agent:
		return "", skipf("no agent answers, and this process need not have its mounts")
	case dir == "":
		return "", warnf("--handover-dir is empty: pods are refused during an upgrade")
	}
	if err := handover.Shared(dir); err != nil {
		return "", warning{err}
	}
	return dir, nil
}

// portChecks look for other programs on the ports that an agent will need.
func (d *doctor) portChecks() (checks []check) {
	for _, port := range d.settings.Ports {
		number := port.Addr.Port()
		checks = append(checks, check{"ports", fmt.Sprintf("port %d is free (--%s)", number, port.Flag), func(context.Context) (string, error) {
			owner, taken, err := listening(number)
			switch {
			case err != nil:
				return "", skipf("%s", err)
			case !taken:
				return "", nil
			}
			err = fmt.Errorf("a program of user %d listens on port %d: stop it, or choose another --%s. Where it is an agent already, or the old NMI, see docs/migrating.md", owner, number, port.Flag)
			if port.Page != "" { // the agent serves tokens without its pages
				return "", warning{err}
			}
			return "", err
		}})
	}
	return checks
}

// portsServed asks for the pages of the agent's ports: another program that has one answers
// differently.
func (d *doctor) portsServed(ctx context.Context) error {
	if !d.agent {
		return d.portsWithoutAgent()
	}
	for _, port := range d.settings.Ports {
		if port.Page == "" {
			if _, taken, err := listening(port.Addr.Port()); err == nil && !taken {
				return fmt.Errorf("nothing listens on port %d (--%s), where pods' connections are redirected to", port.Addr.Port(), port.Flag)
			}
			continue
		}
		if err := served(ctx, port); err != nil {
			return warnf("--%s: %w: pods are served, and probes or metrics are not. See which program has port %d (ss -ltnp on the node), or choose another", port.Flag, err, port.Addr.Port())
		}
	}
	return nil
}

// portsWithoutAgent names a port that another program has: an agent that does not answer here, or
// what keeps one from starting.
func (d *doctor) portsWithoutAgent() error {
	for _, port := range d.settings.Ports {
		if owner, taken, err := listening(port.Addr.Port()); err == nil && taken {
			return warnf("no agent answers, and a program of user %d listens on port %d: if it is not an agent, stop it first, or choose another --%s", owner, port.Addr.Port(), port.Flag)
		}
	}
	return skipf("no agent answers")
}

// pages are how the agent's pages begin or what they contain.
var pages = map[string][]string{
	"/healthz": {"Active", "Not Active"},
	"/metrics": {"nmi_"},
}

// served returns an error if a port does not serve a page of the agent's.
func served(ctx context.Context, port Port) error {
	addr := port.Addr
	if addr.Addr().IsUnspecified() {
		addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port())
	}
	client := plainClient()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+port.Page, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	const enough = 1 << 20
	body, err := io.ReadAll(io.LimitReader(resp.Body, enough))
	if err != nil {
		return err
	}
	for _, words := range pages[port.Page] {
		if resp.StatusCode == http.StatusOK && strings.Contains(string(body), words) {
			return nil
		}
	}
	return fmt.Errorf("something else than an agent answers %d at %s", resp.StatusCode, req.URL)
}

// plainClient connects directly, whatever the environment says of proxies, and for each
// request anew.
func plainClient() *http.Client {
	const timeout = 5 * time.Second
	return &http.Client{
		Timeout:   timeout,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{}).DialContext},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}
}

// listening returns the user whose program listens on a TCP port of this network namespace
// (proc_pid_net(5), tcp).
func listening(port uint16) (user int, taken bool, err error) {
	for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) { // no IPv6
			continue
		}
		if err != nil {
			return 0, false, err
		}
		const local, state, uid = 1, 3, 7 // columns
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) <= uid || fields[state] != fmt.Sprintf("%02X", unix.BPF_TCP_LISTEN) {
				continue
			}
			_, hex, _ := strings.Cut(fields[local], ":")
			if n, err := strconv.ParseUint(hex, 16, 16); err == nil && uint16(n) == port {
				user, err := strconv.Atoi(fields[uid])
				return user, true, err
			}
		}
	}
	return 0, false, nil
}
