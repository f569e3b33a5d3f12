//go:build cluster

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// rules are some of the agent's rules, and how another program may remove them.
type rules struct{ name, flush, present string }

var (
	// All of the table, as careless programs do.
	natRules     = rules{"nat", "iptables -w -t nat -F", "iptables -w -t nat -C PREROUTING -j aad-metadata"}
	guardRules   = rules{"guard", "iptables -w -t mangle -F", "iptables -w -t mangle -C FORWARD -j nmi-guard"}
	routingRules = rules{"routing", "for pref in 10 11 12; do ip rule del pref $pref; done", `test 3 = "$(ip rule list | grep -c '^1[012]:')"`}
)

// onLoss is a script that flushes rules, does something, waits until they are back, and
// writes how many milliseconds it waited. The nat table also has rules of kube-proxy,
// and on kind of Docker: it is then put back as it was.
func onLoss(then string, lost ...rules) string {
	lines := []string{"set -e", "saved=$(iptables-save -t nat)"}
	for _, r := range lost {
		lines = append(lines, r.flush)
	}
	lines = append(lines, then, "begin=$(date +%s%N)")
	for _, r := range lost {
		lines = append(lines, "until "+r.present+"; do :; done 2>/dev/null")
	}
	return strings.Join(append(lines, "echo $((($(date +%s%N) - begin) / 1000000))", `iptables-restore -w -T nat <<<"$saved"`), "\n")
}

// Each is lost alone, five times.
func TestRulesFlushed(t *testing.T) {
	for _, lost := range []rules{natRules, guardRules, routingRules} {
		t.Run(lost.name, func(t *testing.T) {
			s := begin(t, "Rules are flushed ("+lost.name+"): they are back at once, an SDK notices nothing, and no pod gets past.", theIMDS, theNode)
			s.allowFailures("the redirect is gone for a moment")
			s.underLoad()
			for range 5 {
				s.note("back after %s ms", s.onNode("timeout", "60", "bash", "-c", onLoss("", lost)))
			}
			s.recovered()
			if lost != natRules {
				assert.Empty(t, s.failed(bound, overNewOnes), "the redirect was not lost")
			}
		})
	}
}

// The redirect and one of the fences are lost while the agent cannot repair them: the
// other fence holds alone.
func TestEachFenceHoldsAlone(t *testing.T) {
	for _, test := range []struct {
		fence string
		lost  rules
	}{{"routing", guardRules}, {"guard", routingRules}} {
		t.Run(test.fence, func(t *testing.T) {
			s := begin(t, "The agent hangs, redirect and a fence are flushed: the other fence ("+test.fence+") keeps pods out.", theIMDS, theNode)
			s.allowFailures("the agent hangs")
			s.underLoad()
			impatient := asker{requests: []request{s.refused()}, n: forever, every: 20 * time.Millisecond, fresh: true, timeout: 300 * time.Millisecond}
			s.start(pod{name: "impatient", askers: []asker{impatient}})
			s.running("impatient")
			log := "/var/log/pods/" + s.namespace + "_impatient_*/ask-0/*.log"
			// It is refused 20 times by the fence alone.
			agent := s.agentPID()
			hanging := "until [ $(cat " + log + " | wc -l) -gt $((asked + 20)) ]; do sleep 0.1; done\nkill -CONT " + agent
			script := "trap 'kill -CONT " + agent + "' EXIT\nkill -STOP " + agent + "\n" + onLoss("asked=$(cat "+log+" | wc -l)\n"+hanging, natRules, test.lost)
			s.note("back after %s ms", s.onNode("timeout", "60", "bash", "-c", script))
			s.recovered()
		})
	}
}
