package ebpf_test

import (
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"testing"

	cilium "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// BenchmarkConnect is what a new connection costs a pod: to the agent, which closes it at once, by
// these programs and by an iptables rule; and to a server that has nothing to do with it, on the
// pod's own loopback, with and without the programs. Each turn is a connect() and a close(). On a
// busy machine the time that the kernel has measured for each program says more than the whole.
func BenchmarkConnect(b *testing.B) {
	for _, bc := range []struct {
		name     string
		programs bool
		rule     string // of the nat table, on the node
		own      bool   // to the server of the pod's own
	}{
		{"agent/ebpf", true, "", false},
		{"agent/redirect", false, "-j REDIRECT --to-ports 2579", false},
		{"agent/dnat", false, "-j DNAT --to-destination " + target.String(), false},
		{"unrelated/programs", true, "", true},
		{"unrelated/none", false, "", true},
	} {
		b.Run(bc.name, func(b *testing.B) {
			n := newNode(b)
			if bc.programs {
				n.ensure()
			}
			a := n.addPod("10.244.0.7", guaranteedA, testbed.Ptp)
			if bc.rule != "" {
				do := func(action string) {
					host := n.addHostPod(ownCgroup)
					got := host.do(request{How: "run", Command: "iptables -t nat " + action + " PREROUTING -d 169.254.169.254 -p tcp --dport 80 " + bc.rule})
					require.Empty(b, got.Err, got.Answer)
				}
				do("-A")
				b.Cleanup(func() { do("-D") })
			}
			ln, err := net.Listen("tcp4", "0.0.0.0:2579")
			require.NoError(b, err)
			b.Cleanup(func() { _ = ln.Close() })
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					if bc.programs { // as the agent does
						_, _ = n.programs.Load().Caller(c.(*net.TCPConn))
					}
					_ = c.(*net.TCPConn).SetLinger(0)
					_ = c.Close()
				}
			}()
			stats, err := cilium.EnableStats(unix.BPF_STATS_RUN_TIME)
			require.NoError(b, err)
			defer stats.Close()
			r := request{How: "connects", Count: b.N}
			if bc.own {
				r.Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 9).String()
			}
			b.ResetTimer()
			got := a.do(r)
			b.StopTimer()
			require.Empty(b, got.Err)
			took, err := strconv.ParseInt(got.Answer, 10, 64)
			require.NoError(b, err)
			b.ReportMetric(float64(took)/float64(b.N), "ns/op")
			if !bc.programs {
				return
			}
			for _, hook := range allHooks {
				l, err := link.LoadPinnedLink(filepath.Join(n.cfg.Pins, "links", hook), nil)
				require.NoError(b, err)
				info, err := l.Info()
				require.NoError(b, err)
				_ = l.Close()
				program, err := cilium.NewProgramFromID(info.Program)
				require.NoError(b, err)
				stats, err := program.Stats()
				require.NoError(b, err)
				_ = program.Close()
				if stats.RunCount > 0 {
					b.ReportMetric(float64(stats.Runtime)/float64(b.N), hook+"-ns/op")
				}
			}
		})
	}
}
