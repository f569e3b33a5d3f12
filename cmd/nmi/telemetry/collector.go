package telemetry

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
)

// collector sends to a collector by OTLP/HTTP with protobuf. OpenTelemetry's own exporters for
// that link gRPC, which would make the program a third larger.
type collector struct {
	url     string
	headers http.Header
	gzip    bool
	timeout time.Duration // of an export with its retries
	client  *http.Client
}

const (
	defaultEndpoint = "http://localhost:4318"
	defaultTimeout  = 10 * time.Second
	// firstPause is before an export is tried again; it doubles.
	firstPause = time.Second
)

// newCollector reads the variables of OpenTelemetry's specification ("OpenTelemetry Protocol
// Exporter", Configuration Options).
func newCollector(signal, version string) (*collector, error) {
	c := &collector{timeout: defaultTimeout, headers: http.Header{
		"Content-Type": {"application/x-protobuf"}, "User-Agent": {"nmi/" + version},
	}}
	own := os.Getenv("OTEL_EXPORTER_OTLP_" + signal + "_ENDPOINT") // used as it is; the other is a base
	endpoint := cmp.Or(own, os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"), defaultEndpoint)
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %q is not a URL: want http://<host>:<port> or https://", endpoint)
	}
	if own == "" {
		u = u.JoinPath("v1", strings.ToLower(signal))
	}
	c.url = u.String()
	for pair := range strings.SplitSeq(variable(signal, "HEADERS"), ",") {
		name, value, _ := strings.Cut(pair, "=")
		value, err := url.PathUnescape(strings.TrimSpace(value))
		if err != nil {
			return nil, errors.New("OTEL_EXPORTER_OTLP_HEADERS: want <name>=<value>, separated by commas, the values URL-encoded") // it may be a secret
		}
		if name = strings.TrimSpace(name); name != "" {
			c.headers.Set(name, value)
		}
	}
	if timeout := variable(signal, "TIMEOUT"); timeout != "" {
		ms, err := strconv.Atoi(timeout)
		if err != nil || ms <= 0 {
			return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_TIMEOUT: %q is not a number of milliseconds", timeout)
		}
		c.timeout = time.Duration(ms) * time.Millisecond
	}
	c.gzip = variable(signal, "COMPRESSION") == "gzip"
	tlsConfig, err := newTLSConfig(signal)
	if err != nil {
		return nil, err
	}
	c.client = &http.Client{
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: tlsConfig, MaxIdleConns: 1, IdleConnTimeout: 90 * time.Second},
		// The headers may hold a secret.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

func newTLSConfig(signal string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if file := variable(signal, "CERTIFICATE"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_CERTIFICATE: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_CERTIFICATE: no certificate in PEM in %s", file)
		}
	}
	if file := variable(signal, "CLIENT_CERTIFICATE"); file != "" {
		pair, err := tls.LoadX509KeyPair(file, variable(signal, "CLIENT_KEY"))
		if err != nil {
			return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and _CLIENT_KEY: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// send sends a message. It tries again for as long as the time-out allows where the
// specification says that this may help.
func (c *collector) send(ctx context.Context, message proto.Message) error {
	body, err := proto.Marshal(message)
	if err != nil {
		return err
	}
	if c.gzip {
		var compressed bytes.Buffer
		w := gzip.NewWriter(&compressed)
		_, _ = w.Write(body) // to memory
		_ = w.Close()
		body = compressed.Bytes()
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	for pause := firstPause; ; pause *= 2 {
		retryAfter, err := c.post(ctx, body)
		if err == nil || retryAfter < 0 {
			return err
		}
		select {
		case <-time.After(max(pause, retryAfter)):
		case <-ctx.Done():
			return err
		}
	}
}

// post sends a body once. retryAfter is negative if it must not be sent again.
func (c *collector) post(ctx context.Context, body []byte) (retryAfter time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return -1, err
	}
	req.Header = c.headers.Clone()
	if c.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
	if resp.StatusCode/100 == 2 {
		return 0, nil
	}
	err = fmt.Errorf("%s answered %s", c.url, resp.Status)
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return time.Duration(min(max(seconds, 0), 3600)) * time.Second, err
	}
	return -1, err
}

func (c *collector) close() { c.client.CloseIdleConnections() }
