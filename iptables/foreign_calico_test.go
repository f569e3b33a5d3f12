package iptables_test

import "strings"

// calico writes rules as Felix does, in four tables and each jump first, for a node whose
// workloads' interfaces are named veth instead of cali. Packets that policy allows are
// marked 0x10000 and accepted.
func (n *node) calico() {
	n.t.Helper()
	n.run(`create cali40masq-ipam-pools hash:net
create cali40all-ipam-pools hash:net
add cali40masq-ipam-pools 10.244.0.0/16
add cali40all-ipam-pools 10.244.0.0/16
`, "ipset", "restore", "-exist")
	// Felix flushes only its own chains; here the other hooks have no other rules.
	n.restore(strings.NewReplacer("$LINK", n.pod.Link, "$FIRST", strings.TrimSpace(n.first("-j cali-PREROUTING"))).Replace(calicoRules))
}

const calicoRules = `*raw
:cali-PREROUTING - [0:0]
:cali-OUTPUT - [0:0]
:cali-rpf-skip - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-to-host-endpoint - [0:0]
-F PREROUTING
-F OUTPUT
-I PREROUTING 1 -j cali-PREROUTING
-I OUTPUT 1 -j cali-OUTPUT
-A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i veth+ -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
-A cali-PREROUTING -m mark --mark 0x0/0x40000 -j cali-from-host-endpoint
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
-A cali-OUTPUT -j cali-to-host-endpoint
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
COMMIT
*mangle
:cali-PREROUTING - [0:0]
:cali-POSTROUTING - [0:0]
:cali-from-host-endpoint - [0:0]
-F PREROUTING
-F POSTROUTING
-I PREROUTING 1 -j cali-PREROUTING
-I POSTROUTING 1 -j cali-POSTROUTING
-A cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-PREROUTING -j cali-from-host-endpoint
-A cali-PREROUTING -m comment --comment "Host endpoint policy accepted packet." -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-POSTROUTING -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-POSTROUTING -j MARK --set-xmark 0x0/0xf0000
COMMIT
*nat
:cali-PREROUTING - [0:0]
:cali-OUTPUT - [0:0]
:cali-POSTROUTING - [0:0]
:cali-fip-dnat - [0:0]
:cali-fip-snat - [0:0]
:cali-nat-outgoing - [0:0]
$FIRST
-F OUTPUT
-F POSTROUTING
-I OUTPUT 1 -j cali-OUTPUT
-I POSTROUTING 1 -j cali-POSTROUTING
-A cali-PREROUTING -j cali-fip-dnat
-A cali-OUTPUT -j cali-fip-dnat
-A cali-POSTROUTING -j cali-fip-snat
-A cali-POSTROUTING -j cali-nat-outgoing
-A cali-nat-outgoing -m set --match-set cali40masq-ipam-pools src -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully
COMMIT
*filter
:cali-INPUT - [0:0]
:cali-FORWARD - [0:0]
:cali-OUTPUT - [0:0]
:cali-wl-to-host - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-to-wl-dispatch - [0:0]
:cali-fw-$LINK - [0:0]
:cali-tw-$LINK - [0:0]
:cali-pro-kns.default - [0:0]
-F INPUT
-F FORWARD
-F OUTPUT
-I INPUT 1 -j cali-INPUT
-I FORWARD 1 -j cali-FORWARD
-I OUTPUT 1 -j cali-OUTPUT
-A FORWARD -m comment --comment "Policy explicitly accepted packet." -m mark --mark 0x10000/0x10000 -j ACCEPT
-A FORWARD -j MARK --set-xmark 0x10000/0x10000
-A cali-INPUT -i veth+ -g cali-wl-to-host
-A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-INPUT -j MARK --set-xmark 0x0/0xf0000
-A cali-INPUT -j cali-from-host-endpoint
-A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-wl-to-host -j cali-from-wl-dispatch
-A cali-wl-to-host -m comment --comment "Configured DefaultEndpointToHostAction" -j ACCEPT
-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -i veth+ -j cali-from-wl-dispatch
-A cali-FORWARD -o veth+ -j cali-to-wl-dispatch
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-OUTPUT -o veth+ -j RETURN
-A cali-from-wl-dispatch -i $LINK -g cali-fw-$LINK
-A cali-from-wl-dispatch -m comment --comment "Unknown interface" -j DROP
-A cali-to-wl-dispatch -o $LINK -g cali-tw-$LINK
-A cali-to-wl-dispatch -m comment --comment "Unknown interface" -j DROP
-A cali-fw-$LINK -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-fw-$LINK -m conntrack --ctstate INVALID -j DROP
-A cali-fw-$LINK -j MARK --set-xmark 0x0/0x10000
-A cali-fw-$LINK -j cali-pro-kns.default
-A cali-fw-$LINK -m comment --comment "Return if profile accepted" -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-fw-$LINK -m comment --comment "Drop if no profiles matched" -j DROP
-A cali-tw-$LINK -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-tw-$LINK -m conntrack --ctstate INVALID -j DROP
-A cali-tw-$LINK -j MARK --set-xmark 0x0/0x10000
-A cali-tw-$LINK -j cali-pro-kns.default
-A cali-tw-$LINK -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-tw-$LINK -j DROP
-A cali-pro-kns.default -j MARK --set-xmark 0x10000/0x10000
-A cali-pro-kns.default -m mark --mark 0x10000/0x10000 -j RETURN
COMMIT
`
