package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestLossNotes(t *testing.T) {
	var log bytes.Buffer
	r := &Reconciler{cfg: Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}}
	now := time.Unix(1_800_000_000, 0)
	assert.Empty(t, r.lossNotes(now))
	r.lastLoss = loss{now, []string{partRedirect, partGuard}, "none"}
	notes := r.lossNotes(now.Add(lossNoteTime))
	if assert.Len(t, notes, 1) {
		assert.Equal(t, "another program removed or changed rules at 2027-01-15T08:00:00Z (redirect, guard; impact: none), and they were put back: "+findProgram, notes[0])
	}
	assert.Empty(t, r.lossNotes(now.Add(lossNoteTime+time.Second)))
	assert.Empty(t, log.String())
	for range conflictThreshold + 1 {
		r.repairTimes = append(r.repairTimes, now)
	}
	for range 2 {
		notes = r.lossNotes(now)
		if assert.Len(t, notes, 1) {
			assert.Contains(t, notes[0], "keeps changing the rules: repaired 6 times in the last minute: "+findProgram)
		}
	}
	assert.Equal(t, 1, strings.Count(log.String(), "another program keeps changing the rules"), "one line a minute")
	assert.Contains(t, log.String(), "fix=")
}

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
	for _, reason := range []string{RulesRefused, FenceMissing, RulesMissing} {
		assert.NotEmpty(t, Fix(reason), reason)
	}
	assert.Empty(t, Fix(""))
	refused := Status{Err: errForbidden, Mode: DNAT}
	assert.Equal(t, Fix(RulesRefused), refused.Fix())
	refused.Mode = EBPF
	assert.Contains(t, refused.Fix(), "BPF")
	assert.NotContains(t, refused.Fix(), "--redirect-mode", "it is used")
	notYet := Status{Err: errNotYet}
	assert.Equal(t, RulesMissing, notYet.Problem())
}
