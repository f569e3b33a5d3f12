package events

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/iptables"
)

const (
	// rulesCheck is how often the rules' status, which is in memory, is looked at.
	rulesCheck = 5 * time.Second
	// rulesGrace is how long they must have been missing: longer than a program that holds the
	// xtables lock takes, as for the startup taint.
	rulesGrace = 20 * time.Second
	// rulesAgain is the time between two Events of one series.
	rulesAgain = time.Minute
)

// WatchRules records on the node that its rules cannot be written, until ctx ends.
func (w *Writer) WatchRules(ctx context.Context, status func() iptables.Status) {
	tick := time.NewTicker(rulesCheck)
	defer tick.Stop()
	var since, recorded time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now, s := time.Now(), status()
		switch {
		case s.Err == nil:
			since, recorded = time.Time{}, time.Time{}
		case since.IsZero():
			since = now
		case now.Sub(since) >= rulesGrace && now.Sub(recorded) >= rulesAgain:
			recorded = now
			w.Record(Event{Regarding: w.node(), Reason: s.Problem(), Action: "WriteRules", Note: withFix(s.Err.Error(), s.Fix())})
		}
	}
}

// node is this agent's node. Its name stands for its UID, as in the kubelet's Events, and kubectl
// describe looks for both.
func (w *Writer) node() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: w.cfg.Node, UID: types.UID(w.cfg.Node)}
}
