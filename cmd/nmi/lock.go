package main

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
	// lockPatience is for an agent that is just ending.
	lockPatience = time.Second
)

var errOwned = errors.New("another agent runs on this node")

// lock makes this agent the owner of the node's rules, or returns errOwned. The
// lock (flock(2)) lasts for as long as the file is open in any process: an agent
// that hands over gives the open file to its successor, so that in between, and
// whichever of the two goes on, nobody else can come.
func lock(ctx context.Context, dir string) (*os.File, error) {
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
			err = fmt.Errorf("%w and does not hand over now: it holds %s: stop it first, or wait until its own upgrade is over", errOwned, f.Name())
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
