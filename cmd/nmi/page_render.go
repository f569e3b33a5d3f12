package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"runtime/debug"
	"time"
)

// render is the answer with its status line and headers; nil when ctx ends.
func (s *pageServer) render(ctx context.Context, req *http.Request, status int) []byte {
	s.rendering.Lock()
	defer s.rendering.Unlock()
	select {
	case <-time.After(time.Until(s.next)):
	case <-ctx.Done():
		return nil
	}
	start := time.Now()
	defer func() { s.next = time.Now().Add(min(renderPause*time.Since(start), maxRenderPause)) }()
	page := &renderedPage{header: make(http.Header)}
	if status == http.StatusOK {
		s.handle(page, req)
	} else {
		http.Error(page, http.StatusText(status), status)
	}
	if page.header.Get("Content-Type") == "" {
		page.header.Set("Content-Type", "text/plain; charset=utf-8")
	}
	page.header.Set("Date", time.Now().UTC().Format(http.TimeFormat)) // RFC 9110, section 6.6.1
	resp := http.Response{
		StatusCode: page.status, ProtoMajor: 1, ProtoMinor: 1, Header: page.header, Request: req, // a HEAD request gets no body
		Body: io.NopCloser(&page.body), ContentLength: int64(page.body.Len()), Close: true,
	}
	var b bytes.Buffer
	b.Grow(page.body.Len() + 512)
	_ = resp.Write(&b) // to memory
	return b.Bytes()
}

// handle is the handler's answer, or 500 if it panics: a page is no reason for the
// agent to end.
func (s *pageServer) handle(page *renderedPage, req *http.Request) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("rendering a page has panicked", "path", req.URL.Path, "panic", r, "stack", string(debug.Stack()))
			page.status = http.StatusInternalServerError
			page.body.Reset()
		}
	}()
	s.handler.ServeHTTP(page, req)
	page.WriteHeader(http.StatusOK)
}

// renderedPage is an http.ResponseWriter to memory.
type renderedPage struct {
	header http.Header
	status int // 0 until it is written
	body   bytes.Buffer
}

func (p *renderedPage) Header() http.Header { return p.header }

func (p *renderedPage) WriteHeader(status int) {
	if p.status == 0 {
		p.status = status
	}
}

func (p *renderedPage) Write(b []byte) (int, error) {
	p.WriteHeader(http.StatusOK)
	return p.body.Write(b)
}
