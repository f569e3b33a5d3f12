package main

import (
	"bufio"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// answering is a connection on which each request gets the next of the answers.
func answering(t *testing.T, answers ...string) *conn {
	t.Helper()
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		in := bufio.NewReader(there)
		for _, answer := range answers {
			for line := ""; line != "\r\n"; {
				var err error
				if line, err = in.ReadString('\n'); err != nil {
					return
				}
			}
			if _, err := io.WriteString(there, answer); err != nil {
				return
			}
		}
	}()
	return &conn{net: here, in: bufio.NewReader(here), urls: []string{"/"}}
}

func TestGetReadsOneAnswerAtATime(t *testing.T) {
	c := answering(t,
		"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello",
		"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	for _, want := range []int{200, 429, 200} {
		require.NotNil(t, c.net)
		status, err := c.get(t.Context(), "/")
		require.NoError(t, err)
		assert.Equal(t, want, status)
	}
	assert.Nil(t, c.net, "the server closes it")
}

func TestGetNoticesALostAnswer(t *testing.T) {
	for name, answer := range map[string]string{
		"none":        "",
		"half a head": "HTTP/1.1 200 OK\r\nContent-Le",
		"half a body": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
		"not HTTP":    "HTTP/1.1 abc\r\n\r\n", "no status": "HTTP\r\n\r\n",
		"length absurd": "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := answering(t, answer)
			_, err := c.get(t.Context(), "/")
			require.Error(t, err)
			assert.Nil(t, c.net)
		})
	}
}

func TestAskCounts(t *testing.T) {
	c := answering(t,
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-")
	for range 4 {
		c.ask(t.Context(), time.Now())
	}
	assert.Equal(t, 4, c.result.Requests)
	assert.Equal(t, 1, c.result.Throttled)
	assert.Equal(t, 2, c.result.Failed)
	assert.Len(t, c.took, 4)
}

func TestMedianRatio(t *testing.T) {
	// Rounds are compared with their neighbours: a slow round is slow for both.
	assert.InDelta(t, 1.1, medianRatio([]float64{11, 220, 33}, []float64{10, 200, 30}), 1e-9)
}
