package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables"
)

// slow is longer than IMDS takes for what it knows by heart.
const slow = time.Second

// metadataProxy is where the GuestProxyAgent of Azure's Metadata Security Protocol listens.
// https://learn.microsoft.com/azure/virtual-machines/metadata-security-protocol/overview
const metadataProxy = "127.0.0.1:3080"

func (d *doctor) metadataChecks() []check {
	return []check{
		{"imds", "the node reaches the metadata service", d.imds},
		{"metadata-proxy", "no metadata security proxy listens on " + metadataProxy, proxyListens},
		{"connect4", "no other eBPF program redirects connections", func(context.Context) (string, error) { return otherConnect4(cgroups) }},
	}
}

// imds asks for the versions of the API, which counts against no limit of tokens.
func (d *doctor) imds(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.settings.Rules.Metadata.String()+"/metadata/versions", nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Metadata", "true")
	begin := time.Now()
	resp, err := plainClient().Do(req)
	took := time.Since(begin).Round(100 * time.Microsecond)
	if err != nil {
		return "", fmt.Errorf("%w: is there a firewall or a network policy for the host, or is this no virtual machine of Azure?", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1)) // whether there is one
	switch {
	case err != nil:
		return "", err
	case resp.StatusCode == http.StatusForbidden && len(body) == 0, resp.StatusCode == http.StatusMisdirectedRequest:
		return "", fmt.Errorf("a proxy before it answers %d (Azure's Metadata Security Protocol): allow the agent's program in the InVMAccessControlProfile for IMDS", resp.StatusCode)
	case resp.StatusCode != http.StatusOK:
		return "", warnf("it answers %d", resp.StatusCode)
	case took > slow:
		return "", warnf("it took %s to answer: is another program of the node keeping it busy?", took)
	}
	return fmt.Sprintf("it answered in %s", took), nil
}

func proxyListens(ctx context.Context) (string, error) {
	const timeout = 2 * time.Second
	conn, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, "tcp4", metadataProxy)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "", nil
	case err != nil:
		return "", skipf("%s", err)
	}
	_ = conn.Close()
	return "", warnf("something does (GuestProxyAgent?): where its eBPF program is attached to the root cgroup, a pod's connection to the metadata service leads to 127.0.0.1:3080 in the pod, is refused, and never reaches the agent's redirect")
}

// ciliumPrefix is that of the names of Cilium's eBPF programs. Its load balancer has one for
// connect4; it changes only connections to services, and to what a local redirect policy names.
const ciliumPrefix = "cil_"

// otherConnect4 looks for eBPF programs that see the connect() of this container, attached to
// its cgroup or one above: those of the node's root cgroup are among them.
func otherConnect4(dirs []string) (string, error) {
	dir, err := cgroup2(dirs)
	if err != nil {
		return "", err
	}
	programs, err := connect4Programs(dir)
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "", skipf("BPF_PROG_QUERY needs CAP_BPF, which the agent does not have: %s. On the node: bpftool cgroup tree | grep connect4", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return "", skipf("the kernel does not say which programs are attached: %s", err)
	case err != nil:
		return "", err
	}
	var others []string
	for _, program := range programs {
		switch {
		case program == iptables.ConnectProgram:
			return "the agent's own (--redirect-mode=ebpf), which has pods' connections first", nil
		case !strings.HasPrefix(program, ciliumPrefix):
			others = append(others, program)
		}
	}
	if len(others) > 0 {
		return "", warnf("attached to connect4 of %s or above: %s. If it changes connections to the metadata service (GuestProxyAgent does), pods' requests do not reach the agent's redirect", dir, strings.Join(others, ", "))
	}
	if len(programs) > 0 {
		return "Cilium's alone: " + strings.Join(programs, ", "), nil
	}
	return "", nil
}
