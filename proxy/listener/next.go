package listener

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A connection is read either by an http.Server, through Read, or by Next: at first by Next,
// until HandOver, and again after TakeBack.

// maxRequest is how much Next reads at once. SDKs' requests have 300 to 600 bytes.
const maxRequest = 2 << 10

// requestBuffers are for Next. A connection that waits for its client has none.
var requestBuffers = sync.Pool{New: func() any { return new([maxRequest]byte) }}

// reader is the part of a Conn that Next and Respond need.
type reader struct {
	raw       syscall.RawConn // nil if the connection is not TCP
	readOnce  func(fd uintptr) (done bool)
	writeOnce func(fd uintptr)
	deadline  time.Time // of reads

	buffer   *[maxRequest]byte // nil if there is nothing in it
	size     int
	err      error
	response []byte // what is left of it
}

func newReader(c *Conn) (r reader) {
	if with, ok := c.Conn.(syscall.Conn); ok {
		if raw, err := with.SyscallConn(); err == nil {
			return reader{raw: raw, readOnce: c.readAvailable, writeOnce: c.writeAvailable}
		}
	}
	return reader{}
}

// Next waits for the client to send something and returns it: as a rule a whole request. The
// bytes are valid until the next call. The error is io.EOF if the client sends no more, and
// wraps os.ErrDeadlineExceeded if it has sent nothing for about as long as timeout: for half of
// it at least, since a deadline costs as much as what this saves. Nobody else may read.
func (c *Conn) Next(timeout time.Duration) ([]byte, error) {
	c.dropRequest()
	c.awaitAdmission()
	r := &c.reader
	if now := time.Now(); r.deadline.Before(now.Add(timeout / 2)) {
		r.deadline = now.Add(timeout)
		if err := c.SetReadDeadline(r.deadline); err != nil {
			return nil, err
		}
	}
	if r.raw == nil {
		r.buffer = newRequestBuffer()
		r.size, r.err = io.ReadAtLeast(c.Conn, r.buffer[:], 1)
	} else if err := r.raw.Read(r.readOnce); err != nil && !c.readLate(err) {
		return nil, err
	}
	return r.buffer[:r.size], r.err
}

// readLate reads what came in time although the deadline has passed: to a process that did not
// run meanwhile, as on an overloaded node, both happen at once, and Go looks at the deadline first.
func (c *Conn) readLate(err error) (done bool) {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	err = c.reader.raw.Control(func(fd uintptr) { done = c.readAvailable(fd) })
	return err == nil && done
}

// readAvailable reads what there is, or returns false.
func (c *Conn) readAvailable(fd uintptr) (done bool) {
	r := &c.reader
	r.buffer = newRequestBuffer()
	for {
		n, err := unix.Read(int(fd), r.buffer[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			c.dropRequest()
			return false
		case n == 0 && err == nil:
			err = io.EOF
		}
		r.size, r.err = max(n, 0), err
		return true
	}
}

func newRequestBuffer() *[maxRequest]byte {
	return requestBuffers.Get().(*[maxRequest]byte) //nolint:errcheck // nothing else is in it
}

func (c *Conn) dropRequest() {
	if c.reader.buffer != nil {
		requestBuffers.Put(c.reader.buffer)
		c.reader.buffer = nil
	}
}

// AwaitTurn holds the request that Next has returned back while its caller has had more than
// its share, see pace. It returns when the request arrived.
func (c *Conn) AwaitTurn() (arrived time.Time) {
	arrived = time.Now()
	if delay := c.limiter.nextRequest(c, arrived); delay > 0 {
		c.pause(delay)
		c.limiter.setIdle(c)
	}
	return arrived
}

// Respond writes a response to what Next has returned. It makes one system call, and sets no
// deadline, if the kernel takes all of it.
func (c *Conn) Respond(response []byte) error {
	r := &c.reader
	if r.raw != nil {
		r.response = response
		err := r.raw.Control(r.writeOnce)
		response, r.response = r.response, nil
		if err != nil || len(response) == 0 {
			return err
		}
	}
	_, err := c.Write(response)
	return err
}

// writeAvailable writes as much of the response as the kernel takes.
func (c *Conn) writeAvailable(fd uintptr) {
	if n, err := unix.Write(int(fd), c.reader.response); err == nil { // else Write returns it again
		c.reader.response = c.reader.response[n:]
	}
}

// HandOver makes Read return first what Next has returned last, for an http.Server.
func (c *Conn) HandOver() {
	if r := &c.reader; r.buffer != nil {
		c.head.ahead = bytes.Clone(r.buffer[:r.size])
		c.dropRequest()
	}
	c.limiter.setReader(c, false)
}

// TakeBack ends the use of Read, after an http.Server has let go of the connection. It returns
// false if the client has sent more than one request already: then Read must be used on, and
// returns unread first, which the server had read.
func (c *Conn) TakeBack(unread []byte) bool {
	c.inBody.Store(false)
	c.head.early = nil // it is in unread
	c.head.begin()
	c.writeBy = time.Time{}
	c.reader.deadline = time.Time{}
	if len(unread) > 0 || len(c.head.ahead) > 0 {
		c.head.ahead = append(bytes.Clone(unread), c.head.ahead...)
		c.pipelined = true
		return false
	}
	c.limiter.setReader(c, true)
	return true
}
