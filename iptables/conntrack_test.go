package iptables

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"golang.org/x/sys/unix"
)

func TestStaleFlowsMatch(t *testing.T) {
	stale := staleFlows{metadata: metadata, local: map[netip.Addr]bool{
		netip.MustParseAddr("127.0.0.1"): true, netip.MustParseAddr("10.0.0.4"): true, netip.MustParseAddr("10.244.0.1"): true, DefaultAddress: true,
	}}
	for name, tc := range map[string]struct {
		protocol uint8
		from, to string // as the client sees it
		leads    string // where its packets go
		want     bool
	}{
		"a pod's, from before the rules":      {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "169.254.169.254:80", true},
		"a pod's, led to another machine":     {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "10.0.0.9:2579", true},
		"a pod's, led to an old NMI":          {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "127.0.0.1:2579", false},
		"a pod's, led to one that hands over": {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "10.244.0.1:2580", false},
		"a pod's, redirected":                 {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "10.244.0.1:2579", false},
		"a pod's, by our own address":         {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:80", "169.254.169.252:2579", false},
		"the node's own":                      {unix.IPPROTO_TCP, "10.0.0.4:40000", "169.254.169.254:80", "169.254.169.254:80", false},
		"to another port of the service":      {unix.IPPROTO_TCP, "10.244.0.7:40000", "169.254.169.254:443", "169.254.169.254:443", false},
		"to another address":                  {unix.IPPROTO_TCP, "10.244.0.7:40000", "168.63.129.16:80", "168.63.129.16:80", false},
		"of another protocol":                 {unix.IPPROTO_UDP, "10.244.0.7:40000", "169.254.169.254:80", "169.254.169.254:80", false},
		"to where the agent forwards itself":  {unix.IPPROTO_TCP, "169.254.169.252:40000", "169.254.169.254:80", "169.254.169.254:80", false},
	} {
		t.Run(name, func(t *testing.T) {
			from, to, leads := netip.MustParseAddrPort(tc.from), netip.MustParseAddrPort(tc.to), netip.MustParseAddrPort(tc.leads)
			orig := tuple{protocol: tc.protocol, src: from, dst: to}
			reply := tuple{protocol: tc.protocol, src: leads, dst: from}
			assert.Equal(t, tc.want, stale.match(orig, reply))
		})
	}
	assert.False(t, stale.match(tuple{}, tuple{}))

	// The first packet of these came, or claims to come, from the metadata service.
	for name, tc := range map[string]struct {
		to    string // as the packet says
		leads string // where its packets go
		back  string // where the answers go
		want  bool
	}{
		"forged, to a pod":                          {"10.244.0.7:40000", "10.244.0.7:40000", "169.254.169.254:80", true},
		"forged, to a pod's hostPort":               {"10.0.0.4:8080", "10.244.0.7:40000", "169.254.169.254:80", true},
		"forged, to a hostPort, and masqueraded":    {"10.0.0.4:8080", "10.244.0.7:40000", "10.0.0.4:50000", true},
		"an answer to the node that came first":     {"10.0.0.4:40000", "10.0.0.4:40000", "169.254.169.254:80", false},
		"an answer to the agent, by its address":    {"169.254.169.252:40000", "169.254.169.252:40000", "169.254.169.254:80", false},
		"forged, to the agent (it is not for it)":   {"10.244.0.1:2579", "10.244.0.1:2579", "169.254.169.254:80", false},
		"forged, to another machine of the cluster": {"10.0.0.9:40000", "10.0.0.9:40000", "169.254.169.254:80", true},
	} {
		t.Run(name, func(t *testing.T) {
			orig := tuple{protocol: unix.IPPROTO_TCP, src: metadata, dst: netip.MustParseAddrPort(tc.to)}
			reply := tuple{protocol: unix.IPPROTO_TCP, src: netip.MustParseAddrPort(tc.leads), dst: netip.MustParseAddrPort(tc.back)}
			assert.Equal(t, tc.want, stale.match(orig, reply))
		})
	}
	// Translated by another program's rule.
	assert.True(t, stale.match(
		tuple{unix.IPPROTO_TCP, netip.MustParseAddrPort("10.244.0.8:1"), netip.MustParseAddrPort("10.0.0.4:8080")},
		tuple{unix.IPPROTO_TCP, netip.MustParseAddrPort("10.244.0.7:40000"), metadata}))
}

// FuzzParseEntry parses arbitrary conntrack messages.
func FuzzParseEntry(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 20, 0, 1, 128, 16, 0, 1, 128, 8, 0, 1, 0, 10, 244, 0, 7, 4, 0, 2, 0})
	f.Add([]byte{2, 0, 0, 0, 3, 0, 1, 0})
	f.Fuzz(func(t *testing.T, entry []byte) {
		orig, reply, ok := parseEntry(entry)
		if ok && (!orig.src.IsValid() || !reply.src.IsValid()) {
			t.Fatalf("%v was read as %v and %v", entry, orig, reply)
		}
	})
}
