package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// Client talks to the control socket of the fake metadata service.
type Client struct{ http *http.Client }

// NewClient returns a client of the Unix socket at path.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{&http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Configure replaces the fakes by others.
func (c *Client) Configure(ctx context.Context, cfg Config) error {
	return c.do(ctx, http.MethodPut, "/config", cfg, nil)
}

// Inject queues faults of the metadata service, each for one request for a token.
func (c *Client) Inject(ctx context.Context, faults ...imdstest.Fault) error {
	return c.do(ctx, http.MethodPost, "/faults", faults, nil)
}

// Reset forgets all that was counted, and faults not yet met.
func (c *Client) Reset(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/reset", nil, nil)
}

// Counts returns what came since the start or the last Reset.
func (c *Client) Counts(ctx context.Context) (counts Counts, err error) {
	err = c.do(ctx, http.MethodGet, "/counts", nil, &counts)
	return counts, err
}

// Entra returns where the fake of Entra is.
func (c *Client) Entra(ctx context.Context) (entra Entra, err error) {
	err = c.do(ctx, http.MethodGet, "/entra", nil, &entra)
	return entra, err
}

// do sends in, if there is any, and decodes the answer into out, if there is one.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://imds"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("control socket of the fake metadata service: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= http.StatusBadRequest {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("fake metadata service: %s %s: %s: %s", method, path, resp.Status, strings.TrimSpace(string(text)))
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}
