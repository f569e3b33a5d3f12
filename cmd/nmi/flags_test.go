package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

// parse is the configuration of a command line, and what is wrong with it.
func parse(args ...string) (*config, error) {
	c := newConfig()
	fs := pflag.NewFlagSet("nmi", pflag.ContinueOnError)
	c.addFlags(fs)
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	return c, c.complete()
}

// mustParse is parse for a command line that is fit for use.
func mustParse(t *testing.T, args ...string) *config {
	t.Helper()
	c, err := parse(args...)
	require.NoError(t, err)
	return c
}

func TestDefaults(t *testing.T) {
	c := mustParse(t, "--node=n", "--operation-mode=Managed")
	assert.NotNil(t, c.klog)
	c.klog = nil
	metadata := netip.MustParseAddrPort("169.254.169.254:80")
	assert.Equal(t, &config{
		resolver: podresolver.Config{Node: "n", Mode: podresolver.Managed, PodWait: 10 * time.Second, IdentityWait: 10 * time.Second},
		rules: iptables.Config{
			Mode: iptables.ModeAuto, Backend: iptables.BackendAuto, Metadata: metadata, Port: 2579,
			Programs: ebpf.Config{CgroupRoot: "/sys/fs/cgroup", Pins: "/sys/fs/bpf/nmi"},
			Address:  netip.MustParseAddr("169.254.169.252"), Interval: time.Minute,
		},
		upstream:    upstream.Config{IMDS: &url.URL{Scheme: "http", Host: metadata.String()}, UserAgent: "nmi/dev", PerSecond: 18, AtOnce: 4},
		proxy:       proxy.Config{MaxConnections: 512, HostTokenUIDs: []uint32{0}},
		federation:  federationConfig{audience: "api://AzureADTokenExchange"},
		front:       endpoint{"nmi-port", netip.MustParseAddrPort("0.0.0.0:2579")},
		probes:      endpoint{"http-probe-port", netip.MustParseAddrPort("0.0.0.0:8080")},
		metrics:     endpoint{"prometheus-port", netip.MustParseAddrPort("0.0.0.0:9090")},
		handoverDir: "/run/nmi", headerRequired: true, logFormat: "text",
	}, c)
}

// oldNMIFlags gives each flag of aad-pod-identity v1.8.17 (cmd/nmi/main.go,
// pkg/log/options.go and klog's) a value.
var oldNMIFlags = []string{
	"--nmi-listen-address=127.0.0.1", "--nmi-port=2579", "--metadata-ip=169.254.169.254", "--metadata-port=80", "--node=n",
	"--ipt-update-interval-sec=30", "--MICNamespace=default", "--forceNamespaced", "--operation-mode=managed",
	"--http-probe-port=8085", "--prometheus-port=9090", "--retry-attempts-for-created=16", "--retry-attempts-for-assigned=4",
	"--find-identity-retry-interval=5", "--enableScaleFeatures=true", "--enableProfile=false", "--block-instance-metadata=true",
	"--metadata-header-required=false", "--allow-network-plugin-kubenet=false", "--kubelet-config=/etc/default/kubelet",
	"--set-retry-after-header=false", "--enable-conntrack-deletion=false", "--log-format=json", "--custom-user-agent=acme",
	"--add_dir_header", "--alsologtostderr", "--log_backtrace_at=main.go:1", "--log_dir=", "--log_file=", "--log_file_max_size=1",
	"--logtostderr=true", "--one_output", "--skip_headers", "--skip_log_headers", "--stderrthreshold=2", "-v=5", "--v=5", "--vmodule=",
	"--version=false",
}

func TestEveryFlagOfTheOldNMIIsTaken(t *testing.T) {
	cfg := mustParse(t, oldNMIFlags...)
	assert.True(t, cfg.proxy.BlockInstanceMetadata)
	assert.True(t, cfg.proxy.MetadataHeaderOptional)
	assert.Equal(t, "nmi/dev acme", cfg.upstream.UserAgent)
	assert.True(t, cfg.logger(&bytes.Buffer{}).Enabled(t.Context(), -4), "-v=5 is debug")
}

// TestTokenProxyFromEnvironment: the variables are those that AKS sets for Azure SDKs.
func TestTokenProxyFromEnvironment(t *testing.T) {
	t.Setenv("AZURE_KUBERNETES_TOKEN_PROXY", "https://10.0.0.1/p")
	t.Setenv("AZURE_KUBERNETES_SNI_NAME", "name")
	t.Setenv("AZURE_KUBERNETES_CA_DATA", "PEM")
	assert.Equal(t, upstream.TokenProxy{URL: "https://10.0.0.1/p", ServerName: "name", CAData: "PEM"}, mustParse(t, "--node=n", "--federation-audience=api://AKSIdentityBinding").upstream.TokenProxy)
	t.Setenv("AZURE_KUBERNETES_CA_FILE", "/ca")
	assert.Equal(t, upstream.TokenProxy{URL: "https://other", ServerName: "name", CAFile: "/ca"}, mustParse(t, "--node=n", "--federation-token-proxy=https://other", "--federation-audience=api://AKSIdentityBinding").upstream.TokenProxy)
	t.Setenv("AZURE_KUBERNETES_TOKEN_PROXY", "10.0.0.1")
	_, err := parse("--node=n")
	require.ErrorContains(t, err, `the environment's AZURE_KUBERNETES_TOKEN_PROXY: "10.0.0.1" is not https`)
}

func TestUnusableValuesNameTheFlagAndSayWhatToDo(t *testing.T) {
	for arg, want := range map[string]string{
		"--node=":                                        "--node is required",
		"--operation-mode=x":                             "want managed or standard",
		"--pod-wait=0s":                                  "want a duration above 0, 1m0s at most, such as 3s",
		"--identity-wait=2m":                             "want a duration above 0, 1m0s at most, such as 3s",
		"--max-staleness=1m":                             "want 0 to turn it off, or a duration of at least 3m0s",
		"--log-format=xml":                               "want text or json",
		"--ipt-update-interval-sec=0":                    "want a number from 1 to 86400",
		"--ipt-update-interval-sec=86401":                "want a number from 1 to 86400",
		"--nmi-port=0":                                   "want a number from 1 to 65535",
		"--prometheus-port=65536":                        "want a number from 1 to 65535",
		"--metadata-port=0":                              "want a number from 1 to 65535",
		"--http-probe-port=2579":                         "--nmi-port and --http-probe-port are both 2579",
		"--metadata-ip=fe80::1":                          "want an IPv4 address that is not loopback",
		"--redirect-address=127.0.0.1":                   "want an IPv4 address that is not loopback",
		"--redirect-address=169.254.169.254":             "is the metadata service's own address",
		"--iptables-backend=x":                           `"x" is not an iptables backend: use "auto", "nft" or "legacy"`,
		"--host-network-pods=all":                        `want "node" or "bound"`,
		"--cgroup-root=":                                 "want an absolute path",
		"--redirect-mode=magic":                          `"magic" is not a redirect mode: use "auto", "redirect", "dnat", "ebpf" or "none"`,
		"--prometheus-port=2579":                         "--nmi-port and --prometheus-port are both 2579",
		"--http-probe-address=localhost":                 "want an IP address of the node, 127.0.0.1 for the node alone",
		"--metrics-address=224.0.0.1":                    "want an IP address of the node",
		"--metrics-address=fe80::1%eth0":                 "want an IP address of the node",
		"--startup-taint=a:PreferNoSchedule":             "want <key>[=<value>]:NoSchedule or <key>[=<value>]:NoExecute",
		"--startup-taint=a b:NoSchedule":                 `"a b" is not the key and value of a taint`,
		"--handover-dir=run/nmi":                         "want an absolute path",
		"--imds-token-rate=0":                            "want a number from 1 to 1000",
		"--max-connections=-1":                           "want a number from 1 to 1000000",
		"--allow-path=/metadata/identity":                "/metadata/identity cannot be allowed: want some of /metadata/scheduledevents",
		"--allow-path=/metadata/THIM/amd":                "/metadata/THIM/amd cannot be allowed",
		"--instance-metadata-namespaces=shop":            "--instance-metadata-namespaces limits nothing without --block-instance-metadata",
		"--instance-metadata-namespaces=*":               `"*" is not the name of a namespace`,
		"--host-token-uids=0,root":                       "want user IDs as numbers",
		"--federation=on":                                "want off or annotated",
		"--federation-tenant-id=a/b":                     "want the ID of a tenant, or one of its domains",
		"--federation-authority=http://e":                `"http://e" is not https`,
		"--federation-authority=https://e":               "neither one of Microsoft's authorities nor named by --entra-authority",
		"--federation-token-proxy=http://p":              `"http://p" is not https`,
		"--federation-token-proxy=https://p":             "set --federation-audience=api://AKSIdentityBinding",
		"--federation-token-proxy=https://p?":            `want https://<host>[:port][/<path>], no query`,
		"--federation-token-proxy-sni=p":                 "are of no use without --federation-token-proxy",
		"--federation-audience=":                         "--federation-audience is empty",
		"--federation-audience=api://AKSIdentityBinding": "needs --federation-token-proxy",
		"--entra-authority=http://entra":                 `"http://entra" is not https`,
		"--entra-authority=https://entra/x":              `"https://entra/x": want https://<host>[:port], no path or query`,
		"--entra-authority=a,,b":                         `"https://": want https://<host>[:port]`,
		"--v=x":                                          "want a whole number",
		"--v=99999999999":                                "want a whole number",
		"--probe-socket=probe.sock":                      "want an absolute path",
		"--deny-identity=kubelet":                        `"kubelet" is neither a client ID nor a resource ID: use a GUID`,
		"--deny-identity=/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i,": `"" is neither a client ID nor a resource ID`,
		"--exception-namespaces=*":    `"*" is not the name of a namespace: want names separated by commas, or "" for none`,
		"--exception-namespaces=a,,b": `"" is not the name of a namespace`,
		"--exception-namespaces=Shop": `"Shop" is not the name of a namespace`,
	} {
		_, err := parse("--node=n", "--operation-mode=managed", arg)
		require.ErrorContains(t, err, want, arg)
		name, _, _ := strings.Cut(arg, "=")
		assert.ErrorContains(t, err, name)
		assert.NotContains(t, err.Error(), "\n", arg)
	}
}

// TestDefaultProbeSocket is not made outside of the image: there its directory is missing.
func TestDefaultProbeSocket(t *testing.T) {
	_, err := os.Stat(filepath.Dir(defaultProbeSocket))
	c := mustParse(t, "--node=n")
	assert.Equal(t, err == nil, c.probeSocket == defaultProbeSocket)
	assert.Equal(t, "/nowhere/probe.sock", mustParse(t, "--node=n", "--probe-socket=/nowhere/probe.sock").probeSocket, "given, it is tried for ever")
	assert.Equal(t, defaultProbeSocket, probeCommand(newConfig()).Flags().Lookup(flagProbeSocket).DefValue)
}

func TestFlagsOfSeveralParts(t *testing.T) {
	c := mustParse(t, "--node=n", "--redirect-mode=none", "--allow-network-plugin-kubenet", "--metadata-ip=192.0.2.1", "--metadata-port=8080", "--nmi-port=99")
	assert.True(t, c.proxy.PodsOnly)
	assert.True(t, c.links.AllowUnguarded)
	assert.Equal(t, "192.0.2.1:8080", c.rules.Metadata.String())
	assert.Equal(t, "http://192.0.2.1:8080", c.upstream.IMDS.String())
	assert.Equal(t, uint16(99), c.rules.Port)
	assert.Equal(t, "0.0.0.0:99", c.front.addr.String())
}

func TestBindAddresses(t *testing.T) {
	cfg := mustParse(t, "--node=n", "--http-probe-address=::ffff:127.0.0.1", "--http-probe-port=8085", "--metrics-address=fd00::4")
	assert.Equal(t, "127.0.0.1:8085", cfg.probes.addr.String())
	assert.Equal(t, "[fd00::4]:9090", cfg.metrics.addr.String())
}

func TestAuthoritiesAreRepeatedOrSeparatedByCommas(t *testing.T) {
	cfg := mustParse(t, "--node=n", "--entra-authority=https://Entra.example/,entra2.example:8443", "--entra-authority=https://entra3.example:443")
	assert.Equal(t, []string{"entra.example", "entra2.example:8443", "entra3.example"}, cfg.upstream.Authorities)
}

func TestDeniedIdentitiesAreRepeatedOrSeparatedByCommas(t *testing.T) {
	const a, b, resource = "0be1e700-0000-4000-8000-00000000000a", "0be1e700-0000-4000-8000-00000000000b", "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/i"
	cfg := mustParse(t, "--node=n", "--deny-identity= "+strings.ToUpper(a)+", /Subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i", "--deny-identity="+b)
	assert.Equal(t, podresolver.DenyList{ClientIDs: []string{a, b}, ResourceIDs: []string{resource}}, cfg.resolver.Deny)
	assert.Zero(t, mustParse(t, "--node=n", "--deny-identity=").resolver.Deny)
}

func TestExceptionNamespacesNotGivenAreAllAndEmptyNone(t *testing.T) {
	namespaces := func(args ...string) []string {
		return mustParse(t, append(args, "--node=n")...).resolver.ExceptionNamespaces
	}
	assert.Nil(t, namespaces())
	assert.Equal(t, []string{}, namespaces("--exception-namespaces="))
	assert.Equal(t, []string{}, namespaces("--exception-namespaces", ""))
	assert.Equal(t, []string{"kube-system", "a", "b"}, namespaces("--exception-namespaces=kube-system", "--exception-namespaces=a, b"))
}

func TestWarningsAboutFlags(t *testing.T) {
	const client, resource = "0be1e700-0000-4000-8000-00000000000a", "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/i"
	for name, tc := range map[string]struct {
		args []string
		want string // "" for no warning
	}{
		"nothing":                           {[]string{"--operation-mode=managed"}, ""},
		"MIC's namespace in standard mode":  {[]string{"--MICNamespace=default"}, ""},
		"MIC's namespace in managed mode":   {[]string{"--MICNamespace=default", "--operation-mode=managed"}, "--MICNamespace is ignored in managed mode"},
		"turned off in managed mode":        {[]string{"--MICNamespace=", "--operation-mode=managed"}, ""},
		"a client ID is denied":             {[]string{"--deny-identity=" + client}, ""},
		"a client ID and a resource ID are": {[]string{"--deny-identity=" + client + "," + resource}, ""},
		"a resource ID is denied":           {[]string{"--deny-identity=" + resource}, "--deny-identity has more resource IDs than client IDs"},
		"the header need no header":         {[]string{"--metadata-header-required=false"}, "need no header"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			mustParse(t, append(tc.args, "--node=n")...).warn(slog.New(slog.NewTextHandler(&log, nil)))
			if tc.want == "" {
				assert.Empty(t, log.String())
				return
			}
			assert.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
			assert.Contains(t, log.String(), tc.want)
		})
	}
}

// TestExplainTakesWhatDecides: nmi explain must be able to decide as the agent does.
func TestExplainTakesWhatDecides(t *testing.T) {
	flags := explainCommand(newConfig()).Flags()
	for _, name := range []string{"operation-mode", "forceNamespaced", "MICNamespace", "deny-identity", "exception-namespaces", "strict-identity-selection"} {
		require.NotNil(t, flags.Lookup(name), name)
	}
	mode := flags.Lookup("operation-mode")
	assert.Empty(t, mode.DefValue, "explain has no mode of its own")
	assert.Contains(t, mode.Usage, "required where no agent answers")
}

func TestVersionAndHelp(t *testing.T) {
	for _, args := range [][]string{{"--version"}, {"version"}} {
		cmd := command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetArgs(args)
		require.NoError(t, cmd.ExecuteContext(t.Context()))
		assert.True(t, strings.HasPrefix(out.String(), "nmi dev (go"), out.String())
	}
}

func TestNoAgent(t *testing.T) {
	const socket = "/nowhere/probe.sock"
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"probe", "--probe-socket=" + socket}, []string{`no agent listens on "` + socket + `": `, "no such file or directory", "kubectl -n kube-system exec", "give the agent's --probe-socket"}},
		{[]string{"explain", "shop/cart", "--probe-socket=" + socket}, []string{`no agent listens on "` + socket + `": `, "nmi explain shop/cart", "give --operation-mode"}},
	} {
		cmd := command()
		cmd.SetArgs(tc.args)
		err := cmd.ExecuteContext(t.Context())
		for _, text := range tc.want {
			require.ErrorContains(t, err, text)
		}
	}
}

func TestProbes(t *testing.T) {
	notYet := errors.New("pods: waiting\nbindings: waiting")
	var trouble error
	h := &health{checks: []func() error{func() error { return trouble }, func() error { return nil }}, mode: func() string { return "redirect mode dnat: why" }, notes: func() []string { return nil }}
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(context.Background(), http.MethodGet, path, nil)
		h.handler().ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	check := func(path string, status int, body string) {
		t.Helper()
		gotStatus, gotBody := get(path)
		assert.Equal(t, status, gotStatus)
		assert.Equal(t, body, gotBody)
	}
	check("/readyz", 200, "ready\nredirect mode dnat: why\n")
	check("/healthz", 200, "Active")
	trouble = notYet
	check("/readyz", 503, "not ready:\n- pods: waiting\n- bindings: waiting\n")
	check("/healthz", 200, "Not Active")
	trouble = errStopping
	check("/readyz", 503, "not ready:\n- the agent is stopping\n")
	status, _ := get("/debug/pprof/")
	assert.Equal(t, 404, status)
}

// What deploy/manifests give the agent is understood, and hands no tokens to programs of the
// node unless that is asked for.
func TestFlagsOfTheManifest(t *testing.T) {
	manifest, err := os.ReadFile("../../deploy/manifests/daemonset.yaml")
	require.NoError(t, err)
	var args []string
	for _, arg := range regexp.MustCompile(`(?m)^ +- (--\S+)$`).FindAllSubmatch(manifest, -1) {
		args = append(args, string(arg[1]))
	}
	assert.Contains(t, args, "--operation-mode=managed")
	assert.Empty(t, mustParse(t, args...).proxy.HostTokenUIDs)
	assert.Equal(t, []uint32{0}, mustParse(t, "--node=n").proxy.HostTokenUIDs, "the flag's own default is the old NMI's")
}

func TestInstanceMetadataNamespaces(t *testing.T) {
	cfg := mustParse(t, "--node=n", "--block-instance-metadata", "--instance-metadata-namespaces=a, b", "--allow-path=/metadata/THIM")
	assert.Equal(t, []string{"a", "b"}, cfg.proxy.InstanceMetadataNamespaces)
	assert.Equal(t, []string{"/metadata/THIM"}, cfg.proxy.Allow)
}

func TestHostNetworkPodsNeedPrograms(t *testing.T) {
	for _, mode := range []string{"redirect", "dnat", "none"} {
		_, err := parse("--node=n", "--host-network-pods=bound", "--redirect-mode="+mode)
		require.EqualError(t, err, "--host-network-pods=bound needs --redirect-mode=ebpf: rules do not see pods on the host network", mode)
	}
	for _, mode := range []string{"auto", "ebpf"} {
		assert.True(t, mustParse(t, "--node=n", "--host-network-pods=bound", "--redirect-mode="+mode).rules.Programs.HostNetworkAll, mode)
	}
}

func TestRequiredPathIsNotTurnedOff(t *testing.T) {
	_, err := parse("--node=n", "--cgroup-root=sys")
	require.ErrorContains(t, err, "want an absolute path")
	assert.NotContains(t, err.Error(), "turn it off")
}
