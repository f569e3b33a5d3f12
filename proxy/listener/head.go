package listener

import (
	"bytes"
	"errors"
	"io"
)

// maxHeadLines bounds the lines of a request's head, its first and last ones included.
// net/http bounds bytes alone, and makes some 130 bytes of each "a:\r\n". An SDK sends a
// dozen, a service mesh as many again.
const maxHeadLines = 64

var errManyLines = errors.New("the head of the request has too many lines")

// headReader counts the lines of a request's head before net/http parses it. It
// understands nothing of what it reads and changes nothing: all that it does is to stop
// a Read where an empty line ends, so that what follows (a body, or the next request on a
// connection where the client does not wait for answers) is kept for the next Read and
// the lines of each head are counted on their own. If net/http saw a head end elsewhere,
// more than one would share the bound; it would still be kept.
type headReader struct {
	lines int    // that have ended since begin
	text  bool   // the line that has not ended has more than CR
	ahead []byte // what was read after an empty line
	err   error  // errManyLines, from then on
}

// begin is called before the first Read of a head.
func (h *headReader) begin() { h.lines, h.text = 0, false }

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
		return end, h.err // a failure of r's will be there again
	}
	if h.err != nil {
		return 0, h.err
	}
	return n, err
}

// readBody reads what follows a head. A body that nobody wants must not have more lines
// than a head: net/http makes as much of the lines of a trailer (RFC 9112, 7.1.2).
func (h *headReader) readBody(r io.Reader, p []byte, wanted bool) (n int, err error) {
	if len(h.ahead) > 0 {
		n = copy(p, h.ahead)
		h.consume(n)
	} else {
		n, err = r.Read(p)
	}
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
