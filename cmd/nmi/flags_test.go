package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
)

func parse(t *testing.T, args ...string) (*options, error) {
	t.Helper()
	o := newOptions()
	fs := pflag.NewFlagSet("nmi", pflag.ContinueOnError)
	o.addTo(fs)
	return o, fs.Parse(args)
}

// parsed is the configuration of a command line that is fit for use.
func parsed(t *testing.T, args ...string) config {
	t.Helper()
	o, err := parse(t, args...)
	require.NoError(t, err)
	cfg, err := o.config()
	require.NoError(t, err)
	return cfg
}

func TestDefaults(t *testing.T) {
	o, err := parse(t, "--node=n", "--operation-mode=Managed")
	require.NoError(t, err)
	cfg, err := o.config()
	require.NoError(t, err)
	assert.Equal(t, config{
		node: "n", metadata: netip.MustParseAddrPort("169.254.169.254:80"),
		mode: iptables.AutoMode, backend: iptables.Auto, address: netip.MustParseAddr("169.254.169.252"), interval: time.Minute, userAgent: "nmi/dev",
		pods:    endpoint{"nmi-port", netip.MustParseAddrPort("0.0.0.0:2579")},
		probes:  endpoint{"http-probe-port", netip.MustParseAddrPort("0.0.0.0:8080")},
		metrics: endpoint{"prometheus-port", netip.MustParseAddrPort("0.0.0.0:9090")}, handoverDir: "/run/nmi",
		tokensPerSecond: 18, tokensAtOnce: 4, maxConnections: 512, maxConnectionsPerPod: 64, hostTokenUIDs: []uint32{0},
		resolving: podresolver.Config{Node: "n", Mode: podresolver.Managed, PodWait: 3 * time.Second, IdentityWait: 10 * time.Second},
	}, cfg)
}

// TestEveryFlagOfTheOldNMIIsTaken gives each flag of aad-pod-identity v1.8.17
// (cmd/nmi/main.go, pkg/log/options.go and klog's) a value.
func TestEveryFlagOfTheOldNMIIsTaken(t *testing.T) {
	o, err := parse(t,
		"--nmi-listen-address=127.0.0.1", "--nmi-port=2579", "--metadata-ip=169.254.169.254", "--metadata-port=80", "--node=n",
		"--ipt-update-interval-sec=30", "--MICNamespace=default", "--forceNamespaced", "--operation-mode=managed",
		"--http-probe-port=8085", "--prometheus-port=9090", "--retry-attempts-for-created=16", "--retry-attempts-for-assigned=4",
		"--find-identity-retry-interval=5", "--enableScaleFeatures=true", "--enableProfile=false", "--block-instance-metadata=true",
		"--metadata-header-required=false", "--allow-network-plugin-kubenet=false", "--kubelet-config=/etc/default/kubelet",
		"--set-retry-after-header=false", "--enable-conntrack-deletion=false", "--log-format=json", "--custom-user-agent=acme",
		"--add_dir_header", "--alsologtostderr", "--log_backtrace_at=main.go:1", "--log_dir=", "--log_file=", "--log_file_max_size=1",
		"--logtostderr=true", "--one_output", "--skip_headers", "--skip_log_headers", "--stderrthreshold=2", "-v=5", "--v=5", "--vmodule=",
		"--version=false",
	)
	require.NoError(t, err)
	cfg, err := o.config()
	require.NoError(t, err)
	assert.True(t, cfg.blockInstance)
	assert.True(t, cfg.headerOptional)
	assert.Equal(t, "nmi/dev acme", cfg.userAgent)
	assert.True(t, o.logger(&bytes.Buffer{}).Enabled(t.Context(), -4), "-v=5 is debug")
}

func TestUnusableValuesNameTheFlagAndSayWhatToDo(t *testing.T) {
	for arg, want := range map[string]string{
		"--node=":                             "--node is required",
		"--operation-mode=x":                  `--operation-mode=x is unknown: use "managed" or "standard"`,
		"--pod-wait=0s":                       "--pod-wait=0s is not usable: use more than 0s, at most 1m0s",
		"--identity-wait=2m":                  "--identity-wait=2m0s is not usable",
		"--max-staleness=1m":                  "--max-staleness=1m0s is not usable: use 0 to turn it off, or at least 3m0s",
		"--log-format=xml":                    `--log-format=xml is unknown: use "text" or "json"`,
		"--ipt-update-interval-sec=0":         "--ipt-update-interval-sec=0 is not usable: use 1 to 86400",
		"--ipt-update-interval-sec=86401":     "--ipt-update-interval-sec=86401 is not usable",
		"--nmi-port=0":                        "--nmi-port=0 is not a port",
		"--http-probe-port=2579":              "--nmi-port and --http-probe-port are both 2579",
		"--metadata-ip=fe80::1":               "--metadata-ip=fe80::1 is not usable",
		"--redirect-address=127.0.0.1":        "--redirect-address=127.0.0.1 is not usable",
		"--redirect-address=169.254.169.254":  "is the metadata service's own address",
		"--iptables-backend=x":                `--iptables-backend: "x" is not an iptables backend: use "auto", "nft" or "legacy"`,
		"--redirect-mode=magic":               `--redirect-mode: "magic" is not a redirect mode: use "auto", "redirect", "dnat" or "none"`,
		"--prometheus-port=2579":              "--nmi-port and --prometheus-port are both 2579",
		"--http-probe-address=localhost":      "--http-probe-address=localhost is not usable: give an IP address of the node, 127.0.0.1 for the node alone",
		"--metrics-address=224.0.0.1":         "--metrics-address=224.0.0.1 is not usable",
		"--metrics-address=fe80::1%eth0":      "--metrics-address=fe80::1%eth0 is not usable",
		"--handover-dir=run/nmi":              "--handover-dir=run/nmi is not usable: give an absolute path",
		"--imds-token-rate=0":                 "--imds-token-rate=0 is not usable: give a number from 1 to 1000",
		"--max-connections=-1":                "--max-connections=-1 is not usable",
		"--allow-path=/metadata/identity":     "--allow-path=/metadata/identity is not one that can be allowed: use /metadata/scheduledevents",
		"--allow-path=/metadata/THIM/amd":     "--allow-path=/metadata/THIM/amd is not one that can be allowed",
		"--instance-metadata-namespaces=shop": "--instance-metadata-namespaces limits nothing without --block-instance-metadata",
		"--instance-metadata-namespaces=*":    `--instance-metadata-namespaces: "*" is not the name of a namespace`,
		"--host-token-uids=0,root":            "--host-token-uids=0,root is not usable: give user IDs as numbers",
		"--entra-authority=http://entra":      `--entra-authority: "http://entra" is not https`,
		"--entra-authority=https://entra/x":   `--entra-authority: "https://entra/x" is more or less than https://<host>`,
		"--entra-authority=a,,b":              `--entra-authority: "https://" is more or less than https://<host>`,
		"--probe-socket=probe.sock":           "--probe-socket=probe.sock is not usable: give an absolute path",
		"--deny-identity=kubelet":             `--deny-identity: "kubelet" is neither a client ID nor a resource ID: use a GUID`,
		"--deny-identity=/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i,": `--deny-identity: "" is neither a client ID nor a resource ID`,
		"--exception-namespaces=*":    `--exception-namespaces: "*" is not the name of a namespace: give names separated by commas, or "" for none`,
		"--exception-namespaces=a,,b": `--exception-namespaces: "" is not the name of a namespace`,
		"--exception-namespaces=Shop": `--exception-namespaces: "Shop" is not the name of a namespace`,
	} {
		o, err := parse(t, "--node=n", "--operation-mode=managed", arg)
		require.NoError(t, err, arg)
		_, err = o.config()
		require.ErrorContains(t, err, want, arg)
		assert.NotContains(t, err.Error(), "\n", arg)
	}
	_, err := parse(t, "--nmi-port=65536")
	assert.ErrorContains(t, err, "nmi-port")
}

func TestBindAddresses(t *testing.T) {
	o, err := parse(t, "--node=n", "--http-probe-address=::ffff:127.0.0.1", "--http-probe-port=8085", "--metrics-address=fd00::4")
	require.NoError(t, err)
	cfg, err := o.config()
	require.NoError(t, err)
	assert.Equal(t, "127.0.0.1:8085", cfg.probes.addr.String())
	assert.Equal(t, "[fd00::4]:9090", cfg.metrics.addr.String())
}

func TestAuthoritiesAreRepeatedOrSeparatedByCommas(t *testing.T) {
	o, err := parse(t, "--node=n", "--entra-authority=https://Entra.example/,entra2.example:8443", "--entra-authority=https://entra3.example:443")
	require.NoError(t, err)
	cfg, err := o.config()
	require.NoError(t, err)
	assert.Equal(t, []string{"entra.example", "entra2.example:8443", "entra3.example"}, cfg.authorities)
}

func TestDeniedIdentitiesAreRepeatedOrSeparatedByCommas(t *testing.T) {
	const a, b, resource = "0be1e700-0000-4000-8000-00000000000a", "0be1e700-0000-4000-8000-00000000000b", "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/i"
	cfg := parsed(t, "--node=n", "--deny-identity= "+strings.ToUpper(a)+", /Subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i", "--deny-identity="+b)
	assert.Equal(t, podresolver.DenyList{ClientIDs: []string{a, b}, ResourceIDs: []string{resource}}, cfg.resolving.Deny)
	assert.Zero(t, parsed(t, "--node=n", "--deny-identity=").resolving.Deny)
}

func TestExceptionNamespacesNotGivenAreAllAndEmptyNone(t *testing.T) {
	namespaces := func(args ...string) []string {
		return parsed(t, append(args, "--node=n")...).resolving.ExceptionNamespaces
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
		"the header is not asked for":       {[]string{"--metadata-header-required=false"}, "is not asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			parsed(t, append(tc.args, "--node=n")...).warn(slog.New(slog.NewTextHandler(&log, nil)))
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
	flags := explainCommand(newOptions()).Flags()
	for _, name := range []string{"operation-mode", "forceNamespaced", "MICNamespace", podresolver.DenyIdentityFlag, podresolver.ExceptionNamespacesFlag, "strict-identity-selection"} {
		assert.NotNil(t, flags.Lookup(name), name)
	}
}

func TestEveryFlagIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/flags.md")
	require.NoError(t, err)
	fs := pflag.NewFlagSet("nmi", pflag.ContinueOnError)
	newOptions().addTo(fs)
	fs.VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			documented := strings.Contains(string(doc), "`--"+f.Name+"`") // a failure need not show the page
			assert.True(t, documented, "docs/flags.md has no `--%s`", f.Name)
			assert.NotEmpty(t, f.Usage, f.Name)
		}
	})
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

func TestProbes(t *testing.T) {
	notYet := errors.New("pods: waiting\nbindings: waiting")
	var trouble error
	h := &health{checks: []func() error{func() error { return trouble }, func() error { return nil }}, note: func() string { return "redirect mode dnat: why" }}
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
	assert.Empty(t, parsed(t, args...).hostTokenUIDs)
	assert.Equal(t, []uint32{0}, parsed(t, "--node=n").hostTokenUIDs, "the flag's own default is the old NMI's")
}

func TestInstanceMetadataNamespaces(t *testing.T) {
	cfg := parsed(t, "--node=n", "--block-instance-metadata", "--instance-metadata-namespaces=a, b", "--allow-path=/metadata/THIM")
	assert.Equal(t, []string{"a", "b"}, cfg.instanceNamespaces)
	assert.Equal(t, []string{"/metadata/THIM"}, cfg.allow)
}
