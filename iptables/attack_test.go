package iptables_test

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testbed/attack"
	"github.com/podidentity/nmi/iptables"
)

// fences are the fences that are in place in a test.
type fences struct{ routing, guard bool }

func (f fences) String() string {
	switch f {
	case fences{routing: true}:
		return "routing fence alone"
	case fences{guard: true}:
		return "guard alone"
	case fences{true, true}:
		return "both fences"
	default:
		return "no fence"
	}
}

// noFence is the control: the attack works.
var noFence fences

// fencesToTry lists the combinations to test. The routing fence does not depend on the
// backend.
func fencesToTry(backend iptables.Backend) []fences {
	if backend == iptables.Legacy {
		return []fences{noFence, {guard: true}}
	}
	return []fences{noFence, {guard: true}, {routing: true}, {true, true}}
}

// fenced writes the rules of a mode once, and removes all fences but f.
func (n *node) fenced(mode iptables.Mode, f fences) {
	n.t.Helper()
	n.redirect(mode)()
	n.iptablesOn(n.backend, "raw", "-F") // it would drop forged packets before either fence
	if !f.routing {
		for _, pref := range []string{"11", "10", "12"} {
			n.run("", "ip", "rule", "del", "pref", pref)
		}
	}
	if !f.guard {
		n.iptablesOn(n.backend, "mangle", "-F")
	}
	require.NoError(n.t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
}

// attacker is a pod that forges packets.
type attacker struct {
	*testbed.Pod
	what  string
	opens bool // without a fence the kernel accepts its forged packets
	ports uint16
}

// nextPorts returns unused ports of the pod.
func (a *attacker) nextPorts(n int) (ports []uint16) {
	for range n {
		a.ports++
		ports = append(ports, 20000+a.ports)
	}
	return ports
}

// attackers returns pods of all shapes, with rp_filter 0 and 2 (loose).
func (n *node) attackers() []*attacker {
	n.t.Helper()
	var all []*attacker
	add := func(pod *testbed.Pod, shape testbed.Shape, setting string) {
		link := pod.Link
		if shape == testbed.Bridge {
			link = testbed.BridgeName
		}
		n.rpFilter(link, setting)
		all = append(all, &attacker{
			Pod: pod, what: fmt.Sprintf("%s pod, rp_filter %s", shape, setting),
			// With rp_filter 2 the kernel accepts no packet on an interface without an
			// address (__fib_validate_source, no_addr).
			opens: shape != testbed.Routed || setting == "0",
		})
	}
	add(n.pod, testbed.Ptp, "0")
	for i, setting := range []string{"0", "2"} {
		pod, _ := n.addPod(fmt.Sprintf("10.244.1.%d", i+1), testbed.Routed)
		add(pod, testbed.Routed, setting)
	}
	pod, _ := n.addPod("10.244.1.3", testbed.Ptp)
	add(pod, testbed.Ptp, "2")
	pod, _ = n.addPod("10.244.0.20", testbed.Bridge)
	add(pod, testbed.Bridge, "2")
	return all
}

func TestForgedPackets(t *testing.T) {
	const attempts = 4
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			pods := n.attackers()
			n.agent(iptables.Redirect) // on all addresses
			for _, invalidDropped := range []bool{false, true} {
				patience := 500 * time.Millisecond
				if invalidDropped {
					patience = 1400 * time.Millisecond // the metadata service's second SYN/ACK included
					n.iptablesOn(backend, "filter", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
				}
				for _, standing := range fencesToTry(backend) {
					n.fenced(iptables.DNAT, standing)
					n.leaks.Store(0)
					missing := make(map[string]bool) // attacks that must succeed without a fence
					var mu sync.Mutex                // guards missing
					round := func() {
						var attacking sync.WaitGroup
						for _, pod := range pods {
							for _, first := range []attack.FirstPacket{attack.ACK, attack.SYN} {
								ports := pod.nextPorts(attempts)
								attacking.Go(func() {
									results, err := pod.Attack(t.Context(), attack.Config{First: first, Ports: ports, Patience: patience, Path: "/"})
									assert.NoError(t, err)
									mu.Lock()
									defer mu.Unlock()
									what := fmt.Sprintf("%s, %s, INVALID dropped: %t", pod.what, first, invalidDropped)
									if _, ok := missing[what]; !ok && pod.opens && (first == attack.SYN || !invalidDropped) {
										missing[what] = true
									}
									for _, result := range results {
										if result.Answer == "imds" {
											missing[what] = false
											assert.Equal(t, noFence, standing, what)
										}
									}
								})
							}
						}
						attacking.Wait()
					}
					round()
					if standing == noFence {
						// Attempts succeed by chance: see attack.SYN.
						for range 10 {
							if !anyTrue(missing) {
								break
							}
							round()
						}
						for what, isMissing := range missing {
							assert.False(t, isMissing, "the attack did not work where it should: %s", what)
						}
						continue
					}
					assert.Zero(t, n.leaks.Load(), "%s, INVALID dropped: %t", standing, invalidDropped)
					for _, pod := range pods {
						assert.Equal(t, "agent", ask(pod.Pod), "%s: served with %s", pod.what, standing)
					}
				}
			}
			n.iptablesOn(backend, "filter", "-F", "FORWARD")
		})
	}
}

func anyTrue(m map[string]bool) bool {
	for _, b := range m {
		if b {
			return true
		}
	}
	return false
}

// Through a host port of the pod, the request even has the node's address. The metadata
// service's first reply is delayed, as over a real network: otherwise it would match the
// entry before the second forged packet.
func TestForgedPacketsThroughHostPort(t *testing.T) {
	const attempts = 8
	n := newNode(t, iptables.NFT, testbed.Ptp)
	n.agent(iptables.Redirect) // on all addresses
	pod := &attacker{Pod: n.pod}
	// As kube-proxy does. Otherwise the pod would also be served under its own address, by
	// its second SYN.
	n.iptablesOn(n.backend, "filter", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
	defer n.iptablesOn(n.backend, "filter", "-F", "FORWARD")
	for _, standing := range fencesToTry(n.backend) {
		n.fenced(iptables.DNAT, standing)
		n.leaks.Store(0)
		for range 4 { // each has a chance of 255 in 256
			ports := pod.nextPorts(attempts)
			for i, port := range ports {
				n.iptables("-A", "PREROUTING", "-d", testbed.NodeAddress, "-p", "tcp", "--dport", fmt.Sprint(8080+i),
					"-j", "DNAT", "--to-destination", netip.AddrPortFrom(pod.Addr, port).String())
			}
			n.answersLost("-A")
			var attacking sync.WaitGroup
			attacking.Go(func() {
				_, err := pod.Attack(t.Context(), attack.Config{
					First: attack.SYN, Ports: ports, Host: netip.MustParseAddr(testbed.NodeAddress), HostPort: 8080,
					Patience: 1800 * time.Millisecond, Path: "/",
				})
				assert.NoError(t, err)
			})
			time.Sleep(400 * time.Millisecond) // how late the answer is
			n.answersLost("-D")
			attacking.Wait()
			for i, port := range ports {
				n.iptables("-D", "PREROUTING", "-d", testbed.NodeAddress, "-p", "tcp", "--dport", fmt.Sprint(8080+i),
					"-j", "DNAT", "--to-destination", netip.AddrPortFrom(pod.Addr, port).String())
			}
			if standing != noFence || n.leaks.Load() > 0 {
				break
			}
		}
		if standing == noFence {
			assert.NotZero(t, n.leaks.Load(), "the attack works")
			assert.Equal(t, testbed.NodeAddress, n.lastCaller(), "in the node's name")
			continue
		}
		assert.Zero(t, n.leaks.Load(), standing)
		assert.Equal(t, "agent", n.ask(), standing)
	}
}

// answersLost adds ("-A") or deletes ("-D") a rule that drops the metadata service's
// SYN/ACKs.
func (n *node) answersLost(do string) {
	n.t.Helper()
	n.iptablesOn(n.backend, "raw", do, "PREROUTING", "-i", n.network.Uplink.Name, "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-j", "DROP")
}

// Whatever another program does to connections before the redirect, pods do not reach the
// metadata service.
func TestOtherProgramsBypassingTheRedirect(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect) // on all addresses
			for _, tc := range []struct {
				what     string
				do, undo func()
			}{
				{
					"NOTRACK for pods, an option of Cilium and Calico",
					func() {
						n.iptablesOn(backend, "raw", "-A", "PREROUTING", "-s", "10.244.0.0/16", "-j", "NOTRACK")
					},
					func() { n.iptablesOn(backend, "raw", "-F") },
				},
				{
					"another program's DNAT first",
					func() {
						n.run("table ip other {\nchain prerouting {\ntype nat hook prerouting priority -110;\nip daddr 169.254.169.254 tcp dport 80 dnat to 169.254.169.254:80\n}\n}\n", "nft", "-f", "-")
					},
					func() { n.run("", "nft", "delete", "table", "ip", "other") },
				},
				{
					"an ACCEPT before the jump",
					func() { n.iptables("-I", "PREROUTING", "1", "-j", "ACCEPT") },
					func() { n.iptables("-D", "PREROUTING", "1") },
				},
				{
					"nat flushed, FORWARD accepted",
					func() {
						n.iptables("-F")
						n.iptablesOn(backend, "filter", "-I", "FORWARD", "1", "-j", "ACCEPT")
					},
					func() { n.iptablesOn(backend, "filter", "-F", "FORWARD") },
				},
			} {
				for _, standing := range fencesToTry(backend) {
					n.fenced(iptables.DNAT, standing)
					tc.do()
					n.leaks.Store(0)
					answer := askFor(n.pod, 300*time.Millisecond)
					if standing == noFence {
						assert.Equal(t, "imds", answer, "%s bypasses the redirect", tc.what)
					} else {
						assert.Empty(t, answer, "%s: %s", standing, tc.what)
						assert.Zero(t, n.leaks.Load(), "%s: %s", standing, tc.what)
					}
					tc.undo()
				}
			}
		})
	}
}

// Another program flushes one kind of rules repeatedly, while pods send requests.
func TestFlushLeaksNoRequest(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			second, _ := n.addPod("10.244.0.8", testbed.Ptp)
			n.agent(iptables.Redirect)
			r, _ := n.reconcile(n.config(iptables.Redirect))
			for _, tc := range []struct {
				what   string
				times  int
				flush  func()
				served bool // pods are still served
			}{
				{"nat", 200, func() { n.iptables("-F") }, false},
				{"mangle", 50, func() { n.iptablesOn(backend, "mangle", "-F") }, true},
				{"routing rules", 50, func() {
					n.run("", "sh", "-c", "ip rule del pref 11; ip rule del pref 10; ip rule del pref 12; true")
				}, true},
			} {
				done := make(chan struct{})
				var asking sync.WaitGroup
				for _, pod := range []*testbed.Pod{n.pod, second} {
					asking.Go(func() {
						for {
							answer := askFor(pod, 100*time.Millisecond)
							if tc.served {
								answer = ask(pod)
							}
							assert.NotEqual(t, "imds", answer)
							if tc.served {
								assert.Equal(t, "agent", answer, tc.what)
							}
							select {
							case <-done:
								return
							default:
							}
						}
					})
				}
				for range tc.times {
					tc.flush()
				}
				close(done)
				asking.Wait()
				assert.Zero(t, n.leaks.Load(), tc.what)
				n.eventually(func() bool { return n.inPlace() && len(n.forward("mangle")) == 1 }, tc.what+" back")
				assert.Equal(t, "agent", n.ask())
			}
			n.eventually(func() bool { // the last reconciliation may be debounced
				lost := r.Stats().Lost
				return lost["redirect"] > 0 && lost["guard"] > 0 && lost["routing"] > 0
			}, "each loss is counted")
			assert.Zero(t, r.Stats().Lost["wireserver"])
		})
	}
}

// Conntrack entries of packets that were forged before the rules were in place are
// deleted.
func TestForgedStaleFlows(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	n.iptables("-A", "POSTROUTING", "-s", "10.255.0.0/16", "-j", "MASQUERADE") // connections are tracked already
	pod := &attacker{Pod: n.pod}
	ports := pod.nextPorts(2)
	results, err := pod.Attack(t.Context(), attack.Config{First: attack.ACK, Ports: ports, Patience: patience, Path: "/"})
	require.NoError(t, err)
	require.Equal(t, "imds", results[0].Answer)
	require.Len(t, forgedEntries(t), len(ports))
	n.agent(iptables.Redirect)
	r, _ := n.reconcile(n.config(iptables.Redirect))
	assert.Empty(t, forgedEntries(t))
	assert.EqualValues(t, len(ports), r.Stats().StaleFlows)
	assert.Equal(t, "agent", n.ask())
}

// forgedEntries lists conntrack entries that the metadata service seems to have opened.
func forgedEntries(t *testing.T) (found []string) {
	t.Helper()
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
	require.NoError(t, err)
	for _, f := range flows {
		if f.Forward.SrcIP.String() == "169.254.169.254" {
			found = append(found, f.String())
		}
	}
	return found
}
