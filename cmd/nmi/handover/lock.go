package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockFile = "owner.lock"
	// lockPatience is for an agent that is just exiting.
	lockPatience = time.Second
	lockPoll     = lockPatience / 20
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
	if err := flock(ctx, f, lockPatience); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Lock keeps agents from starting until unlock is called, for a program that must not run beside
// one. It waits as long as patience for an agent that is exiting. Without the directory there is
// nothing to lock: no agent can take over there either.
func Lock(ctx context.Context, dir string, patience time.Duration) (unlock func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return func() {}, nil
	case err != nil:
		return nil, err
	}
	if err := flock(ctx, f, patience); err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

func flock(ctx context.Context, f *os.File, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return fmt.Errorf("%w, holds %s and does not hand over now: stop it, or wait until its own upgrade is over", errLocked, f.Name())
		}
	}
}
