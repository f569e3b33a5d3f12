package proxy

import (
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// neverAnswers is an IMDS that answers no request until its context ends, or the test.
type neverAnswers struct{ asked, ended, testEnds chan struct{} }

func (n neverAnswers) RoundTrip(r *http.Request) (*http.Response, error) {
	n.asked <- struct{}{}
	select {
	case <-r.Context().Done():
		n.ended <- struct{}{}
		return nil, r.Context().Err()
	case <-n.testEnds:
		return nil, errors.New("the test has ended")
	}
}

// A connection that gives way takes its request with it, although http.Server does not
// notice: it looks out for a client's end only as long as the client sends nothing more.
func TestTheRequestOfAnEvictedConnectionEnds(t *testing.T) {
	imds := neverAnswers{make(chan struct{}, 8), make(chan struct{}, 8), make(chan struct{})}
	defer close(imds.testEnds)
	w := newWorld(t, func(c *Config) { c.Upstream, c.MaxConnections = imds, 2 })
	for range 2 {
		c := w.connect(unbound)
		_, err := io.WriteString(c, "GET /metadata/versions HTTP/1.1\r\nHost: h\r\n\r\nG")
		require.NoError(t, err)
		<-imds.asked
	}
	assert.Empty(t, imds.ended)
	w.connect(bound) // takes a place of the pod that has two
	<-imds.ended
}

// A body that nobody wants, trailer included, is not waited for.
func TestTrailersAreNotWaitedFor(t *testing.T) {
	w := newWorld(t, nil)
	resp, _ := w.send(bound, request("GET", tokenURL, "Metadata: true", "Transfer-Encoding: chunked")+"0\r\n"+manyFields(1300)+"\r\n")
	assert.Equal(t, 200, resp.StatusCode)
}
