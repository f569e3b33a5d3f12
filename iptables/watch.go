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
	// legacyPoll is how often legacy tables are polled, with one system call each. They
	// announce no changes.
	legacyPoll = 250 * time.Millisecond
)

// watcher notifies of possible changes of the kernel's state: interfaces and addresses,
// routing rules, and the tables of one backend.
type watcher struct {
	links   chan struct{}           // links and addresses; of capacity 1, like rules
	rules   chan struct{}           // routing rules and tables
	desired atomic.Pointer[layouts] // of legacy tables that were found as desired; nil is unknown
	legacy  []string                // names of the legacy tables to poll
	sockets []*nl.NetlinkSocket
	running sync.WaitGroup
}

// newWatcher returns a watcher, and an error for what it cannot watch. tables are those
// of the backend to watch.
func newWatcher(ctx context.Context, backend Backend, tables []string) (*watcher, error) {
	w := &watcher{links: make(chan struct{}, 1), rules: make(chan struct{}, 1)}
	err := errors.Join(
		// RTNLGRP_IPV4_NETCONF announces an interface that appears, is renamed or goes
		// (inetdev_init, inetdev_destroy). RTNLGRP_LINK would also announce each change of
		// state, and a pod can cause thousands of those a second.
		w.subscribe(ctx, w.links, unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV4_IFADDR),
		w.subscribe(ctx, w.rules, unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_RULE),
	)
	if backend != Legacy {
		err = errors.Join(err, w.subscribe(ctx, w.rules, unix.NETLINK_NETFILTER, nftablesGroup))
	} else {
		w.legacy = tables
		asFound := w.layouts() // the first look at the rules is no poll's business, however long it takes
		w.desired.Store(&asFound)
		w.running.Go(func() { w.pollLegacy(ctx) })
	}
	if err != nil {
		return w, fmt.Errorf("subscribing to the kernel's changes: %w", err)
	}
	return w, nil
}

// close ends the subscriptions, after the context of newWatcher has ended.
func (w *watcher) close() {
	for _, s := range w.sockets {
		s.Close()
	}
	w.running.Wait()
}

// observe runs a reconciliation, which reports whether it found the tables as desired.
// Their layouts from before are then the ones that polling compares with. If it did not,
// the next poll triggers another one.
func (w *watcher) observe(reconcile func() (asDesired bool)) {
	before := w.layouts()
	if reconcile() {
		w.desired.Store(&before)
	} else {
		w.desired.Store(nil)
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
			// What changed does not matter. Messages that were lost (ENOBUFS) or are
			// unreadable are changes too.
			_, _, err := socket.Receive()
			if ctx.Err() != nil {
				return
			}
			notify(changed)
			if err == nil {
				continue
			}
			select { // do not spin on a persistent error
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
			if desired := w.desired.Load(); desired == nil || w.layouts() != *desired {
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

// layouts are those of the watched legacy tables.
type layouts [4]getInfo

func (w *watcher) layouts() (all layouts) {
	for i, table := range w.legacy {
		all[i] = legacyLayout(table)
	}
	return all
}

// legacyLayout returns the size and layout of a legacy table with one system call, where
// iptables-legacy would copy the table. A flush, an insertion or a deletion changes it; a
// rule replaced by one of the same size is found after Config.Interval. The kernel
// creates a missing table, so this is for nodes that use the legacy backend.
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
