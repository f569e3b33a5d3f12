package status

import (
	"slices"
	"strings"
	"time"
)

// Pod prints what nmi explain prints: the steps of a request, and then the verdict.
func (p Printer) Pod(pod *Pod, now time.Time) {
	p.Line("pod %s", strings.Join(append([]string{pod.String()}, pod.Addresses...), ", "))
	if pod.Requested != "" {
		p.Line("requests %s", pod.Requested)
	}
	p.Line("")
	for _, step := range pod.Steps {
		p.step(step.Name, step.State, step.Texts...)
	}
	p.history(pod, now)
	p.Line("")
	p.verdict(pod)
	if pod.Reason != "" {
		p.Line("reason: %s", p.paint(pod.State, pod.Reason))
	}
	p.fix(pod.Fix)
	for _, step := range pod.Steps {
		if step.State == Warning && step.Fix != pod.Fix {
			p.fix(step.Fix)
		}
	}
}

// step prints a step, in as many lines as it has texts.
func (p Printer) step(name string, state State, texts ...string) {
	for i, text := range texts {
		if i == 0 {
			p.Line("%s %-10s  %s", p.mark(state), name, text)
		} else {
			p.Line("  %-10s  %s", "", text)
		}
	}
}

// history prints the tokens in memory, and what was refused.
func (p Printer) history(pod *Pod, now time.Time) {
	var texts []string
	for _, t := range pod.Tokens {
		text := t.Resource + " for another " + human(t.ExpiresOn.Sub(now))
		if t.NextRefresh != nil {
			text += ", refreshed in " + human(t.NextRefresh.Sub(now))
		}
		if t.FailedRefreshes > 0 {
			text += ", after failed refreshes"
		}
		texts = append(texts, text)
	}
	if len(pod.Tokens) < pod.TokensHeld {
		texts = append(texts, "and more")
	}
	if len(texts) > 0 {
		p.step("tokens", OK, texts...)
	} else if i := slices.IndexFunc(pod.Identities, func(id Identity) bool { return id.Chosen }); pod.Answer == "" && i >= 0 {
		text := "none in memory; where an identity is not assigned to the node's virtual machine (scale set), IMDS refuses the token"
		if pod.Identities[i].Federated {
			text = "none in memory; where an identity has no federated credential for the pod's service account, Entra refuses the token"
		}
		p.step("tokens", None, text)
	}
	texts = nil
	for _, r := range pod.Refusals {
		texts = append(texts, human(now.Sub(r.Last))+" ago: "+r.Reason+": "+r.Text)
	}
	p.step("refusals", Warning, texts...)
}

// verdict prints what the pod is answered.
func (p Printer) verdict(pod *Pod) {
	switch {
	case pod.HostNetwork:
		p.Line("its requests go to IMDS directly, which gives it the identities of the node")
		return
	case pod.Answer != "":
		p.Line("is answered %s", p.paint(Failed, pod.Answer))
	}
	if pod.Exception != "" {
		p.Line("is excepted by %q: its requests are passed through to IMDS", pod.Exception)
		return
	}
	if len(pod.Identities) == 0 {
		p.Line("has no identity")
	}
	for _, id := range pod.Identities {
		switch {
		case id.Pending:
			p.Line("will get %s once MIC has assigned it", id.Text)
		case id.Chosen && pod.Answer == "" && pod.Requested == "":
			p.Line("gets by default %s", p.paint(OK, id.Text))
		case id.Chosen && pod.Answer == "":
			p.Line("gets %s", p.paint(OK, id.Text))
		case id.Chosen:
			p.Line("would get %s", id.Text)
		default:
			p.Line("may use %s", id.Text)
		}
	}
}
