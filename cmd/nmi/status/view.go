package status

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// line is a part of the agent in one line, for people.
type line struct {
	Name  string
	State State
	Text  string
}

// lines describes the parts.
func (s *Snapshot) lines() []line {
	return []line{s.redirect(), s.fences(), s.otherRules(), s.apiServer(), s.imds(), s.entra(), s.tokens(), s.connections()}
}

// inPlace sorts the named parts into those that are in place, and those that are not.
func (r *Rules) inPlace(names ...string) (yes, no []string) {
	for _, part := range r.Parts {
		switch {
		case !slices.Contains(names, part.Name):
		case part.InPlace:
			yes = append(yes, part.Name)
		default:
			no = append(no, part.Name)
		}
	}
	return yes, no
}

const (
	modeNone = "none" // another program redirects
	modeEBPF = "ebpf" // no rules do
)

func (s *Snapshot) redirect() line {
	l := line{"redirect", OK, s.Rules.Mode + ": " + s.Rules.Reason}
	if s.Rules.Backend != "" {
		l.Text = fmt.Sprintf("%s, by iptables-%s: %s", s.Rules.Mode, s.Rules.Backend, s.Rules.Reason)
	}
	if s.Rules.Mode == modeEBPF {
		l.Text = s.Rules.Mode + ", by programs: " + s.Rules.Reason
	}
	if s.Rules.Mode == modeNone {
		l.State, l.Text = None, "left to another program"
	} else if yes, _ := s.Rules.inPlace("redirect"); len(yes) == 0 {
		l.State, l.Text = Failed, "not in place: pods' requests are refused"
	}
	return l
}

func (s *Snapshot) fences() line {
	yes, no := s.Rules.inPlace("guard", "routing", "egress")
	l := line{"fences", OK, strings.Join(yes, " and ") + " in place"}
	switch {
	case len(yes) == 0 && len(no) == 0:
		l.State, l.Text = Failed, "not in place yet"
	case len(no) > 0:
		if l.State = Failed; s.Rules.Mode == modeNone || len(yes) > 0 {
			l.State = Warning
		}
		l.Text = strings.Join(no, " and ") + " not in place"
		switch len(yes) {
		case 0:
		case 1:
			l.Text += "; " + yes[0] + " holds alone"
		default:
			l.Text += "; " + strings.Join(yes, " and ") + " in place"
		}
	}
	return l
}

func (s *Snapshot) otherRules() line {
	yes, no := s.Rules.inPlace("wireserver", "input", "antispoof")
	switch {
	case len(no) > 0:
		return line{"other rules", Warning, strings.Join(no, ", ") + " not in place; the agent serves without"}
	case len(yes) > 0:
		return line{"other rules", OK, strings.Join(yes, ", ") + " in place"}
	}
	return line{"other rules", None, "none"}
}

func (s *Snapshot) apiServer() line {
	var silent float64
	for _, w := range s.Cluster.Watches {
		silent = max(silent, w.SilentSeconds)
	}
	switch {
	case !s.Cluster.Synced:
		return line{"API server", Failed, "not in sync: " + oneLine(s.Cluster.Error)}
	case s.Cluster.Error != "":
		return line{"API server", Warning, oneLine(s.Cluster.Error)}
	default:
		return line{"API server", OK, fmt.Sprintf("in sync; last heard of each of %d resources within %s", len(s.Cluster.Watches), human(time.Duration(silent*float64(time.Second))))}
	}
}

func (s *Snapshot) imds() line {
	u := s.Upstream
	perSecond, atOnce := u.limits()
	l := line{"IMDS", OK, fmt.Sprintf("%d of %d requests in flight, %d waiting; %d a second at most", u.IMDS.InFlight, atOnce, u.IMDS.Waiting, perSecond)}
	switch until := s.Upstream.ThrottledUntil; {
	case s.Upstream.Error != "":
		l.State, l.Text = Warning, oneLine(s.Upstream.Error)
	case until != nil:
		l.State, l.Text = Warning, fmt.Sprintf("throttles this node for another %s; %s", human(until.Sub(s.Time)), l.Text)
	case s.Upstream.Shared:
		l.Text += "; another agent of the node has half of the limits"
	}
	return l
}

func (s *Snapshot) entra() line {
	u := s.Upstream
	perSecond, _ := u.limits()
	return line{"Entra", OK, fmt.Sprintf("%d fetches in flight, %d waiting; %d a second at most for each authority", u.Entra.InFlight, u.Entra.Waiting, perSecond)}
}

// limits are those in force now.
func (u *Upstream) limits() (perSecond, atOnce int) {
	if u.Shared {
		return max(1, u.PerSecond/2), max(1, u.AtOnce/2)
	}
	return u.PerSecond, u.AtOnce
}

func (s *Snapshot) tokens() line {
	l := line{"tokens", OK, fmt.Sprintf("%d in memory", s.Tokens.Held)}
	if s.Tokens.Failing > 0 {
		l.State = Warning
		l.Text += fmt.Sprintf("; %d cannot be had", s.Tokens.Failing)
	}
	return l
}

func (s *Snapshot) connections() line {
	c := s.Connections
	l := line{"connections", OK, fmt.Sprintf("%d open, %d busy", c.Open, c.Busy)}
	if c.Refused+c.Evicted > 0 {
		l.Text += fmt.Sprintf("; %d refused and %d ended for others since the start", c.Refused, c.Evicted)
	}
	return l
}

// verdict is what the agent says of itself.
func (s *Snapshot) verdict() line {
	if s.Agent.Ready {
		return line{"agent", OK, "ready"}
	}
	return line{"agent", Failed, "not ready"}
}

// count returns how many pods are in a state.
func (s *Snapshot) count(states ...State) (n int) {
	for _, pod := range s.Pods {
		if slices.Contains(states, pod.State) {
			n++
		}
	}
	return n
}

// summary counts the pods.
func (s *Snapshot) summary() string {
	var texts []string
	for _, c := range []struct {
		n    int
		text string
	}{
		{s.count(Failed), "refused"}, {s.count(Warning), "refused recently"}, {s.count(OK), "served"}, {s.count(None), "without an identity"},
	} {
		if c.n > 0 {
			texts = append(texts, fmt.Sprintf("%d %s", c.n, c.text))
		}
	}
	if len(texts) == 0 {
		return "none"
	}
	return strings.Join(texts, ", ")
}

// Gets is what the pod gets, in a few words.
func (p *Pod) Gets() string {
	switch {
	case p.HostNetwork:
		return "the node's identities (host network)"
	case p.Answer != "":
		return p.Reason
	case p.Exception != "":
		return "the node's identities (exception " + p.Exception + ")"
	}
	for _, id := range p.Identities {
		if id.Chosen {
			text := "AzureIdentity " + id.Namespace + "/" + id.Name
			if id.Annotated {
				text = "client ID " + id.ClientID + " of its service account"
			}
			if more := len(p.Identities) - 1; more > 0 {
				text += fmt.Sprintf(" and %d more", more)
			}
			return text
		}
	}
	return "nothing"
}

// oneLine joins the lines of an error.
func oneLine(text string) string { return strings.ReplaceAll(text, "\n", "; ") }

// human writes a duration as people say it, with two units at most.
func human(d time.Duration) string {
	const day = 24 * time.Hour
	units := []struct {
		unit time.Duration
		name string
	}{{day, "d"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}}
	d = max(d.Round(time.Second), 0)
	for i, u := range units {
		if d < u.unit {
			continue
		}
		text := fmt.Sprintf("%d %s", d/u.unit, u.name)
		if i+1 < len(units) {
			if rest := d % u.unit / units[i+1].unit; rest > 0 {
				text += fmt.Sprintf(" %d %s", rest, units[i+1].name)
			}
		}
		return text
	}
	return "0 s"
}
