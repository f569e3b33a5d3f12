package upstream

import (
	"errors"
	"io"
	"net/netip"
	"sync"
)

// maxBodies bounds the memory for the bodies of all requests and answers that are being
// passed through, in bytes.
const maxBodies = 8 << 20

// ErrBodyBudget means that the bodies of an address already take as much memory as they may.
var ErrBodyBudget = errors.New("too many requests and answers are in memory for this address")

// bodyBudget accounts for the memory of bodies by address, until they are closed. An address
// may have as much as is free: a single one gets half of the total, and n addresses that
// take all they can leave as much again for the next.
type bodyBudget struct {
	mu     sync.Mutex // guards all below
	free   int64
	byAddr map[netip.Addr]int64 // without zeros
}

func newBodyBudget(size int64) *bodyBudget {
	return &bodyBudget{free: size, byAddr: make(map[netip.Addr]int64)}
}

func (b *bodyBudget) reserve(addr netip.Addr, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byAddr[addr]+n > b.free-n {
		return false
	}
	b.free -= n
	b.byAddr[addr] += n
	return true
}

func (b *bodyBudget) release(addr netip.Addr, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	if b.byAddr[addr] -= n; b.byAddr[addr] == 0 {
		delete(b.byAddr, addr)
	}
}

// bufferedBody is a body in memory. Close releases the memory, and may be called while the
// body is read.
type bufferedBody struct {
	budget   *bodyBudget
	addr     netip.Addr
	parts    [][]byte // unread
	reserved int64
	closed   sync.Once
}

// partSize is how much is reserved at a time for a body of unknown length.
const partSize = 16 << 10

// read reads a body to its end. length is the Content-Length, -1 for unknown. The error is
// tooLong for a body of more than limit bytes, ErrBodyBudget if the address has no memory left, or
// the body's own.
func (b *bodyBudget) read(addr netip.Addr, body io.Reader, length, limit int64, tooLong error) (*bufferedBody, error) {
	if length > limit {
		return nil, tooLong
	}
	buffered := &bufferedBody{budget: b, addr: addr}
	next := int64(partSize)
	if length >= 0 {
		next = length + 1 // the extra byte detects the end
	}
	for left := limit; ; {
		next = min(next, left+1)
		if !b.reserve(addr, next) {
			return nil, errors.Join(ErrBodyBudget, buffered.Close())
		}
		buffered.reserved += next
		part, n := make([]byte, next), 0
		var err error
		for n < len(part) && err == nil {
			var m int
			m, err = body.Read(part[n:])
			n += m
		}
		buffered.parts = append(buffered.parts, part[:n])
		if left -= int64(n); left < 0 {
			err = tooLong
		}
		switch {
		case errors.Is(err, io.EOF):
			return buffered, nil
		case err != nil:
			return nil, errors.Join(err, buffered.Close())
		}
		next = partSize
	}
}

// Read implements io.Reader.
func (b *bufferedBody) Read(p []byte) (int, error) {
	for len(b.parts) > 0 && len(b.parts[0]) == 0 {
		b.parts = b.parts[1:]
	}
	if len(b.parts) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.parts[0])
	b.parts[0] = b.parts[0][n:]
	return n, nil
}

// empty reports whether nothing is left to read.
func (b *bufferedBody) empty() bool {
	for _, part := range b.parts {
		if len(part) > 0 {
			return false
		}
	}
	return true
}

// Close implements io.Closer.
func (b *bufferedBody) Close() error {
	b.closed.Do(func() { b.budget.release(b.addr, b.reserved) })
	return nil
}
