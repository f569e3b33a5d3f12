package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/deploy/testbed"
)

// start is one start of the agent.
type start struct {
	ready     time.Duration // from exec
	cpu       time.Duration // until then, without the programs that it runs
	readyPeak int64
	peak      int64 // until settled
	settled   memory
	loaded    int64 // highest under load; of the last start alone
}

func (s start) String() string {
	return fmt.Sprintf("ready %s, cpu %s, peak until ready %s, until settled %s, settled %s (file %s), highest under load %s",
		seconds(s.ready), seconds(s.cpu), mib(s.readyPeak), mib(s.peak), mib(s.settled.resident), mib(s.settled.file), mib(s.loaded))
}

// measureStart starts the agent, and leaves it alone until it has settled; then it
// may be put under load.
func measureStart(ctx context.Context, w *testbed.World, pods []*testbed.Pod, p plan, loaded bool) (s start, err error) {
	w.IMDS.Reset()
	began := time.Now()
	agent, err := testbed.StartAgent(w.Kubeconfig)
	if err != nil {
		return start{}, err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := agent.AwaitReady(ctx); err != nil {
		return start{}, err
	}
	s.ready = time.Since(began)
	if s.cpu, err = cpuTime(agent.PID()); err != nil {
		return start{}, err
	}
	m, err := memoryOf(agent.PID())
	if err != nil {
		return start{}, err
	}
	s.readyPeak = m.peak
	select {
	case <-time.After(p.quiet):
	case <-ctx.Done():
		return start{}, ctx.Err()
	}
	if s.settled, err = memoryOf(agent.PID()); err != nil {
		return start{}, err
	}
	s.peak = s.settled.peak
	if !loaded {
		return s, nil
	}
	if err := forgetPeak(agent.PID()); err != nil {
		return start{}, err
	}
	if _, err := load(ctx, w, pods, p.load); err != nil {
		return start{}, err
	}
	m, err = memoryOf(agent.PID())
	s.loaded = m.peak
	return s, err
}

// startBytes is what the agent reads of the API server until it is ready: it
// starts with a forwarder between the two.
func startBytes(ctx context.Context, w *testbed.World) (n int64, err error) {
	target, err := url.Parse(w.Admin().Host)
	if err != nil {
		return 0, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	var read atomic.Int64
	go forward(ln, target.Host, &read)

	config, err := clientcmd.LoadFromFile(w.Kubeconfig)
	if err != nil {
		return 0, err
	}
	for _, cluster := range config.Clusters {
		cluster.Server = "https://" + ln.Addr().String()
	}
	kubeconfig := filepath.Join(filepath.Dir(w.Kubeconfig), "forwarded.kubeconfig")
	if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
		return 0, err
	}
	agent, err := testbed.StartAgent(kubeconfig)
	if err != nil {
		return 0, err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	err = agent.AwaitReady(ctx)
	return read.Load(), err
}

// forward passes connections on to an address until the listener is closed, and
// counts what comes back.
func forward(ln net.Listener, address string, read *atomic.Int64) {
	for {
		near, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer near.Close()
			far, err := net.Dial("tcp", address)
			if err != nil {
				return
			}
			defer far.Close()
			go func() {
				defer far.Close()
				_, _ = io.Copy(far, near)
			}()
			_, _ = io.Copy(near, io.TeeReader(far, count{read})) // until either end closes
		}()
	}
}

type count struct{ n *atomic.Int64 }

func (c count) Write(b []byte) (int, error) { c.n.Add(int64(len(b))); return len(b), nil }

// memory is what the kernel says of a process, in bytes.
type memory struct{ resident, peak, file int64 }

func memoryOf(pid int) (m memory, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return memory{}, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			m.resident = kb << 10
		case "VmHWM":
			m.peak = kb << 10
		case "RssFile":
			m.file = kb << 10
		}
	}
	if m.resident == 0 {
		return memory{}, errors.New("the agent has ended")
	}
	return m, nil
}

// forgetPeak makes the highest resident memory count from now on (proc(5),
// clear_refs).
func forgetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// cpuTime is what a process has used so far, to 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	const user, system, hertz = 11, 12, 100 // after the command's name; USER_HZ is 100 on every Linux
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	if len(fields) <= system {
		return 0, fmt.Errorf("/proc/%d/stat cannot be read: %s", pid, text)
	}
	var ticks int64
	for _, i := range []int{user, system} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / hertz, nil
}
