package upstream

import (
	"errors"
	"io"
	"net/netip"
	"sync"
)

// maxHeld bounds the bodies that are in memory for what is passed on, requests' and
// answers' together.
const maxHeld = 8 << 20

// ErrHeld means that too many bytes of requests and answers are in memory already for the
// address that sent a request.
var ErrHeld = errors.New("too many requests and answers are in memory for this address")

// held counts the bytes in memory for each address, which it gets back when its clients
// have read. An address may have as much as is free: one alone half of all, and when n
// have as much as they can, there is an n+1st part left for the next.
type held struct {
	mu     sync.Mutex // guards all below
	free   int64
	byAddr map[netip.Addr]int64 // none of them zero
}

func newHeld(size int64) *held {
	return &held{free: size, byAddr: make(map[netip.Addr]int64)}
}

func (h *held) take(from netip.Addr, n int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.byAddr[from]+n > h.free-n {
		return false
	}
	h.free -= n
	h.byAddr[from] += n
	return true
}

func (h *held) giveBack(from netip.Addr, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.free += n
	if h.byAddr[from] -= n; h.byAddr[from] == 0 {
		delete(h.byAddr, from)
	}
}

// heldBody is a body in memory. It must be closed, which gives its bytes back. Like other
// bodies it may be closed while it is read.
type heldBody struct {
	held   *held
	from   netip.Addr
	parts  [][]byte // that have not been read
	size   int64    // of all that was taken
	closed sync.Once
}

// partSize is how much is taken at once where the length of a body is not known.
const partSize = 16 << 10

// read reads a body to its end; length is what its sender says of it, -1 if nothing. It
// fails with tooLong when there are more than limit bytes, with ErrHeld, and as the body
// does.
func (h *held) read(from netip.Addr, body io.Reader, length, limit int64, tooLong error) (*heldBody, error) {
	if length > limit {
		return nil, tooLong
	}
	b := &heldBody{held: h, from: from}
	next := int64(partSize)
	if length >= 0 {
		next = length + 1 // one more tells that it has ended
	}
	for left := limit; ; {
		next = min(next, left+1)
		if !h.take(from, next) {
			return nil, errors.Join(ErrHeld, b.Close())
		}
		b.size += next
		part, n := make([]byte, next), 0
		var err error
		for n < len(part) && err == nil {
			var m int
			m, err = body.Read(part[n:])
			n += m
		}
		b.parts = append(b.parts, part[:n])
		if left -= int64(n); left < 0 {
			err = tooLong
		}
		switch {
		case errors.Is(err, io.EOF):
			return b, nil
		case err != nil:
			return nil, errors.Join(err, b.Close())
		}
		next = partSize
	}
}

// Read implements io.Reader.
func (b *heldBody) Read(p []byte) (int, error) {
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
func (b *heldBody) empty() bool {
	for _, part := range b.parts {
		if len(part) > 0 {
			return false
		}
	}
	return true
}

// Close implements io.Closer.
func (b *heldBody) Close() error {
	b.closed.Do(func() { b.held.giveBack(b.from, b.size) })
	return nil
}
