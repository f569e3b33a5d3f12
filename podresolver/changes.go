package podresolver

import (
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/time/rate"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Changes of decisions are logged at this rate: authors of bindings have a say in how many there
// are.
const (
	changesPerSecond = 10
	changesAtOnce    = 250 // the pods of a node
)

// change is a pod whose decision is another one than before. Either may be nil.
type change struct{ before, after *Pod }

// changeLog logs changes of decisions.
type changeLog struct {
	log     *slog.Logger
	limit   *rate.Limiter
	omitted int // since the last line
}

func newChangeLog(log *slog.Logger) changeLog {
	return changeLog{log: log, limit: rate.NewLimiter(changesPerSecond, changesAtOnce)}
}

// matters reports whether a change is one for somebody: not of a pod that nobody gives an
// identity.
func (c change) matters() bool {
	return c.after != nil && (c.after.wanted() || c.before != nil && c.before.wanted()) && !sameDecision(c.before, c.after)
}

// wanted reports whether somebody means the pod to have an identity, or that of the node.
func (p *Pod) wanted() bool {
	return p.exception != "" || len(p.identities)+len(p.pending) > 0 || p.info.labels[aadpodidentity.BindingLabel] != ""
}

// sameDecision reports whether a pod gets the same as before.
func sameDecision(a, b *Pod) bool {
	return a != nil && a.UID == b.UID && a.exception == b.exception && reflect.DeepEqual(a.identities, b.identities) && reflect.DeepEqual(a.pending, b.pending) &&
		(a.refusal == nil) == (b.refusal == nil) && (a.refusal == nil || a.refusal.Error() == b.refusal.Error())
}

// report logs a change.
func (l *changeLog) report(c change) {
	if !l.limit.Allow() {
		l.omitted++
		return
	}
	args := []any{"pod", c.after, "gets", c.after.gets()}
	if c.before != nil && c.before.UID == c.after.UID {
		args = append(args, "before", c.before.gets())
	}
	if c.after.refusal != nil && c.after.exception == "" {
		args = append(args, "error", c.after.refusal)
	}
	if l.omitted > 0 {
		args = append(args, "omitted", l.omitted)
		l.omitted = 0
	}
	l.log.Info("decision changed", args...)
}

// gets says in a few words what a pod gets.
func (p *Pod) gets() string {
	if p.exception != "" {
		return "the node's identities (exception " + p.exception + ")"
	}
	var names []string
	for _, id := range p.identities {
		name := cache.NewObjectName(id.Namespace, id.Name).String()
		if id.Annotated() {
			name = fmt.Sprintf("client ID %s (ServiceAccount %s)", id.ClientID, name)
		}
		names = append(names, name)
	}
	for _, id := range p.pending {
		if name := cache.NewObjectName(id.Namespace, id.Name).String(); !slices.Contains(names, name) {
			names = append(names, name+" (not assigned yet)")
		}
	}
	if more := len(names) - maxDescribed; more > 0 {
		names = append(names[:maxDescribed], "and more")
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}
