package openloop

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/bench/sdk"
)

const (
	// patience is for the responses that are missing when the last request was due.
	patience = time.Second
	// distinct requests are formatted before the start.
	distinct = 4096
	// maxResponse bounds a response; a token's is 2 KB.
	maxResponse = 64 << 10
)

// connection has one request at a time.
type connection struct {
	fd       int
	due      time.Duration // of the request; what follows is after the start, too
	freed    time.Duration // since when it has none
	response []byte        // what has been read of it
	buffer   [maxResponse]byte
}

type generator struct {
	cfg      Config
	requests [][]byte
	schedule schedule
	epoll    int
	byFD     map[int32]*connection
	idle     []*connection // first in, first out
	busy     int
	start    time.Time

	answered     int // in the measurement
	unanswered   int
	latency, lag *hdrhistogram.Histogram
}

func newGenerator(c Config) (*generator, error) {
	addr, err := netip.ParseAddrPort(c.Address)
	if err != nil {
		return nil, err
	}
	g := &generator{
		cfg: c, requests: requests(c.Head), schedule: newSchedule(c.Rate, c.Warmup+c.Length),
		byFD: make(map[int32]*connection), latency: newHistogram(), lag: newHistogram(),
	}
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	for range c.Connections {
		if err := g.dial(addr); err != nil {
			g.close()
			return nil, err
		}
	}
	return g, nil
}

// requests are heads with IDs that differ.
func requests(head string) [][]byte {
	all := make([][]byte, distinct)
	for i := range all {
		var id [16]byte
		_, _ = rand.Read(id[:]) // never fails (crypto/rand)
		text := fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
		all[i] = bytes.ReplaceAll([]byte(head), []byte(sdk.ID), []byte(text))
	}
	return all
}

func (g *generator) dial(addr netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	c := &connection{fd: fd}
	g.byFD[int32(fd)] = c //nolint:gosec // descriptors are small
	g.idle = append(g.idle, c)
	return errors.Join(
		unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}),
		unix.SetNonblock(fd, true),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}), //nolint:gosec // as above
	)
}

func (g *generator) close() {
	for _, c := range g.byFD {
		_ = unix.Close(c.fd)
	}
	_ = unix.Close(g.epoll)
}

// run sends what is due and reads what has come, in turn, until every request has its
// response or patience ends.
func (g *generator) run() error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the loop allocates nothing
	var events [64]unix.EpollEvent
	end := g.cfg.Warmup + g.cfg.Length
	g.start = time.Now()
	for g.busy > 0 || g.schedule.next < g.schedule.total {
		now := time.Since(g.start)
		if now > end+patience {
			g.giveUp(now)
			return nil
		}
		if err := g.send(now); err != nil {
			return err
		}
		n, err := unix.EpollWait(g.epoll, events[:], 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll_wait: %w", err)
		}
		for i := range max(n, 0) {
			if err := g.receive(g.byFD[events[i].Fd]); err != nil {
				return err
			}
		}
	}
	return nil
}

// send sends the requests that are due, as far as there are idle connections.
func (g *generator) send(now time.Duration) error {
	for len(g.idle) > 0 {
		due, ok := g.schedule.take(now)
		if !ok {
			return nil
		}
		c := g.idle[0]
		g.idle = append(g.idle[:0], g.idle[1:]...) // a few dozen; keeps the array
		request := g.requests[g.schedule.next%distinct]
		// The send buffer of a connection without an open request is empty.
		if n, err := unix.Write(c.fd, request); err != nil || n < len(request) {
			return fmt.Errorf("wrote %d bytes of a request of %d: %w", n, len(request), err)
		}
		c.due, c.response = due, c.buffer[:0]
		g.busy++
		now = time.Since(g.start)
		if due >= g.cfg.Warmup {
			_ = g.lag.RecordValue(int64(now - max(due, c.freed))) // within the range, by patience
		}
	}
	return nil
}

// receive reads what has come on a connection.
func (g *generator) receive(c *connection) error {
	n, err := unix.Read(c.fd, c.buffer[len(c.response):])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return fmt.Errorf("reading a response: %w", err)
	case n == 0:
		return fmt.Errorf("the server closed a connection after %d bytes of a response", len(c.response))
	}
	c.response = c.buffer[:len(c.response)+n]
	length, err := responseLength(c.response)
	switch {
	case err != nil:
		return err
	case length > maxResponse || length > 0 && len(c.response) > length:
		return fmt.Errorf("response of %d bytes, %d read: more than expected", length, len(c.response))
	case length == 0 || len(c.response) < length:
		return nil
	}
	c.freed = time.Since(g.start)
	g.record(c.due, c.freed, &g.answered)
	g.busy--
	g.idle = append(g.idle, c)
	return nil
}

// record counts a request as answered or unanswered at now, unless it is of the warm-up.
func (g *generator) record(due, now time.Duration, count *int) {
	if due >= g.cfg.Warmup {
		*count++
		_ = g.latency.RecordValue(int64(now - due)) // within the range, by patience
	}
}

// giveUp counts the requests without a response, sent or not.
func (g *generator) giveUp(now time.Duration) {
	for _, c := range g.byFD {
		if !slices.Contains(g.idle, c) {
			g.record(c.due, now, &g.unanswered)
		}
	}
	for due, ok := g.schedule.take(now); ok; due, ok = g.schedule.take(now) {
		g.record(due, now, &g.unanswered)
	}
}

func (g *generator) result() Result {
	at := func(h *hdrhistogram.Histogram, percentile float64) time.Duration {
		return time.Duration(h.ValueAtPercentile(percentile))
	}
	return Result{
		Requests: g.schedule.next, PerSecond: float64(g.answered) / g.cfg.Length.Seconds(), Unanswered: g.unanswered,
		P50: at(g.latency, 50), P99: at(g.latency, 99), P999: at(g.latency, 99.9), Max: time.Duration(g.latency.Max()),
		LagP99: at(g.lag, 99), LagMax: time.Duration(g.lag.Max()),
	}
}
