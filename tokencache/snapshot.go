package tokencache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"time"
	"unique"
)

// Snapshot is one token of a Cache, with what its successor needs to keep refreshing it.
// It prints as what it is for, never as the token; MarshalBinary alone gives it away.
type Snapshot struct {
	// record is a function since fmt can look into those not even where it cannot call
	// String: in an unexported field of another struct.
	record func() *record
}

func newSnapshot(r *record) Snapshot { return Snapshot{func() *record { return r }} }

// record is the wire format, which agents of different versions read: fields may be
// added, and none may change its meaning.
type record struct {
	ClientID   string     `json:"clientID,omitempty"`
	ResourceID string     `json:"resourceID,omitempty"`
	Resource   string     `json:"resource"`
	Principal  *Principal `json:"principal,omitempty"`
	Token      plainToken `json:"token"`
	// Left is for how long the token was valid when the snapshot was taken, by the
	// monotonic clock, which a wrong wall clock has no part in.
	Left      time.Duration `json:"left"`
	RefreshAt time.Time     `json:"refreshAt"`
	Owner     netip.Addr    `json:"owner"`
	Users     []netip.Addr  `json:"users,omitempty"`
}

// plainToken is a Token without its methods, which redact it.
type plainToken Token

// Export returns the valid tokens in memory, the least recently used first.
func (c *Cache) Export() []Snapshot {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]Snapshot, 0, c.entries.Len())
	for _, e := range c.entries.Values() {
		if e.freshness(now) == expired {
			continue
		}
		r := &record{
			ClientID: e.key.ClientID, ResourceID: e.key.ResourceID, Resource: e.key.Resource,
			Token: plainToken(*e.token), Left: e.left(now), RefreshAt: e.refreshAt, Owner: e.owner, Users: slices.Collect(maps.Keys(e.users)),
		}
		if p, ok := e.key.FromEntra(); ok {
			r.Principal = &p
		}
		all = append(all, newSnapshot(r))
	}
	return all
}

// Import stores the tokens of another cache's Export, in its order, and returns how many
// it stored. It skips those that have expired and those that this cache has a token for
// which is valid as long; the bounds of the cache hold for imported tokens, too.
func (c *Cache) Import(snapshots []Snapshot) (stored int) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range snapshots {
		if s.record == nil || !c.importLocked(s.record(), now) {
			continue
		}
		stored++
	}
	if stored > 0 {
		c.wakeRefresher()
	}
	return stored
}

func (c *Cache) importLocked(r *record, now time.Time) bool {
	key := Key{ClientID: r.ClientID, ResourceID: r.ResourceID, Resource: r.Resource}
	if r.Principal != nil {
		key.Principal = unique.Make(*r.Principal)
	}
	token := Token(r.Token)
	if token.AccessToken == "" || key.tooLong() {
		return false
	}
	e := newEntry(key, &token, now, c.jitter())
	e.deadline = now.Add(min(r.Left, token.ExpiresOn.Sub(now)))
	e.refreshAt = now.Add(r.RefreshAt.Sub(now)) // by the monotonic clock
	e.setFreshUntil()
	e.owner = r.Owner
	for _, caller := range r.Users {
		e.addUser(caller)
	}
	if before, ok := c.entries.Peek(key); e.freshness(now) == expired || ok && before.left(now) >= e.left(now) {
		return false
	} else if ok {
		e.owner = before.owner
	}
	c.addLocked(e)
	return true
}

// MarshalBinary implements encoding.BinaryMarshaler. The result has the token in it, and
// is for the successor's socket alone.
func (s Snapshot) MarshalBinary() ([]byte, error) {
	if s.record == nil {
		return nil, errors.New("empty token snapshot")
	}
	return json.Marshal(s.record())
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler. Its errors quote nothing.
func (s *Snapshot) UnmarshalBinary(b []byte) error {
	r := new(record)
	if err := json.Unmarshal(b, r); err != nil {
		return errors.New("malformed token snapshot")
	}
	*s = newSnapshot(r)
	return nil
}

// String names the token without giving it away.
func (s Snapshot) String() string {
	if s.record == nil {
		return "no token"
	}
	return Token(s.record().Token).String()
}

// Format implements fmt.Formatter: all verbs print String.
func (s Snapshot) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// MarshalText implements encoding.TextMarshaler, for encoders such as JSON's and slog's.
func (s Snapshot) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
