package peer

import (
	"context"
	_ "embed"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/podidentity/nmi/deploy/testbed"
)

//go:embed nginx.conf
var nginxConfig string

// Nginx returns nginx with proxy_cache, in front of an origin that has c.Body.
func (c Config) Nginx() (Server, error) {
	out, err := exec.Command("nginx", "-v").CombinedOutput()
	if err != nil {
		return Server{}, fmt.Errorf("nginx (Debian's package nginx-light): %w", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // ends with this process
	if err != nil {
		return Server{}, err
	}
	origin := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(c.Body)
	})}
	go origin.Serve(ln) //nolint:errcheck // without it nginx answers 502, which is an error of the measurement
	_, version, _ := strings.Cut(strings.TrimSpace(string(out)), "nginx/")
	return Server{Name: "nginx proxy_cache", Version: version, start: func(ctx context.Context) (*testbed.Program, error) {
		dir := filepath.Join(c.Dir, "nginx")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		config := fillNginxConfig(dir, ln.Addr().String())
		file := filepath.Join(dir, "nginx.conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			return nil, err
		}
		return c.behindRedirect(ctx, "nginx", "-c", file)
	}}, nil
}

func fillNginxConfig(dir, origin string) string {
	return strings.NewReplacer("{dir}", dir, "{origin}", origin).Replace(nginxConfig)
}
