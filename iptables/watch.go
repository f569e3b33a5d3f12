package iptables

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// nftablesGroup is NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h: every
	// change of a ruleset is announced to it.
	nftablesGroup = 7
	// legacyPoll is how often the legacy tables are looked at, by one system call
	// each. They announce nothing.
	legacyPoll = 250 * time.Millisecond
)

// watcher notices that the kernel's state may have changed, whoever changed it:
// links and addresses, routing rules, and the tables of one backend.
type watcher struct {
	links   chan struct{}           // of capacity 1, like rules
	rules   chan struct{}           // of the routing rules and of the tables
	good    atomic.Pointer[layouts] // the legacy tables when a check last found them well; nil is unknown
	legacy  []string                // names of the legacy tables to poll
	sockets []*nl.NetlinkSocket
	running sync.WaitGroup
}

// newWatcher returns a watcher of what can be watched, and an error for the rest.
// The tables are those of the backend that matter.
func newWatcher(ctx context.Context, backend Backend, tables []string) (*watcher, error) {
	w := &watcher{links: make(chan struct{}, 1), rules: make(chan struct{}, 1)}
	err := errors.Join(
		w.subscribe(ctx, w.links, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR),
		w.subscribe(ctx, w.rules, unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_RULE),
	)
	if backend != Legacy {
		err = errors.Join(err, w.subscribe(ctx, w.rules, unix.NETLINK_NETFILTER, nftablesGroup))
	} else {
		w.legacy = tables
		w.running.Go(func() { w.pollLegacy(ctx) })
	}
	if err != nil {
		return w, fmt.Errorf("listening to the kernel's changes: %w", err)
	}
	return w, nil
}

// close ends the subscriptions; the context that newWatcher was given must have
// ended.
func (w *watcher) close() {
	for _, s := range w.sockets {
		s.Close()
	}
	w.running.Wait()
}

// watched does a check, which reports whether it left the tables as they were. If
// it did, they are well as they were before it; if it did not, what they are now
// is for the next check to find out.
func (w *watcher) watched(check func() (untouched bool)) {
	before := w.layouts()
	if check() {
		w.good.Store(&before)
	} else {
		w.good.Store(nil)
	}
}

func notify(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

func (w *watcher) subscribe(ctx context.Context, changed chan<- struct{}, protocol int, groups ...uint) error {
	socket, err := nl.Subscribe(protocol, groups...)
	if err != nil {
		return err
	}
	w.sockets = append(w.sockets, socket)
	w.running.Go(func() {
		for {
			// What changed does not matter: even messages that were lost for
			// want of room (ENOBUFS), or cannot be read, say that something did.
			_, _, err := socket.Receive()
			if ctx.Err() != nil {
				return
			}
			notify(changed)
			if err == nil {
				continue
			}
			select { // an error that comes at once, and again, must not spin
			case <-time.After(debounce):
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

func (w *watcher) pollLegacy(ctx context.Context) {
	tick := time.NewTicker(legacyPoll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if good := w.good.Load(); good == nil || w.layouts() != *good {
				notify(w.rules)
			}
		case <-ctx.Done():
			return
		}
	}
}

// getInfo is struct ipt_getinfo of linux/netfilter_ipv4/ip_tables.h.
type getInfo struct {
	name       [32]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	entries    uint32
	size       uint32
}

// layouts are those of the legacy tables that matter.
type layouts [4]getInfo

func (w *watcher) layouts() (all layouts) {
	for i, table := range w.legacy {
		all[i] = legacyLayout(table)
	}
	return all
}

// legacyLayout asks the kernel for the size and layout of a legacy table: one
// system call, where iptables-legacy would copy the table. A flush, an insertion
// or a deletion shows in it; one rule replaced by another of the same size is
// left to the interval. The kernel makes the table if there is none, so this is
// for nodes that use the legacy backend.
func legacyLayout(table string) getInfo {
	var info getInfo
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return info
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	copy(info.name[:], table)
	const soGetInfo = 64 // IPT_SO_GET_INFO
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, soGetInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return getInfo{}
	}
	return info
}
