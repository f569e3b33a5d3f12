package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/nmi/bench/openloop"
	"github.com/podidentity/nmi/bench/peer"
	"github.com/podidentity/nmi/bench/report"
	"github.com/podidentity/nmi/bench/sdk"
	"github.com/podidentity/nmi/bench/wrk"
	"github.com/podidentity/nmi/deploy/testbed"
)

const (
	tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net"
	warmup   = time.Second
	// settle is for agents that change their rules, and reset connections, once they know
	// the pods.
	settle = 2 * time.Second
)

func (s *suite) length() time.Duration { return time.Duration(s.seconds) * time.Second }

// closedLoop measures a server under a load, from its start to its end.
func (s *suite) closedLoop(ctx context.Context, server peer.Server, l load, round int) error {
	tokens := wrk.Load{Core: clientCore, Connections: l.connections, URL: tokenURL, Close: l.close}
	if l.head != "" {
		head, err := sdk.Find(l.head)
		if err != nil {
			return err
		}
		tokens.Head = head.Text
	}
	return s.measure(ctx, server, l.name, func(program *testbed.Program) error {
		pods := s.pods[:l.pods]
		if !s.short {
			if _, err := tokens.RunAll(ctx, pods, warmup); err != nil {
				return err
			}
		}
		var result wrk.Result
		sample, err := observe(ctx, server, program, func() (requests int, err error) {
			result, err = tokens.RunAll(ctx, pods, s.length())
			return result.Requests, err
		})
		if err != nil {
			return err
		}
		sample.Load, sample.Server, sample.Round = l.name, server.Name, round
		sample.PerSecond, sample.P50, sample.P99, sample.P999 = result.PerSecond, us(result.P50), us(result.P99), us(result.P999)
		s.add(sample)
		return nil
	})
}

// openLoop is closedLoop at a fixed rate.
func (s *suite) openLoop(ctx context.Context, server peer.Server, name string, rate float64, round int) error {
	head, err := sdk.Find(openHead)
	if err != nil {
		return err
	}
	c := openloop.Config{
		Address: testbed.MetadataAddress, Head: head.Text, Connections: 32,
		Rate: rate, Warmup: warmup, Length: s.length(),
	}
	return s.measure(ctx, server, name, func(program *testbed.Program) error {
		var result openloop.Result
		sample, err := observe(ctx, server, program, func() (requests int, err error) {
			result, err = c.Run(ctx, s.pods[0], clientCore, generate)
			return result.Requests, err
		})
		if err != nil {
			return err
		}
		sample.Load, sample.Server, sample.Round, sample.Rate = name, server.Name, round, rate
		sample.PerSecond, sample.P50, sample.P99, sample.P999 = result.PerSecond, us(result.P50), us(result.P99), us(result.P999)
		sample.Max, sample.LagP99 = us(result.Max), us(result.LagP99)
		sample.Saturated, sample.Invalid = result.Saturated(rate), !result.Trustworthy()
		s.add(sample)
		return nil
	})
}

func (s *suite) add(sample report.Sample) {
	s.report.Samples = append(s.report.Samples, sample)
	fmt.Fprintf(os.Stderr, "%d: %-34s %-20s %7.0f/s  CPU %5.1f µs  p50 %6.0f µs  p99 %6.0f µs\n",
		sample.Round, sample.Load, sample.Server, sample.PerSecond, sample.CPU, sample.P50, sample.P99)
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// measure starts a server for fn, which puts a load on it, and sees to it that the agent
// answered from memory. A server that the suite can do without may fail.
func (s *suite) measure(ctx context.Context, server peer.Server, load string, fn func(*testbed.Program) error) error {
	program, err := s.start(ctx, server)
	if err == nil {
		if err = fn(program); err != nil {
			err = fmt.Errorf("%w; its log:\n%s", err, program.Log())
		}
		err = errors.Join(err, server.Stop(program))
	}
	if n := s.world.IMDS.Requests(); err == nil && server.Agent && n != 1 {
		err = fmt.Errorf("IMDS was asked %d times instead of once: these were not cached answers", n)
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s, %s: %w", load, server.Name, err)
	if server.Optional && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "not measured:", err)
		s.report.NotMeasured = append(s.report.NotMeasured, load+", "+server.Name)
		return nil
	}
	return err
}

// start starts a server and waits until it has answered every pod.
func (s *suite) start(ctx context.Context, server peer.Server) (*testbed.Program, error) {
	s.world.IMDS.Reset()
	program, err := server.Start(ctx)
	if err != nil {
		return nil, err
	}
	for _, pod := range s.pods {
		if err := awaitToken(ctx, pod, program); err != nil {
			return nil, errors.Join(fmt.Errorf("%w; its log:\n%s", err, program.Log()), server.Stop(program))
		}
	}
	if server.Optional {
		time.Sleep(settle)
	}
	return program, nil
}

func awaitToken(ctx context.Context, pod *testbed.Pod, program *testbed.Program) (err error) {
	const attempts, interval = 1500, 20 * time.Millisecond
	for range attempts {
		if _, err = fetch(ctx, pod); err == nil {
			return nil
		}
		select {
		case <-program.Done():
			return errors.Join(errors.New("the server has ended"), err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(interval):
		}
	}
	return err
}

// body is what a server answers.
func (s *suite) body(ctx context.Context, server peer.Server) (body []byte, err error) {
	program, err := s.start(ctx, server)
	if err != nil {
		return nil, err
	}
	body, err = fetch(ctx, s.pods[0])
	return body, errors.Join(err, server.Stop(program))
}

// fetch asks for the token once.
func fetch(ctx context.Context, pod *testbed.Pod) ([]byte, error) {
	client := pod.Client(5 * time.Second)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, tokenURL, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Metadata", "true")
	return get(client, req)
}

func get(client *http.Client, req *http.Request) ([]byte, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return body, err
}

// counters are what observe reads before a load and after it.
type counters struct {
	at            time.Time
	server, other time.Duration // CPU time: of the server; of programs that are not the load
	fastPath      map[string]float64
}

func readCounters(ctx context.Context, server peer.Server, program *testbed.Program) (c counters, err error) {
	if server.Agent {
		if c.fastPath, err = fastPathCounters(ctx); err != nil {
			return counters{}, err
		}
	}
	if c.server, err = peer.CPUTime(program); err != nil {
		return counters{}, err
	}
	c.at = time.Now()
	c.other, err = otherCPU()
	return c, err
}

// observe runs a load and returns what it cost the server, what took the fast path, and how
// much of the machine was not theirs.
func observe(ctx context.Context, server peer.Server, program *testbed.Program, run func() (requests int, err error)) (report.Sample, error) {
	before, err := readCounters(ctx, server, program)
	if err != nil {
		return report.Sample{}, err
	}
	requests, err := run()
	if err != nil {
		return report.Sample{}, err
	}
	after, err := readCounters(ctx, server, program)
	if err != nil {
		return report.Sample{}, err
	}
	used := after.server - before.server
	return report.Sample{
		CPU:      us(used) / float64(requests),
		Other:    max(0, 100*(after.other-before.other-used).Seconds()/after.at.Sub(before.at).Seconds()), // ticks of 10 ms are rounded
		FastPath: growth(before.fastPath, after.fastPath),
	}, nil
}

// fastPathCounters reads the agent's counters of its fast path.
func fastPathCounters(ctx context.Context) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9090/metrics", nil)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	text, err := get(client, req)
	if err != nil {
		return nil, fmt.Errorf("the agent's metrics: %w", err)
	}
	return parseFastPath(string(text))
}

// parseFastPath returns the series of Prometheus's text format whose names tell of the fast path.
func parseFastPath(text string) (map[string]float64, error) {
	series := make(map[string]float64)
	for scanner := bufio.NewScanner(strings.NewReader(text)); scanner.Scan(); {
		line := scanner.Text()
		i := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || i < 0 {
			continue
		}
		name, _, _ := strings.Cut(line[:i], "{")
		if !strings.Contains(name, "_fast_path") || !strings.HasSuffix(name, "_total") {
			continue
		}
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("malformed metric %q: %w", line, err)
		}
		series[line[:i]] = value
	}
	return series, nil
}

// growth is what counters have counted from before to after.
func growth(before, after map[string]float64) map[string]float64 {
	grown := make(map[string]float64)
	for name, value := range after {
		if value > before[name] {
			grown[name] = value - before[name]
		}
	}
	return grown
}
