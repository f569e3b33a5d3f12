package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPUTime is what a process has used of the processors, all of its threads, without the
// programs that it ran. It reads the process's CPU clock (clock_getcpuclockid(3)), which
// counts nanoseconds where /proc/<pid>/stat counts hundredths of a second.
func CPUTime(pid int) (time.Duration, error) {
	const cpuclockSched = 2 // linux/posix-timers_types.h
	clock := ^int32(pid)<<3 | cpuclockSched
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("reading the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// ChildrenCPUTime is what the programs have used that a process has run and waited for, to 10 ms
// (proc_pid_stat(5), cutime and cstime).
func ChildrenCPUTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name may have blanks
	var ticks int64
	const cutime, cstime, tick = 13, 14, 10 * time.Millisecond // USER_HZ is 100 on Linux
	for i, field := range strings.Fields(rest) {
		if i == cutime || i == cstime {
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * tick, nil
}

// Memory is the resident memory of a process in bytes.
type Memory struct {
	Resident int64
	Peak     int64 // of Resident, since the start or ResetPeak
	File     int64 // pages of its program's file, part of Resident
}

// MemoryOf reads it (proc_pid_status(5)).
func MemoryOf(pid int) (m Memory, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Memory{}, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			m.Resident = kb << 10
		case "VmHWM":
			m.Peak = kb << 10
		case "RssFile":
			m.File = kb << 10
		}
	}
	if m.Resident == 0 {
		return Memory{}, errors.New("the process has ended")
	}
	return m, nil
}

// ResetPeak makes Memory.Peak count from now on (proc_pid_clear_refs(5)).
func ResetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// Descriptors is how many files and sockets a process has open.
func Descriptors(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries), err
}

// Metrics are the samples of a page of metrics by name, with their labels as they are written.
type Metrics map[string]float64

// Scrape reads a page of metrics.
func Scrape(ctx context.Context, url string) (Metrics, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", resp.Status)
	}
	return parseMetrics(string(page)), err
}

// parseMetrics reads Prometheus's text format.
func parseMetrics(page string) Metrics {
	m := make(Metrics)
	for line := range strings.Lines(page) {
		name, value, found := cutLast(strings.TrimSpace(line), " ")
		if v, err := strconv.ParseFloat(value, 64); found && err == nil && !strings.HasPrefix(line, "#") {
			m[name] = v
		}
	}
	return m
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
