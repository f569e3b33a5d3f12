package links_test

import (
	"runtime"
	"testing"

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
	lxc, err = testbed.AddLink("lxc1234", 0, inside)
	require.NoError(t, err)
	t.Cleanup(func() { _ = netlink.LinkDel(lxc) })
	return lxc
}

func addCiliumHost(t *testing.T) {
	t.Helper()
	host, err := testbed.AddCiliumHost()
	require.NoError(t, err)
	t.Cleanup(func() { _ = netlink.LinkDel(host) })
}

func TestBypass(t *testing.T) {
	for name, attach := range map[string]func(netlink.Link) error{"tc": testbed.AttachTC, "tcx": testbed.AttachTCX} {
		t.Run(name, func(t *testing.T) {
			lxc := ciliumNode(t)
			require.NoError(t, attach(lxc))
			require.NoError(t, links.Bypass(), "without cilium_host the program may be any other's")
			addCiliumHost(t)
			err := links.Bypass()
			require.ErrorIs(t, err, links.ErrBypass)
			require.ErrorContains(t, err, "cilium_host exists, and lxc1234 has a "+name+" ingress program")
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

// The query requires a privilege, and seccomp may forbid it. Unknown counts as a bypass.
func TestBypassUnknown(t *testing.T) {
	ciliumNode(t)
	addCiliumHost(t)
	err := withoutCapabilities(t, links.Bypass)
	require.ErrorIs(t, err, links.ErrBypass)
	require.ErrorContains(t, err, "inspecting lxc1234 for eBPF programs failed")
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
