package iptables

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestProblem(t *testing.T) {
	err := errors.New("x")
	for want, s := range map[string]Status{
		"":           {InPlace: map[string]bool{partGuard: false}},
		RulesRefused: {Err: errors.Join(err, fmt.Errorf("guard: %w", errForbidden)), InPlace: map[string]bool{partGuard: false}},
		FenceMissing: {Err: err, InPlace: map[string]bool{partRouting: true, partGuard: false, partRedirect: false}},
		RulesMissing: {Err: err, InPlace: map[string]bool{partRouting: true, partGuard: true, partRedirect: false}},
	} {
		assert.Equal(t, want, s.Problem())
	}
	notYet := Status{Err: errNotYet}
	assert.Equal(t, RulesMissing, notYet.Problem())
}
