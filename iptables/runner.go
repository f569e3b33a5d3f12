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

// lockWait is how long one command waits for the xtables lock, in seconds;
// kube-proxy holds it for a second or two at a time on large nodes.
const lockWait = 10

// applyTimeout bounds one iptables-restore, the wait for the lock included.
const applyTimeout = 30 * time.Second

// lockFile is held by whoever changes legacy tables, for that long (XT_LOCK_NAME
// of iptables). The nft backend has no such lock.
const lockFile = "/run/xtables.lock"

// kernel reads and writes the tables of one backend through its commands.
type kernel struct {
	backend   Backend
	path      string // of iptables; iptables-restore stands beside it
	tables    *goiptables.IPTables
	contended *atomic.Uint64 // commands before which another program held the lock
}

func openKernel(backend Backend, contended *atomic.Uint64) (*kernel, error) {
	path, err := backend.path()
	if err != nil {
		return nil, err
	}
	if _, err = exec.LookPath(path + "-restore"); err != nil {
		return nil, fmt.Errorf("%s-restore is not on this machine: install the iptables package: %w", path, err)
	}
	tables, err := goiptables.New(goiptables.Path(path), goiptables.Timeout(lockWait))
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", path, err)
	}
	return &kernel{backend: backend, path: path, tables: tables, contended: contended}, nil
}

// noSuchChain is the exit status of iptables for a chain that is not there. The texts
// differ: iptables-nft 1.8.9 calls such a chain "incompatible". Other failures have
// other numbers.
const noSuchChain = 1

// read returns the state of one of our chains, whatever its rules.
func (k *kernel) read(c chain) (state, error) {
	k.countContention()
	s := state{chain: c}
	s.rules = nil
	lines, err := k.tables.List(c.table, c.hook)
	if err != nil {
		return state{}, toolError("reading the "+c.table+" table", err.Error())
	}
	s.hookRules = rulesIn(lines)
	lines, err = k.tables.List(c.table, c.name)
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

// rulesIn leaves out the lines of iptables -S that declare a chain (-N, -P).
func rulesIn(lines []string) []string {
	return slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "-A ") })
}

type stateOrError struct {
	state state
	err   error
}

// readAll reads several chains. In the nft backend, which has no lock, that is done at
// once: starting a command takes longer than what it does.
func (k *kernel) readAll(chains []chain) []stateOrError {
	found := make([]stateOrError, len(chains))
	var reading sync.WaitGroup
	for i, c := range chains {
		read := func() { found[i].state, found[i].err = k.read(c) }
		if k.backend == NFT {
			reading.Go(read)
		} else {
			read()
		}
	}
	reading.Wait()
	return found
}

// countContention finds out whether the command that comes next has to wait for the
// lock, by taking it for a moment, shared. iptables itself waits in silence.
func (k *kernel) countContention() {
	if k.backend != Legacy {
		return
	}
	f, err := os.Open(lockFile)
	if err != nil {
		return // nobody has ever held it
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		k.contended.Add(1)
	}
}

// apply hands input to iptables-restore: all of it takes effect, or nothing.
func (k *kernel) apply(ctx context.Context, input string) error {
	k.countContention()
	ctx, cancel := context.WithTimeout(ctx, applyTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, k.path+"-restore", "--noflush", fmt.Sprintf("--wait=%d", lockWait))
	cmd.Stdin = strings.NewReader(input)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return toolError("writing tables", fmt.Sprintf("%v: %s", err, stderr.String()))
	}
	return nil
}
