package bootguard

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m.Run) }

// readOnly runs fn where dir is a read-only mount.
func readOnly(dir string, fn func()) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return err
		}
		for _, mount := range []struct {
			source, target string
			flags          uintptr
		}{
			{"", "/", unix.MS_REC | unix.MS_PRIVATE},
			{dir, dir, unix.MS_BIND},
			{"", dir, unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY},
		} {
			if err := unix.Mount(mount.source, mount.target, "", mount.flags, ""); err != nil {
				return err
			}
		}
		return nil
	}, fn)
}

// withoutRights runs fn as somebody who may write no file of root's.
func withoutRights(fn func()) error {
	return onThread(func() error {
		const nobody = 65534
		unix.Syscall(unix.SYS_SETFSUID, nobody, 0, 0) // it returns no error
		return nil
	}, fn)
}

// onThread runs prepare, and then fn, on a thread that ends with them.
func onThread(prepare func() error, fn func()) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		err := prepare()
		if err == nil {
			fn()
		}
		done <- err
	}()
	return <-done
}
