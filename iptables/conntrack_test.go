package iptables

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"golang.org/x/sys/unix"
)

func TestWhichConnectionsBypassTheAgent(t *testing.T) {
	b := bypassing{metadata: metadata, local: map[netip.Addr]bool{
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
			assert.Equal(t, tc.want, b.match(orig, reply))
		})
	}
	assert.False(t, b.match(tuple{}, tuple{}))
}

// FuzzParseEntry: the kernel is trusted to be kind, not to be understood.
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
