package bootguard

import "strings"

// Unit is the name of the unit on the node.
const Unit = "nmi-boot-guard.service"

// marker begins each unit file that an agent has written. A file without it is somebody
// else's.
const marker = "# Written by nmi (--boot-guard-dir)"

// unitFile returns the content of the unit file.
//
// The unit comes before network-pre.target, the place for firewalls, which has to be
// pulled in (systemd.special(7)), and before the kubelet also where that does not wait
// for the network. Without DefaultDependencies it waits for nothing, neither for
// sysinit.target, before which cloud-init brings up the network on Azure, nor for file
// systems: a unit that comes after none is in no ordering cycle, which systemd would
// break by leaving out some unit of it. Nor does another unit require this one: if it
// fails, or ip(8) hangs until the timeout, the node boots without it.
//
// An ip(8) that lacks a word of the commands, such as BusyBox's, lacks "protocol", which
// all of them have: never is the node itself refused for lack of the goto alone.
func unitFile(commands []string) string {
	return marker + `, which overwrites changes and keeps the unit
# enabled. "nmi cleanup --boot-guard-dir" removes it.

[Unit]
Description=Keep pods from the instance metadata service until nmi runs
Documentation=https://github.com/podidentity/nmi/blob/main/docs/boot-guard.md
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target kubelet.service

[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=10s
# "-": a rule that exists is an error to ip, and not to this unit.
ExecStart=-` + strings.Join(commands, "\nExecStart=-") + `

[Install]
WantedBy=multi-user.target
`
}
