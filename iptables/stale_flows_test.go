package iptables_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

// connection is a keep-alive connection to the metadata service.
type connection struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func connect(t *testing.T, dial func(context.Context, string, string) (net.Conn, error)) *connection {
	t.Helper()
	conn, err := dial(t.Context(), "tcp", testbed.MetadataAddress)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return &connection{t, conn, bufio.NewReader(conn)}
}

// ask sends a request over the connection and returns the answer.
func (c *connection) ask() (string, error) {
	require.NoError(c.t, c.SetDeadline(time.Now().Add(patience)))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: imds\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func TestStaleFlows(t *testing.T) {
	for _, backend := range backends {
		for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
			t.Run(fmt.Sprintf("%s, mode %s", backend, mode), func(t *testing.T) {
				n := newNode(t, backend, testbed.Ptp)
				// As on a node with kube-proxy, connections are tracked already.
				n.iptables("-A", "POSTROUTING", "-s", "10.255.0.0/16", "-j", "MASQUERADE")
				pods, nodes := connect(t, n.pod.DialContext), connect(t, (&net.Dialer{}).DialContext)
				for _, c := range []*connection{pods, nodes} {
					answer, err := c.ask()
					require.NoError(t, err)
					require.Equal(t, "imds", answer)
				}
				n.redirect(mode)
				n.agent(mode)
				_, err := pods.ask()
				require.Error(t, err)
				assert.EqualValues(t, 2, n.leaks.Load(), "requests at IMDS: the two from before")
				answer, err := nodes.ask()
				require.NoError(t, err)
				assert.Equal(t, "imds", answer, "the node's own connection is kept")

				// A repair does not end connections to the agent.
				through := connect(t, n.pod.DialContext)
				answer, err = through.ask()
				require.NoError(t, err)
				require.Equal(t, "agent", answer)
				n.iptables("-F", "PREROUTING")
				n.eventually(n.inPlace, "repaired")
				answer, err = through.ask()
				require.NoError(t, err)
				assert.Equal(t, "agent", answer)
			})
		}
	}
}
