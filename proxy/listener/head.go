package listener

import (
	"bytes"
	"errors"
	"io"
)

// maxHeadLines bounds the lines of a request's head, the first and the empty last one included.
// net/http bounds only bytes, and allocates some 130 for each "a:\r\n". An SDK sends a dozen
// lines, a service mesh as many again.
const maxHeadLines = 64

var errManyLines = errors.New("the head of the request has too many lines")

// headReader counts the lines of a request's head before net/http parses it. It parses and
// changes nothing. A Read ends after an empty line at the latest; what follows (a body, or a
// pipelined request) is kept for the next Read, so that each head has a count of its own. If
// net/http saw a head end elsewhere, several would share the bound, which would still hold.
type headReader struct {
	lines int    // that have ended since begin
	size  int    // bytes since begin
	text  bool   // the current line has more than CR
	kept  []byte // the beginning of the head, see Conn.Head
	early []byte // what was read before begin
	ahead []byte // what was read after an empty line
	err   error  // errManyLines, from then on
}

// MaxHead is the size of the largest head that Conn.Head returns.
const MaxHead = 1 << 10

// begin is called before the first Read of a head, but for the byte that net/http reads during
// a request to learn whether the client is still there.
func (h *headReader) begin() {
	h.lines, h.text = 0, false
	h.kept = append(h.kept[:0], h.early...)
	h.size, h.early = len(h.early), h.early[:0]
}

// read reads from r no further than the end of the head.
func (h *headReader) read(r io.Reader, p []byte) (int, error) {
	if h.err != nil {
		return 0, h.err
	}
	if len(h.ahead) > 0 {
		n := copy(p, h.ahead)
		n = h.scan(p[:n])
		h.consume(n)
		return n, h.err
	}
	n, err := r.Read(p)
	if end := h.scan(p[:n]); end < n {
		h.ahead = bytes.Clone(p[end:n])
		return end, h.err // r will return its error again
	}
	if h.err != nil {
		return 0, h.err
	}
	return n, err
}

// readBody reads what follows a head. A body that is not wanted may have few more lines than a
// head: net/http allocates as much for the lines of a trailer (RFC 9112, 7.1.2).
func (h *headReader) readBody(r io.Reader, p []byte, wanted bool) (n int, err error) {
	if len(h.ahead) > 0 {
		n = copy(p, h.ahead)
		h.consume(n)
	} else {
		n, err = r.Read(p)
	}
	h.early = append(h.early[:0], p[:min(n, 1)]...)
	if !wanted {
		if h.lines += bytes.Count(p[:n], []byte{'\n'}); h.lines > 2*maxHeadLines {
			h.err = errManyLines
			return 0, h.err
		}
	}
	return n, err
}

func (h *headReader) consume(n int) {
	if h.ahead = h.ahead[n:]; len(h.ahead) == 0 {
		h.ahead = nil
	}
}

// scan counts the lines of p up to an empty one, and returns where that ends; all of p if
// there is none. It returns 0 and sets err when there are too many.
func (h *headReader) scan(p []byte) (end int) {
	defer func() {
		h.size += end
		h.kept = append(h.kept, p[:min(end, MaxHead-len(h.kept))]...)
	}()
	for end < len(p) {
		i := bytes.IndexByte(p[end:], '\n')
		if i < 0 {
			h.text = h.text || hasText(p[end:])
			return len(p)
		}
		empty := !h.text && !hasText(p[end:end+i])
		end += i + 1
		h.text = false
		if h.lines++; h.lines > maxHeadLines {
			h.err = errManyLines
			return 0
		}
		if empty {
			return end
		}
	}
	return end
}

func hasText(line []byte) bool { return len(bytes.TrimRight(line, "\r")) > 0 }
