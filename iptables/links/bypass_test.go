package links_test

import (
	"runtime"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

// ciliumNode has the interfaces of a node with Cilium: a pod's, and cilium_host.
func ciliumNode(t *testing.T) (lxc netlink.Link) {
	t.Helper()
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "lxc1234"
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside.FD())}))
	lxc, err = netlink.LinkByName("lxc1234")
	require.NoError(t, err)
	t.Cleanup(func() { _ = netlink.LinkDel(lxc) })
	return lxc
}

func addCiliumHost(t *testing.T) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cilium_host"
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "cilium_net"}))
	t.Cleanup(func() { _ = netlink.LinkDel(&netlink.Veth{LinkAttrs: attrs}) })
}

func TestBypass(t *testing.T) {
	for name, attach := range map[string]func(*testing.T, netlink.Link){"tc": attachTC, "tcx": attachTCX} {
		t.Run(name, func(t *testing.T) {
			lxc := ciliumNode(t)
			attach(t, lxc)
			require.NoError(t, links.Bypass(), "without cilium_host the programs may be anybody's")
			addCiliumHost(t)
			err := links.Bypass()
			require.ErrorIs(t, err, links.ErrBypass)
			require.ErrorContains(t, err, "there is cilium_host, and lxc1234 has a "+name+" ingress program")
		})
	}
	t.Run("netkit", func(t *testing.T) {
		lxc := ciliumNode(t)
		require.NoError(t, netlink.LinkDel(lxc))
		inside, err := testbed.NewNamespace()
		require.NoError(t, err)
		defer func() { assert.NoError(t, inside.Close()) }()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "lxc1234"
		pair := &netlink.Netkit{LinkAttrs: attrs, Mode: netlink.NETKIT_MODE_L3}
		pair.SetPeerAttrs(&netlink.LinkAttrs{Name: "eth0", Namespace: netlink.NsFd(inside.FD())})
		if err := netlink.LinkAdd(pair); err != nil {
			t.Skip("this kernel has no netkit devices:", err)
		}
		t.Cleanup(func() { _ = netlink.LinkDel(pair) })
		addCiliumHost(t)
		require.ErrorContains(t, links.Bypass(), "lxc1234 is a netkit device")
	})
	t.Run("no program", func(t *testing.T) {
		ciliumNode(t)
		addCiliumHost(t)
		require.NoError(t, links.Bypass())
	})
}

// passAll loads a program that lets every packet pass: r0 = TC_ACT_UNSPEC; exit.
func passAll(t *testing.T) (fd int) {
	t.Helper()
	code := [...]uint64{0xffffffff_0000_00b7, 0x95}
	license := [...]byte{'G', 'P', 'L', 0}
	attr := struct { // the third member of union bpf_attr
		kind, instructions uint32
		code, license      uint64
		_                  [96]byte
	}{kind: unix.BPF_PROG_TYPE_SCHED_CLS, instructions: uint32(len(code)), code: uint64(uintptr(unsafe.Pointer(&code))), license: uint64(uintptr(unsafe.Pointer(&license)))}
	r, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	require.Zero(t, errno, errno.Error())
	t.Cleanup(func() { _ = unix.Close(int(r)) })
	return int(r)
}

func attachTC(t *testing.T, link netlink.Link) {
	t.Helper()
	index := link.Attrs().Index
	require.NoError(t, netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}))
	require.NoError(t, netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          passAll(t), Name: "cil_from_container", DirectAction: true,
	}))
}

func attachTCX(t *testing.T, link netlink.Link) {
	t.Helper()
	attr := struct { // of BPF_PROG_ATTACH
		target, program, kind, flags uint32
		replace, relative            uint32
		revision                     uint64
	}{target: uint32(link.Attrs().Index), program: uint32(passAll(t)), kind: 46}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	require.Zero(t, errno, errno.Error())
}

// The query needs a privilege, and a sandbox may forbid it (seccomp). What cannot be told
// counts as a bypass.
func TestBypassThatCannotBeToldIsOne(t *testing.T) {
	ciliumNode(t)
	addCiliumHost(t)
	err := withoutCapabilities(t, links.Bypass)
	require.ErrorIs(t, err, links.ErrBypass)
	require.ErrorContains(t, err, "it cannot be told whether lxc1234 runs an eBPF program")
	require.ErrorIs(t, err, unix.EPERM)
}

// withoutCapabilities runs fn on a thread that has none, and that ends with its goroutine.
func withoutCapabilities(t *testing.T, fn func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}
