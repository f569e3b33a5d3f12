package iptables

// Reasons why rules are not in place, as logs and Events name them. They stay the same; the
// error's text may change.
const (
	RulesRefused = "RulesRefused" // the agent may not write them, or the node forbids it
	FenceMissing = "FenceMissing" // a fence is not in place, and perhaps other rules
	RulesMissing = "RulesMissing" // other rules are not in place
)

// Problem is the reason why required rules are not in place; "" when they are.
func (s *Status) Problem() string {
	switch {
	case s.Err == nil:
		return ""
	case causeOf(s.Err) == CausePermission:
		return RulesRefused
	}
	for _, fence := range []string{partRouting, partGuard} {
		if inPlace, wanted := s.InPlace[fence]; wanted && !inPlace {
			return FenceMissing
		}
	}
	return RulesMissing
}
