package peer

import (
	"context"
	"net/http"
	"os"
	"path/filepath"

	"github.com/podidentity/nmi/deploy/testbed"
)

// NetHTTP returns a net/http server with a constant response: this program, which must
// call ServeBody when its first argument is flag.
func (c Config) NetHTTP(flag string) Server {
	return Server{Name: "net/http", start: func(ctx context.Context) (*testbed.Program, error) {
		file := filepath.Join(c.Dir, "body")
		if err := os.WriteFile(file, c.Body, 0o600); err != nil {
			return nil, err
		}
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return c.behindRedirect(ctx, self, flag, file)
	}}
}

// ServeBody answers every request on the agent's port with the bytes of a file.
func ServeBody(file string) error {
	body, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return http.ListenAndServe("0.0.0.0:2579", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(body)
	}))
}

const contentType = "application/json; charset=utf-8"
