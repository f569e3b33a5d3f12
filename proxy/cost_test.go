package proxy

import (
	"bufio"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// cached returns a server, and a request whose token it has in memory.
func cached(tb testing.TB) (s *Server, r *http.Request, w *discardWriter) {
	tb.Helper()
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{one, two}})
	fakeIMDS := imds.Start()
	tb.Cleanup(fakeIMDS.Close)
	base, err := url.Parse(fakeIMDS.URL)
	require.NoError(tb, err)
	up := upstream.New(upstream.Config{IMDS: base})
	tb.Cleanup(up.Close)
	tokens := tokencache.New(up.Token, tokencache.Config{})
	tb.Cleanup(tokens.Close)
	log := slog.New(slog.DiscardHandler)
	s = New(Config{Pods: runResolver(tb, podresolver.Config{Logger: log}), Tokens: tokens, Upstream: up, Logger: log})
	r, err = http.ReadRequest(bufio.NewReader(strings.NewReader(request("GET", tokenURL, "Metadata: true"))))
	require.NoError(tb, err)
	r.RemoteAddr = bound + ":40000"
	w = &discardWriter{header: make(http.Header)}
	ask(s, w, r)
	require.Equal(tb, http.StatusOK, w.status)
	return s, r, w
}

// ask serves a request once more.
func ask(s *Server, w *discardWriter, r *http.Request) {
	header := r.Header
	s.ServeHTTP(w, r)
	r.Header = header // it is dropped once it has been read
}

// cachedAllocs is what a cached token may cost: the values of two parameters, the
// response, and the length and its header field.
const cachedAllocs = 5.0

func TestCachedTokenAllocations(t *testing.T) {
	s, r, w := cached(t)
	assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() { ask(s, w, r) }), cachedAllocs)
}

// BenchmarkToken is a cached token from request to answer, without the network.
func BenchmarkToken(b *testing.B) {
	s, r, w := cached(b)
	b.ReportAllocs()
	for b.Loop() {
		ask(s, w, r)
	}
}

type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header { return w.header }

func (w *discardWriter) WriteHeader(status int) { w.status = status }

func (w *discardWriter) Write(p []byte) (int, error) { return len(p), nil }
