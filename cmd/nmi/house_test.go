package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const module = "github.com/podidentity/nmi/"

// rooms lists the packages of the project and, of each, the packages of the
// project that it may import. Data flows one way: tokencache never meets a pod,
// podresolver never meets a token, iptables meets neither. "*" is any.
var rooms = map[string][]string{
	"cmd/nmi":                    {"cmd/nmi/bootguard", "cmd/nmi/doctor", "cmd/nmi/events", "cmd/nmi/handover", "cmd/nmi/migrate", "cmd/nmi/startuptaint", "cmd/nmi/status", "cmd/nmi/telemetry", "cmd/nmi/terminal", "iptables", "iptables/ebpf", "iptables/links", "podresolver", "proxy", "proxy/listener", "proxy/upstream", "tokencache"},
	"cmd/nmi/bootguard":          {},
	"cmd/nmi/doctor":             {"cmd/nmi/handover", "cmd/nmi/terminal", "iptables", "iptables/links", "podresolver", "podresolver/aadpodidentity"},
	"cmd/nmi/events":             {"iptables", "podresolver", "proxy"},
	"cmd/nmi/handover":           {},
	"cmd/nmi/migrate":            {"cmd/nmi/terminal", "podresolver", "podresolver/aadpodidentity"},
	"cmd/nmi/startuptaint":       {},
	"cmd/nmi/telemetry":          {"cmd/nmi/events", "iptables", "iptables/links", "podresolver", "proxy", "proxy/histogram", "proxy/listener", "proxy/upstream", "tokencache"},
	"cmd/nmi/terminal":           {},
	"proxy/histogram":            {},
	"proxy":                      {"podresolver", "proxy/histogram", "proxy/listener", "proxy/upstream", "tokencache"},
	"cmd/nmi/status":             {"cmd/nmi/terminal", "iptables", "podresolver", "proxy", "proxy/upstream", "tokencache"},
	"proxy/listener":             {},
	"proxy/upstream":             {"proxy/histogram", "tokencache", "tokencache/limiter"},
	"proxy/imdstest":             {},
	"proxy/entratest":            {},
	"podresolver":                {"podresolver/aadpodidentity"},
	"podresolver/aadpodidentity": {},
	"podresolver/resolvertest":   {"podresolver/aadpodidentity"},
	"tokencache":                 {},
	"tokencache/limiter":         {},
	"iptables":                   {"iptables/capabilities", "iptables/ebpf", "iptables/links"},
	"iptables/capabilities":      {},
	"iptables/ebpf":              {"iptables/capabilities"},
	"iptables/links":             {},
	"deploy/testbed":             {"*"},
	"deploy/testbed/attack":      {},
	"deploy/testbed/container":   {},
	"deploy/testlog":             {},
	"deploy/chart":               {},
	"deploy/e2e":                 {"*"},
	"deploy/demo":                {"*"},
	"deploy/conformance":         {"*"},
	"deploy/conformance/cmd":     {"*"},
	"bench":                      {"*"},
	"bench/scale":                {"*"},
	"bench/measure":              {},
	"bench/misuse":               {"*"},
	"bench/soak":                 {"*"},
	"bench/wrk":                  {"*"},
	"bench/openloop":             {"*"},
	"bench/peer":                 {"*"},
	"bench/report":               {},
	"bench/sdk":                  {"*"},

	"deploy/clusters/asker":         {"deploy/clusters/asker/answers", "deploy/testbed/attack", "proxy/imdstest"},
	"deploy/clusters/asker/answers": {},
	"deploy/clusters/imds":          {"deploy/clusters/imds/control", "proxy/entratest", "proxy/imdstest"},
	"deploy/clusters/imds/control":  {"proxy/entratest", "proxy/imdstest"},
	"deploy/clusters/e2e":           {"*"},
	"deploy/clusters/pause":         {},
}

// goPackage is what go list says of a package.
type goPackage struct {
	ImportPath, Dir       string
	GoFiles, XTestGoFiles []string
	TestGoFiles           []string
	Imports               []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json", "-tags=e2e,cluster", module+"...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	require.NoError(t, err)
	var all []goPackage
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		require.NoError(t, err)
		all = append(all, p)
	}
}

func TestEachRoomImportsWhatItMay(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		seen[name] = true
		allowed, ok := rooms[name]
		if !assert.True(t, ok, "package %s is not in the table of rooms: which room is it part of?", name) {
			continue
		}
		for _, imported := range p.Imports {
			if room, ours := strings.CutPrefix(imported, module); ours && !slices.Contains(allowed, "*") {
				assert.Contains(t, allowed, room, "%s must not import %s", name, room)
			}
		}
	}
	for name := range rooms {
		assert.True(t, seen[name], "room %s is in the table, but there is no such package", name)
	}
}

func TestEachPackageHasOneComment(t *testing.T) {
	for _, p := range packages(t) {
		files := p.GoFiles
		if len(files) == 0 { // tests alone
			files = append(p.TestGoFiles, p.XTestGoFiles...)
		}
		var with []string
		for _, file := range files {
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.PackageClauseOnly|parser.ParseComments)
			require.NoError(t, err)
			if parsed.Doc != nil {
				with = append(with, file)
			}
		}
		assert.Len(t, with, 1, "files of %s with a package comment", p.ImportPath)
	}
}
