package links

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// The kubelet writes the time at which a container started in whole seconds.
func TestStartedSince(t *testing.T) {
	at := func(clock string) time.Time {
		when, err := time.Parse("2006 15:04:05.000", "2026 "+clock)
		assert.NoError(t, err)
		return when
	}
	for name, tc := range map[string]struct {
		appeared string // by the wall clock as it was then
		age      time.Duration
		now      string
		started  string
		want     bool
	}{
		"in the same second":                      {"10:00:00.900", time.Minute, "10:01:00.900", "10:00:00.000", true},
		"in the second before":                    {"10:00:00.000", time.Minute, "10:01:00.000", "09:59:59.000", false},
		"long after":                              {"10:00:00.900", time.Hour, "11:00:00.900", "10:30:00.000", true},
		"clock set back since, started after":     {"10:00:00.000", time.Minute, "09:01:00.000", "09:00:01.000", true},
		"clock set back since, started before":    {"10:00:00.000", time.Minute, "09:01:00.000", "08:59:59.000", false},
		"clock set forward since, started after":  {"10:00:00.000", time.Minute, "11:01:00.000", "11:00:01.000", true},
		"clock set forward since, started before": {"10:00:00.000", time.Minute, "11:01:00.000", "09:59:59.000", false},
		// Started after the interface appeared, and before the clock was set forward.
		"clock set forward after both": {"10:00:00.000", time.Minute, "11:01:00.000", "10:00:01.000", true},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, tc.want, startedSince(at(tc.started), at(tc.appeared), tc.age, at(tc.now)))
		})
	}
	assert.False(t, startedSince(time.Time{}, at("10:00:00.000"), 0, at("10:00:00.000")), "no container has started")
}
