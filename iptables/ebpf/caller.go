package ebpf

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/cilium/ebpf"
)

// Errors of Caller.
var (
	// ErrNotRedirected means that the programs have not seen the connection: it was not made
	// by a pod of this node.
	ErrNotRedirected = errors.New("the connection was not redirected by the agent's programs")
	// ErrNoPod means that the caller's cgroup is no pod's, or no longer one.
	ErrNoPod = errors.New("the caller's cgroup is not that of a pod")
)

// Caller returns the UID of the pod that made a connection which the agent has accepted; for a
// static pod the hash of its manifest, which its mirror pod has as the annotation
// kubernetes.io/config.hash.
func (p *Programs) Caller(conn syscall.Conn) (uid string, err error) {
	sockets := p.sockets.Load()
	if sockets == nil {
		return "", fmt.Errorf("the programs are not in place: %w", ErrNotRedirected)
	}
	var s kernelSocket
	err = descriptor(conn, func(fd int) error {
		key := int32(fd) //nolint:gosec // descriptors are small
		return sockets.Lookup(&key, &s)
	})
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return "", ErrNotRedirected
	case err != nil:
		return "", fmt.Errorf("looking up the caller: %w", err)
	}
	return p.podOf(cgroupID(s.Caller.Outer), cgroupID(s.Caller.Inner))
}

// podOf returns the UID of the pod that has one of these cgroups. The index is read anew when
// it has neither, which is so once for each new pod.
func (p *Programs) podOf(outer, inner cgroupID) (uid string, err error) {
	if uid = find(*p.index.Load(), outer, inner); uid != "" {
		return uid, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if uid = find(*p.index.Load(), outer, inner); uid != "" {
		return uid, nil
	}
	index, err := podsBelow(*p.tree.Load())
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoPod, err)
	}
	p.index.Store(&index)
	if uid = find(index, outer, inner); uid == "" {
		return "", fmt.Errorf("%w (IDs %d and %d)", ErrNoPod, outer, inner)
	}
	return uid, nil
}

func find(index map[cgroupID]string, outer, inner cgroupID) string {
	if uid, ok := index[outer]; ok {
		return uid
	}
	return index[inner]
}
