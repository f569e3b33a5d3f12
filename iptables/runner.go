package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"
)

// lockWait is how long a command waits for the xtables lock, in seconds. On large nodes
// kube-proxy holds it for a second or two.
const lockWait = 10

// applyTimeout bounds one iptables-restore, including the wait for the lock.
const applyTimeout = 30 * time.Second

// lockFile is held by programs while they change legacy tables (XT_LOCK_NAME of
// iptables). The nft backend has no such lock.
const lockFile = "/run/xtables.lock"

// runner reads and writes the tables of one backend through its commands.
type runner struct {
	backend   Backend
	path      string // of iptables; iptables-restore is next to it
	tables    *goiptables.IPTables
	contended *atomic.Uint64 // commands that found the lock held by another program
}

func newRunner(backend Backend, contended *atomic.Uint64) (*runner, error) {
	path, err := backend.path()
	if err != nil {
		return nil, err
	}
	if _, err = exec.LookPath(path + "-restore"); err != nil {
		return nil, fmt.Errorf("%s-restore is %w: %w", path, errNotInstalled, err)
	}
	tables, err := goiptables.New(goiptables.Path(path), goiptables.Timeout(lockWait))
	if err != nil {
		return nil, fmt.Errorf("getting the version of %s: %w", path, err)
	}
	return &runner{backend: backend, path: path, tables: tables, contended: contended}, nil
}

// noSuchChain is the exit status of iptables for a chain that does not exist; other
// failures have others. The texts differ: iptables-nft 1.8.9 calls it "incompatible".
const noSuchChain = 1

// read returns the state of a chain, whatever its rules.
func (r *runner) read(c chain) (state, error) {
	r.countContention()
	s := state{chain: c}
	s.rules = nil
	lines, err := r.tables.List(c.table, c.hook)
	if err != nil {
		return state{}, toolError("reading the "+c.table+" table", err.Error())
	}
	s.hookRules = rulesIn(lines)
	lines, err = r.tables.List(c.table, c.name)
	var failure *goiptables.Error
	switch {
	case errors.As(err, &failure) && failure.ExitStatus() == noSuchChain:
		return s, nil
	case err != nil:
		return state{}, toolError("reading chain "+c.name, err.Error())
	}
	s.exists = true
	s.rules = rulesIn(lines)
	return s, nil
}

// rulesIn drops the lines of iptables -S that declare a chain (-N, -P).
func rulesIn(lines []string) []string {
	return slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "-A ") })
}

type stateOrError struct {
	state state
	err   error
}

// readAll reads several chains, concurrently in the nft backend, which has no lock:
// starting a command takes longer than its work.
func (r *runner) readAll(chains []chain) []stateOrError {
	found := make([]stateOrError, len(chains))
	var reading sync.WaitGroup
	for i, c := range chains {
		read := func() { found[i].state, found[i].err = r.read(c) }
		if r.backend == NFT {
			reading.Go(read)
		} else {
			read()
		}
	}
	reading.Wait()
	return found
}

// countContention finds out whether the next command has to wait for the lock, by
// taking it for a moment, shared. iptables itself waits silently.
func (r *runner) countContention() {
	if r.backend != Legacy {
		return
	}
	f, err := os.Open(lockFile)
	if err != nil {
		return // no program has held it yet
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		r.contended.Add(1)
	}
}

// apply runs iptables-restore on input: all of it takes effect, or nothing.
func (r *runner) apply(ctx context.Context, input string) error {
	r.countContention()
	ctx, cancel := context.WithTimeout(ctx, applyTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.path+"-restore", "--noflush", fmt.Sprintf("--wait=%d", lockWait))
	cmd.Stdin = strings.NewReader(input)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return toolError("writing tables", fmt.Sprintf("%v: %s", err, stderr.String()))
	}
	return nil
}
