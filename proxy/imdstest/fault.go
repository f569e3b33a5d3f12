package imdstest

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"net"
	"net/http"
	"strconv"
	"time"
)

// Fault changes the answer to one token request. The zero Fault changes nothing;
// what is set may be combined, in the order below.
type Fault struct {
	Delay time.Duration // before anything else
	Hang  bool          // there is no answer until the client or the server gives up
	Reset bool          // the connection is reset instead of an answer

	Status     int                  // with Body, instead of the answer asked for; 0 leaves that
	Body       string               //
	Edit       func(map[string]any) `json:"-"` // changes the fields of a token
	RetryAfter string               // header; "" for none
	Type       string               // Content-Type; "" means JSON

	Gzip bool          // the body is compressed, whether or not the client takes that
	Slow time.Duration // the body takes as long as that
	Cut  bool          // the connection is closed after half of the body
}

// Inject queues faults; each is for one token request.
func (s *Server) Inject(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, faults...)
}

func (s *Server) nextFault() Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) == 0 {
		return Fault{}
	}
	f := s.faults[0]
	s.faults = s.faults[1:]
	return f
}

// pieces is in how many the body of a slow answer is sent.
const pieces = 10

// send writes the answer as its fault says. It calls leave before the client can have
// all of it: that is when the next request may come.
func (a answer) send(w http.ResponseWriter, r *http.Request, leave func()) {
	f := a.fault
	switch {
	case f.Hang:
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case f.Reset:
		leave()
		reset(w)
		return
	}
	body := []byte(a.body)
	if f.Gzip {
		body = compressed(body)
		w.Header().Set("Content-Encoding", "gzip")
	}
	w.Header().Set("Content-Type", cmp.Or(f.Type, "application/json; charset=utf-8"))
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	w.WriteHeader(a.status)
	if f.Cut {
		body = body[:len(body)/2]
	}
	if f.Slow > 0 {
		body = trickle(w, r, body, f.Slow)
	}
	leave()
	_, _ = w.Write(body)
	if f.Cut {
		flush(w)
		panic(http.ErrAbortHandler) // closes the connection
	}
}

// trickle sends all but the last piece of a body, and waits before that.
func trickle(w http.ResponseWriter, r *http.Request, body []byte, over time.Duration) (last []byte) {
	flush(w)
	piece := len(body) / pieces
	for range pieces - 1 {
		_, _ = w.Write(body[:piece])
		flush(w)
		body = body[piece:]
		pause(r.Context(), over/(pieces-1))
	}
	return body
}

func flush(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() } // fails when the client has gone

// reset closes the connection with a TCP reset, where it is one of TCP.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // the next line closes it in any case
	}
	_ = conn.Close()
}

func compressed(body []byte) []byte {
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	if _, err := zip.Write(body); err != nil {
		panic(err) // a Buffer takes all
	}
	if err := zip.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}
