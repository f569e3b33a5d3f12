package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// hangUps asks for tokens that are not in memory, each time with more behind the request,
// and resets the connection before there is an answer. Then http.Server does not notice
// that the client has gone.
func hangUps(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
	const workers, hold = 64, 100 * time.Millisecond
	head := testbed.LargeHead()
	var asked atomic.Int64
	var running sync.WaitGroup
	for i, pod := range pods {
		for j := range workers {
			running.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					conn := dial(ctx, pod, testbed.MetadataAddress)
					if conn == nil {
						continue
					}
					request := strings.Replace(head, "vault", fmt.Sprintf("hung-%d-%d-%d", i, j, n), 1)
					if _, err := io.WriteString(conn, request+"G"); err == nil {
						asked.Add(1)
						pause(ctx, hold)
					}
					if tcp, ok := conn.(*net.TCPConn); ok {
						_ = tcp.SetLinger(0)
					}
					_ = conn.Close()
				}
			})
		}
	}
	pause(ctx, time.Second)
	close(started)
	<-ctx.Done()
	running.Wait()
	return fmt.Sprintf("%d requests", asked.Load())
}

// dials opens connections, waits a moment for each, and resets it. Those to the agent's port
// on the node's address nothing has redirected. It does so in the pod's namespace, without
// Go's net, which needs more of its core for a dial than the agent to refuse it.
func dials(address string, port int) func(context.Context, []*testbed.Namespace, chan<- struct{}) string {
	return func(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
		const workers, perSecond = 16, 10_000
		var dialled atomic.Int64
		var running sync.WaitGroup
		to := &unix.SockaddrInet4{Port: port, Addr: netip.MustParseAddr(address).As4()}
		for range workers {
			running.Go(func() {
				_ = pods[0].Do(func() error {
					began := time.Now()
					for n := 0; ctx.Err() == nil; n++ {
						if ahead := time.Duration(n)*time.Second*workers/perSecond - time.Since(began); ahead > time.Millisecond {
							time.Sleep(ahead)
						}
						fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
						if err != nil {
							return err
						}
						if err := unix.Connect(fd, to); err == nil || errors.Is(err, unix.EINPROGRESS) {
							_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1) // #nosec G115 -- file descriptors are small
							dialled.Add(1)
						}
						_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
						_ = unix.Close(fd)
					}
					return nil
				})
			})
		}
		began := time.Now()
		close(started)
		<-ctx.Done()
		rate := float64(dialled.Load()) / time.Since(began).Seconds()
		running.Wait()
		return fmt.Sprintf("%.0f dials/s", rate)
	}
}
