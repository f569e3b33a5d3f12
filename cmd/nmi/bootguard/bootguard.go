// Package bootguard keeps a systemd unit on the node that writes the routing fence at
// each boot, before the kubelet starts: the kernel forgets its rules, and pods that run
// again would reach the metadata service until the agent's container has started.
//
// The life of the unit:
//
//  1. Run writes it to the node's directory of units, which is mounted into the agent's
//     container, and enables it by a symlink. It runs nothing on the node; systemd reads
//     the unit at the next boot.
//  2. Run checks both every interval, and repairs them. A file that the agent has not
//     written is left alone.
//  3. At boot systemd runs the unit's commands, which are the node's own ip(8).
//  4. The agent starts, finds its rules in place, and keeps them from then on.
//  5. The unit stays when the agent ends. Remove removes it.
package bootguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Config says where the unit is and what it runs. All fields are required.
type Config struct {
	Dir      string        // the node's /etc/systemd/system, as mounted in this container
	Commands []string      // what the unit runs, in this order; a failure is ignored
	Interval time.Duration // between two checks
	Logger   *slog.Logger
}

// Guard keeps the unit in place.
type Guard struct {
	cfg Config

	mu  sync.Mutex // guards err
	err error      // of the last check
}

// New returns a Guard that changes nothing before Run.
func New(cfg Config) *Guard { return &Guard{cfg: cfg} }

// Run keeps the unit in place until ctx ends, and leaves it there. It may be called again
// when it has returned.
func (g *Guard) Run(ctx context.Context) {
	tick := time.NewTicker(g.cfg.Interval)
	defer tick.Stop()
	for {
		g.check(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// check writes what is missing or differs. A repeated error is logged once.
func (g *Guard) check(ctx context.Context) {
	written, err := install(g.cfg.Dir, unitFile(g.cfg.Commands))
	g.mu.Lock()
	isNew := err != nil && (g.err == nil || g.err.Error() != err.Error())
	g.err = err
	g.mu.Unlock()
	switch {
	case isNew:
		g.cfg.Logger.WarnContext(ctx, "the boot guard cannot be kept on this node; running without it", "error", err)
	case written:
		g.cfg.Logger.InfoContext(ctx, "boot guard written: the node's next boot is closed before the kubelet starts", "unit", Unit, "directory", g.cfg.Dir)
	}
}

// Status is what an operator should know of the boot guard, a sentence; "" for nothing.
func (g *Guard) Status() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		return ""
	}
	return "no boot guard on this node: after a reboot pods may reach the metadata service until the agent runs: " + strings.ReplaceAll(g.err.Error(), "\n", "; ")
}

// explain says what an operator has to do about an error of the file system.
func explain(dir string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("mount the node's /etc/systemd/system at %s, if systemd is its init: %w", dir, err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%s is read-only: either the volume is mounted so, or the node's /etc is immutable, and then this option is not for it: %w", dir, err)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Errorf("the node forbids writing to %s: the agent must be root there, and a policy such as SELinux's must allow it: %w", dir, err)
	default:
		return err
	}
}
