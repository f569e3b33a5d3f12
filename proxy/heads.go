package proxy

import (
	"bytes"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/podidentity/nmi/proxy/listener"
)

// A client sends the same head with each request for a token, save for one value, a request ID
// that current SDKs draw anew each time. So once http.Server has parsed a head, and the request
// was answered with a token, the next one with the same bytes need not be parsed. A head says
// what is requested, never by whom: that is decided for each request.

const (
	// requestIDHeader has a GUID, with which Azure's SDKs find a request in their logs.
	requestIDHeader = "X-Ms-Client-Request-Id"
	requestIDLength = 36

	// maxHeads bounds the heads that are known of a caller: the SDKs and resources of a pod.
	// maxHeadCallers is more than a node's pods. Together they come to 4 MiB at most, see
	// listener.MaxHead.
	maxHeads       = 8
	maxHeadCallers = 256
)

// knownHead is the bytes of a head, and what they request.
type knownHead struct {
	before, after string // the request ID; after is "" in a head without one
	last          bool   // it ends its connection
	req           tokenRequest
}

// matches reports whether these are the bytes of the head, with any request ID.
func (h *knownHead) matches(request []byte) bool {
	if h.after == "" {
		return string(request) == h.before
	}
	id := len(h.before)
	rest := id + requestIDLength
	return len(request) == rest+len(h.after) && string(request[:id]) == h.before && string(request[rest:]) == h.after && isRequestID(request[id:rest])
}

func (h *knownHead) equals(other *knownHead) bool {
	return h.before == other.before && h.after == other.after
}

// isRequestID reports whether s could be a GUID. Nothing that has a meaning in a head can be
// spelled with its characters.
func isRequestID(s []byte) bool {
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') && c != '-' {
			return false
		}
	}
	return len(s) == requestIDLength
}

// newKnownHead returns the head of a request that http.Server has parsed from these bytes, or
// nil if either has anything unusual. r must be a GET of the token path that says no more than
// req.
func newKnownHead(head []byte, r *http.Request, req tokenRequest) *knownHead {
	connection := r.Header.Get("Connection")
	if r.Method != http.MethodGet || r.Proto != "HTTP/1.1" || r.ContentLength != 0 || len(r.TransferEncoding) != 0 ||
		req.bypassCache || req.refreshSHA256 != "" ||
		connection != "" && !strings.EqualFold(connection, "keep-alive") && !strings.EqualFold(connection, "close") {
		return nil
	}
	for _, name := range []string{"Content-Length", "Expect", "Trailer", "Upgrade"} {
		if r.Header[name] != nil {
			return nil
		}
	}
	if len(r.Header["Connection"]) > 1 || !isPlainHead(head) || !bytes.HasPrefix(head, []byte("GET "+r.RequestURI+" HTTP/1.1\r\n")) {
		return nil
	}
	before, after := cutRequestID(head, r.Header[requestIDHeader])
	return &knownHead{before: string(before), after: string(after), last: r.Close, req: req}
}

// isPlainHead reports whether a head consists of lines of printable ASCII that end with CRLF,
// none of which continues another, and of an empty one: nobody can read that in another way.
func isPlainHead(head []byte) bool {
	for len(head) > 0 {
		line, rest, found := bytes.Cut(head, []byte("\r\n"))
		if !found || len(line) == 0 {
			return found && len(rest) == 0
		}
		for i, c := range line {
			if c < 0x20 || c > 0x7e || i == 0 && c == ' ' {
				return false
			}
		}
		head = rest
	}
	return false
}

// cutRequestID returns what is before and after the value of the request ID's header, which has
// to be a GUID, and nowhere else in the head; else all of it, and nil.
func cutRequestID(head []byte, ids []string) (before, after []byte) {
	if len(ids) != 1 || !isRequestID([]byte(ids[0])) || bytes.Count(head, []byte(ids[0])) != 1 {
		return head, nil
	}
	before, after, _ = bytes.Cut(head, []byte(ids[0]))
	const field = "\r\n" + requestIDHeader + ": "
	if start := len(before) - len(field); start < 0 || !strings.EqualFold(string(before[start:]), field) || !bytes.HasPrefix(after, []byte("\r\n")) {
		return head, nil
	}
	return before, after
}

// knownHeads are the heads of all callers, the least recently used of each in front.
type knownHeads struct {
	mu       sync.Mutex
	byCaller *simplelru.LRU[netip.Addr, []*knownHead]
}

func newKnownHeads() *knownHeads {
	byCaller, err := simplelru.NewLRU[netip.Addr, []*knownHead](maxHeadCallers, nil)
	if err != nil { // only for a size below 1
		panic(err)
	}
	return &knownHeads{byCaller: byCaller}
}

// find returns the head that a caller's request consists of; nil if that is not known.
func (k *knownHeads) find(caller netip.Addr, request []byte) *knownHead {
	k.mu.Lock()
	defer k.mu.Unlock()
	heads, _ := k.byCaller.Get(caller)
	for i := len(heads) - 1; i >= 0; i-- {
		if head := heads[i]; head.matches(request) {
			copy(heads[i:], heads[i+1:])
			heads[len(heads)-1] = head
			return head
		}
	}
	return nil
}

// of returns the head of a request under way, and whether it is known already; else add has to
// be called with it. It returns nil for one that cannot be known.
func (k *knownHeads) of(c *listener.Conn, r *http.Request, req tokenRequest) (head *knownHead, known bool) {
	raw := c.Head()
	if k == nil || raw == nil || !c.Caller().IsValid() {
		return nil, false
	}
	if head = k.find(c.Caller(), raw); head != nil {
		return head, true
	}
	return newKnownHead(raw, r, req), false
}

// add remembers a head of a caller, instead of the one that it has not used for longest.
func (k *knownHeads) add(caller netip.Addr, head *knownHead) {
	k.mu.Lock()
	defer k.mu.Unlock()
	heads, _ := k.byCaller.Get(caller)
	if slices.ContainsFunc(heads, head.equals) { // several requests have come at once
		return
	}
	if len(heads) == maxHeads {
		heads = slices.Delete(heads, 0, 1)
	}
	k.byCaller.Add(caller, append(heads, head))
}
