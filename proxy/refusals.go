package proxy

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

const (
	// maxRefusals bounds the different refusals that are remembered of an address, and
	// maxRefusedCallers the addresses: more than a node has pods. With maxRefusalText they come to
	// 2 MiB at most, see TestRefusalsAreBounded.
	maxRefusals       = 4
	maxRefusedCallers = 256
	maxRefusalText    = 400 // bytes of each text
)

// Refusal is requests from one address that were not served, for one cause.
type Refusal struct {
	Pod         string // that had the address; "" if none is known
	Status      int    // HTTP
	Reason      string // a word that stays the same, see Reason
	Text        string // for operators
	Fix         string // what to do; "" if that is not known
	Count       uint64
	First, Last time.Time

	cause    string // the error's text, without what diagnose adds
	reported uint64 // of Count, as Denials
}

// refusals counts refusals, and remembers the last ones of each address: pods can make up any
// number of them.
type refusals struct {
	mu       sync.Mutex // guards byCaller, the refusals in it, and byReason
	byCaller *simplelru.LRU[netip.Addr, []Refusal]
	byReason map[string]uint64
}

func newRefusals() *refusals {
	byCaller, err := simplelru.NewLRU[netip.Addr, []Refusal](maxRefusedCallers, nil)
	if err != nil { // only for a size below 1
		panic(err)
	}
	return &refusals{byCaller: byCaller, byReason: make(map[string]uint64)}
}

// add counts a refusal. One of the same cause counts with the earlier one, and takes its place
// among the last; precise means that r.Reason, r.Text and r.Fix say more than the error itself. It
// returns how many there have been since the last precise one.
func (m *refusals) add(caller netip.Addr, r Refusal, precise bool) (since uint64) {
	r.cause, r.Text, r.Fix = cut(r.cause), cut(r.Text), cut(r.Fix)
	m.mu.Lock()
	defer m.mu.Unlock()
	all, _ := m.byCaller.Get(caller)
	i := slices.IndexFunc(all, func(known Refusal) bool {
		return known.cause == r.cause && known.Status == r.Status && known.Pod == r.Pod
	})
	switch {
	case i >= 0:
		known := all[i]
		r.Count, r.First, r.reported = known.Count, known.First, known.reported
		if !precise {
			r.Reason, r.Text, r.Fix = known.Reason, known.Text, known.Fix
		}
		all = slices.Delete(all, i, i+1)
	case len(all) == maxRefusals:
		all = slices.Delete(all, 0, 1)
	}
	r.Count++
	m.byReason[r.Reason]++
	since = r.Count - r.reported
	if precise {
		r.reported = r.Count
	}
	m.byCaller.Add(caller, append(all, r))
	return since
}

// of returns the refusals of an address, the last first.
func (m *refusals) of(caller netip.Addr) []Refusal {
	m.mu.Lock()
	defer m.mu.Unlock()
	all, _ := m.byCaller.Peek(caller)
	all = slices.Clone(all)
	slices.Reverse(all)
	return all
}

// counts returns how many refusals there were, by reason.
func (m *refusals) counts() map[string]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(m.byReason)
	for _, reason := range Reasons() {
		all[reason] += 0
	}
	return all
}

// callers returns the addresses with refusals, in any order.
func (m *refusals) callers() []netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.byCaller.Keys()
}

// cut copies the first bytes of a text, so that it keeps nothing else in memory.
func cut(text string) string {
	if len(text) <= maxRefusalText {
		return strings.Clone(text)
	}
	const more = "…"
	return strings.ToValidUTF8(text[:maxRefusalText-len(more)], "") + more
}

// Refusals returns the last requests from an address that were not served, the last first. What a
// pod gets wrong by itself, such as a missing header, is not among them.
func (s *Server) Refusals(caller netip.Addr) []Refusal { return s.refusals.of(caller) }

// RefusedCallers returns the addresses with Refusals, in any order. That whose last one is the
// oldest is forgotten first.
func (s *Server) RefusedCallers() []netip.Addr { return s.refusals.callers() }
