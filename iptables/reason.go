package iptables

// Reasons why rules are not in place, as logs, Events, the status page and nmi explain name them. They stay the same; the
// error's text may change.
const (
	RulesRefused = "RulesRefused" // the agent may not write them, or the node forbids it
	FenceMissing = "FenceMissing" // a fence is not in place, and perhaps other rules
	RulesMissing = "RulesMissing" // other rules are not in place
)

// Fix is what to do about a reason, beside what the error says; "" for none.
func Fix(reason string) string {
	switch reason {
	case RulesRefused:
		return "give the agent root with NET_ADMIN and NET_RAW; where the node forbids rules all the same, use --redirect-mode=ebpf, or none: docs/doctor.md#writable"
	case FenceMissing, RulesMissing:
		return "see what keeps the agent from writing its rules: nmi doctor checks the node's tables, routing rules and iptables itself"
	default:
		return ""
	}
}

// Problem is the reason why required rules are not in place; "" when they are.
func (s *Status) Problem() string {
	switch {
	case s.Err == nil:
		return ""
	case causeOf(s.Err) == CausePermission:
		return RulesRefused
	}
	for _, fence := range []string{partRouting, partGuard, partEgress} {
		if inPlace, wanted := s.InPlace[fence]; wanted && !inPlace {
			return FenceMissing
		}
	}
	return RulesMissing
}

// Fix is what to do about the Problem, in this mode.
func (s *Status) Fix() string {
	if s.Mode == EBPF && s.Problem() == RulesRefused {
		return "give the agent root with BPF, NET_ADMIN and NET_RAW, as deploy/manifests/ebpf/daemonset.yaml does; with these see the node's audit log for what AppArmor, SELinux or another program refuses"
	}
	return Fix(s.Problem())
}
