package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/bench/report"
)

// newReport returns a report without measurements.
func (s *suite) newReport() (report.Report, error) {
	machine, err := describeMachine()
	if err != nil {
		return report.Report{}, err
	}
	machine.Nginx = s.nginx
	r := report.Report{
		Date: time.Now().Format(time.DateOnly), Command: command(os.Args[1:]), Commit: commit(),
		Machine: machine, Rounds: s.rounds, Seconds: s.seconds, TokenBytes: s.tokenBytes,
	}
	for _, server := range s.servers {
		r.Servers = append(r.Servers, server.Name)
	}
	r.Goals = goals(s.servers[0].Name, "nginx proxy_cache", "net/http")
	return r, nil
}

func describeMachine() (report.Machine, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return report.Machine{}, err
	}
	kernel, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return report.Machine{}, err
	}
	// wrk prints its version and then fails for want of a URL.
	version, _ := exec.Command("wrk", "-v").CombinedOutput()
	return report.Machine{
		CPU: cpuModel(string(cpu)), Cores: runtime.NumCPU(), Kernel: kernel,
		Go: runtime.Version(), Wrk: wrkVersion(string(version)),
	}, nil
}

// otherCPU is the CPU time that all programs of the machine have used since its start, less
// that of this program and of the children that it has waited for. What they have not been
// charged for, such as interrupts, does not count.
func otherCPU() (time.Duration, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	sum, err := parseProgramTime(string(text))
	if err != nil {
		return 0, err
	}
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var usage unix.Rusage
		if err := unix.Getrusage(who, &usage); err != nil {
			return 0, err
		}
		sum -= time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	return sum, nil
}

// parseProgramTime reads user, nice and system time of all cores (proc_stat(5)).
func parseProgramTime(stat string) (sum time.Duration, err error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on Linux
	fields := strings.Fields(stat)
	if len(fields) < 4 || fields[0] != "cpu" {
		return 0, errors.New("/proc/stat cannot be read")
	}
	for _, field := range fields[1:4] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

func cpuModel(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown CPU"
}

// wrkVersion reads "wrk debian/4.1.0-3+b2 [epoll] Copyright ...".
func wrkVersion(text string) string {
	fields := strings.Fields(text)
	if len(fields) < 2 {
		return "unknown"
	}
	return fields[1]
}

// commit is of the sources, with "-dirty" if they were changed.
func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "an unknown commit"
	}
	return strings.TrimSpace(string(out))
}

// command is what to type for the same measurements.
func command(args []string) string {
	text := "sudo make bench"
	if path := os.Getenv("BENCH_PEER"); path != "" {
		text = "sudo BENCH_PEER=<its binary> make bench"
	}
	var flags []string
	for i := 0; i < len(args); i++ {
		if strings.TrimLeft(args[i], "-") == "out" {
			i++
			continue
		}
		flag := args[i]
		if strings.ContainsAny(flag, " |()[]*?$\\") {
			flag = "'" + flag + "'"
		}
		flags = append(flags, flag)
	}
	if len(flags) > 0 {
		text += ` BENCHFLAGS="` + strings.Join(flags, " ") + `"`
	}
	return text
}
