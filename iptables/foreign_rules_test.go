package iptables_test

import (
	"fmt"
	"os/exec"
	"strings"

	"github.com/stretchr/testify/require"
)

// run runs a command of another program with an input, and returns its output.
func (n *node) run(input, name string, args ...string) string {
	n.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	var warnings strings.Builder // of iptables-nft that there are legacy tables, in mid-line
	cmd.Stderr = &warnings
	out, err := cmd.Output()
	require.NoError(n.t, err, warnings.String())
	return string(out)
}

// restore changes tables as other programs do: chains that input names are flushed, others
// stay.
func (n *node) restore(input string) {
	n.t.Helper()
	n.run(input, "iptables-"+string(n.backend)+"-restore", "--noflush", "--wait=10")
}

// first returns the lines that move a jump to the first place in PREROUTING of nat, or
// insert it there.
func (n *node) first(jump string) string {
	n.t.Helper()
	again := ""
	if strings.Contains(n.iptables("-S", "PREROUTING"), "-A PREROUTING "+jump) {
		again = "-D PREROUTING " + jump + "\n"
	}
	return again + "-I PREROUTING 1 " + jump + "\n"
}

// otherRules lists the node's chains and rules of other programs, by table.
func (n *node) otherRules() []string {
	n.t.Helper()
	var rules []string
	table := ""
	for line := range strings.Lines(n.run("", "iptables-"+string(n.backend)+"-save")) {
		line = strings.TrimSpace(line)
		chain, made := strings.CutSuffix(line, " - [0:0]")
		switch {
		case strings.Contains(line, "aad-metadata"), strings.Contains(line, "nmi-"):
		case strings.HasPrefix(line, "*"):
			table = line
		case made:
			rules = append(rules, table+" "+chain)
		case strings.HasPrefix(line, "-A "):
			rules = append(rules, table+" "+line)
		}
	}
	return rules
}

// changed lists the lines that are not in both, or not as often.
func changed(before, after []string) (lines []string) {
	count := make(map[string]int)
	for _, line := range before {
		count[line]--
	}
	for _, line := range after {
		count[line]++
	}
	for line, n := range count {
		if n != 0 {
			lines = append(lines, fmt.Sprintf("%+d %s", n, line))
		}
	}
	return lines
}

// forgetRules removes every rule, chain and set from the node.
func (n *node) forgetRules() {
	n.t.Helper()
	for _, table := range []string{"raw", "mangle", "nat", "filter"} {
		n.run("", "iptables-"+string(n.backend), "--wait", "-t", table, "-F")
		n.run("", "iptables-"+string(n.backend), "--wait", "-t", table, "-X")
	}
	n.run("", "ipset", "destroy")
	n.run("add table ip kube-proxy\ndelete table ip kube-proxy\n", "nft", "-f", "-")
}

// kubeProxy writes rules as kube-proxy does for a thousand services: 5,000 rules, in
// chains, after a jump that it inserts first.
func (n *node) kubeProxy() {
	n.t.Helper()
	var b strings.Builder
	b.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n")
	for i := range 1000 {
		fmt.Fprintf(&b, ":KUBE-SVC-%04d - [0:0]\n:KUBE-SEP-%04d - [0:0]\n", i, i)
		fmt.Fprintf(&b, "-A KUBE-SERVICES -d 10.96.%d.%d/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%04d\n", i/250, i%250+1, i)
		fmt.Fprintf(&b, "-A KUBE-SVC-%04d ! -s 10.244.0.0/16 -p tcp -j KUBE-MARK-MASQ\n-A KUBE-SVC-%04d -j KUBE-SEP-%04d\n", i, i, i)
		fmt.Fprintf(&b, "-A KUBE-SEP-%04d -s 10.244.1.%d/32 -j KUBE-MARK-MASQ\n", i, i%250+1)
		fmt.Fprintf(&b, "-A KUBE-SEP-%04d -p tcp -m tcp -j DNAT --to-destination 10.244.1.%d:8080\n", i, i%250+1)
	}
	b.WriteString(n.first("-j KUBE-SERVICES") + "COMMIT\n")
	n.restore(b.String())
}

// kubeProxyIPVS writes a constant number of rules: services' addresses are in sets.
func (n *node) kubeProxyIPVS() {
	n.t.Helper()
	n.run(`create KUBE-CLUSTER-IP hash:ip,port
create KUBE-LOOP-BACK hash:ip,port,ip
create KUBE-LOAD-BALANCER hash:ip,port
create KUBE-LOAD-BALANCER-LOCAL hash:ip,port
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
create KUBE-NODE-PORT-LOCAL-TCP bitmap:port range 0-65535
add KUBE-CLUSTER-IP 10.96.0.1,tcp:443
add KUBE-CLUSTER-IP 10.96.0.10,udp:53
add KUBE-LOOP-BACK 10.244.0.7,tcp:8080,10.244.0.7
add KUBE-LOAD-BALANCER 203.0.113.10,tcp:443
add KUBE-NODE-PORT-TCP 30080
`, "ipset", "restore", "-exist")
	n.restore(`*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A KUBE-SERVICES -s 127.0.0.0/8 -j RETURN
-A KUBE-SERVICES -m comment --comment "Kubernetes service lb portal" -m set --match-set KUBE-LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
-A KUBE-SERVICES ! -s 10.244.0.0/16 -m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-SERVICES -m set --match-set KUBE-LOAD-BALANCER dst,dst -j ACCEPT
-A KUBE-NODE-PORT -p tcp -m comment --comment "Kubernetes nodeport TCP port with externalTrafficPolicy=local" -m set --match-set KUBE-NODE-PORT-LOCAL-TCP dst -j RETURN
-A KUBE-NODE-PORT -p tcp -m comment --comment "Kubernetes nodeport TCP port for masquerade purpose" -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-LOAD-BALANCER -m set --match-set KUBE-LOAD-BALANCER-LOCAL dst,dst -j RETURN
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
` + n.first(`-m comment --comment "kubernetes service portals" -j KUBE-SERVICES`) + `-F OUTPUT
-F POSTROUTING
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
COMMIT
`)
}

// nftRules lists the table of kube-proxy, and otherRules.
func (n *node) nftRules() []string {
	n.t.Helper()
	table := n.run("", "nft", "--stateless", "list", "table", "ip", "kube-proxy")
	return append(n.otherRules(), strings.Split(table, "\n")...)
}

// kubeProxyNFT writes a table that the iptables commands do not show. Its hook has the
// priority of PREROUTING of nat, so that no jump decides which comes first.
func (n *node) kubeProxyNFT() {
	n.t.Helper()
	n.run(`add table ip kube-proxy
delete table ip kube-proxy
table ip kube-proxy {
	comment "rules for kube-proxy"
	set cluster-ips {
		type ipv4_addr
		elements = { 10.96.0.1 }
	}
	map service-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.1 . tcp . 443 : goto service-ULMVA6XW-default/kubernetes/tcp/https }
	}
	map service-nodeports {
		type inet_proto . inet_service : verdict
	}
	chain mark-for-masquerade {
		meta mark set meta mark | 0x4000
	}
	chain endpoint-2CRNCTTE-default/kubernetes/tcp/https__10.0.0.1/6443 {
		ip saddr 10.0.0.1 jump mark-for-masquerade
		meta l4proto tcp dnat to 10.0.0.1:6443
	}
	chain service-ULMVA6XW-default/kubernetes/tcp/https {
		ip daddr 10.96.0.1 tcp dport 443 ip saddr != 10.244.0.0/16 jump mark-for-masquerade
		numgen random mod 1 vmap { 0 : goto endpoint-2CRNCTTE-default/kubernetes/tcp/https__10.0.0.1/6443 }
	}
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
	}
	chain cluster-ips-check {
		ip daddr @cluster-ips reject
	}
	chain masquerading {
		meta mark & 0x4000 == 0 return
		meta mark set meta mark ^ 0x4000
		masquerade fully-random
	}
	chain filter-forward {
		type filter hook forward priority -110; policy accept;
		ct state new jump cluster-ips-check
	}
	chain nat-prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump services
	}
	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}
	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		jump masquerading
	}
}
`, "nft", "-f", "-")
}
