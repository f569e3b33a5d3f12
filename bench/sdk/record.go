package sdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const resource = "https://vault.azure.net"

// Record lets each client ask a stand-in for IMDS for a token, in a namespace that has
// nothing else, and writes the heads that they send to dir.
func Record(ctx context.Context, dir string) error {
	ns, err := testbed.NewNamespace()
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // it vanishes with the process
	host, _, err := net.SplitHostPort(testbed.MetadataAddress)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "ip", "address", "add", host+"/32", "dev", "lo")
	if err := errors.Join(ns.Start(cmd), cmd.Wait()); err != nil {
		return fmt.Errorf("giving lo the metadata address: %w", err)
	}
	ln, err := ns.Listen(testbed.MetadataAddress)
	if err != nil {
		return err
	}
	recorder := &recorder{Listener: ln}
	defer imdstest.NewServer(imdstest.Config{}).Serve(recorder)()
	for _, c := range Clients {
		if err := c.record(ctx, ns, recorder, dir); err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	return nil
}

func (c Client) record(ctx context.Context, ns *testbed.Namespace, recorder *recorder, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	recorder.reset()
	if err := c.GetToken(ctx, ns, resource); err != nil {
		return err
	}
	text, err := recorder.tokenHead()
	if err != nil {
		return err
	}
	version, err := c.version()
	if err != nil {
		return err
	}
	head := Head{Name: c.Name, Version: version, Text: generalize(text)}
	file := strings.NewReplacer("@", "", "/", "-").Replace(c.Name) + ".txt"
	return os.WriteFile(filepath.Join(dir, file), []byte(head.format()), 0o644)
}

// recorder keeps what is read from its connections.
type recorder struct {
	net.Listener

	mu    sync.Mutex
	bytes bytes.Buffer // guarded by mu; one client at a time, which does not pipeline
}

func (r *recorder) Accept() (net.Conn, error) {
	conn, err := r.Listener.Accept()
	return &recordedConn{Conn: conn, recorder: r}, err
}

func (r *recorder) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes.Reset()
}

// tokenHead returns the last head that asked for a token. Default credentials probe
// before.
func (r *recorder) tokenHead() (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := r.bytes.String()
	start := strings.LastIndex(text, "GET /metadata/identity/oauth2/token?")
	if start < 0 {
		return "", fmt.Errorf("no request for a token among %q", text)
	}
	head, _, found := strings.Cut(text[start:], "\r\n\r\n")
	if !found {
		return "", fmt.Errorf("incomplete request %q", head)
	}
	return head + "\r\n\r\n", nil
}

type recordedConn struct {
	net.Conn

	recorder *recorder
}

func (c *recordedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.recorder.mu.Lock()
	defer c.recorder.mu.Unlock()
	c.recorder.bytes.Write(p[:n])
	return n, err
}
