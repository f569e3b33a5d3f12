package handover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockFile = "owner.lock"
	// lockPatience is for an agent that is just exiting.
	lockPatience = time.Second
)

var errLocked = errors.New("another agent runs on this node")

// lockNode makes this agent the owner of the node's rules, or returns errLocked. The
// lock (flock(2)) lasts for as long as the file is open in any process: an agent that
// hands over gives the open file to the new one, so that the node is locked in between,
// and whichever of the two goes on.
func lockNode(ctx context.Context, dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w, holds %s and does not hand over now: stop it, or wait until its own upgrade is over", errLocked, f.Name())
			select {
			case <-time.After(lockPatience / 20):
				continue
			case <-ctx.Done():
			}
		}
		_ = f.Close()
		return nil, err
	}
}
