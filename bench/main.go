// Command bench measures the agent's main job: cached tokens through the real
// redirect, asked for from a pod's network namespace.
//
// It builds the world of the e2e (kernel, API server, the real binary), lets wrk
// ask on 32 keep-alive connections, and prints a table in Markdown. A bare
// net/http server that writes the same bytes stands behind the same rules in the
// same run: machines differ and are noisy, the ratio between the two says how
// much of the time is the agent's own.
//
// main.go builds and compares, wrk.go asks and reads what wrk says.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/podidentity/nmi/bench/wrk"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const (
	tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
	podAddr  = "10.244.0.11"

	// The server has one core for itself, wrk the other.
	serverCore, clientCore = 0, 1

	connections = 32
)

func main() {
	bare := flag.String("bare", "", "internal: serve the bytes of this file on port 2579, and nothing else")
	seconds := flag.Int("seconds", 10, "length of one measurement")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if *bare != "" {
		err = serveBare(*bare)
	} else if err = testbed.EnterNode(); err == nil {
		err = run(ctx, time.Duration(*seconds)*time.Second)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// serveBare is the yardstick: net/http, a constant body, the agent's headers.
func serveBare(file string) error {
	body, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return http.ListenAndServe("0.0.0.0:2579", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		_, _ = w.Write(body)
	}))
}

// row is one line of the table.
type row struct {
	name string
	wrk.Result
	cpu    time.Duration // of the server, for a request
	memory string
}

func run(ctx context.Context, length time.Duration) (err error) {
	id := imdstest.Identity{ClientID: "ca470000-0000-4000-8000-000000000001"}
	w, err := testbed.NewWorld(ctx, imdstest.Config{Identities: []imdstest.Identity{id}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	pod, err := w.AddPod(podAddr, testbed.Ptp)
	if err != nil {
		return err
	}
	if err = errors.Join(
		w.CreateNamespace(ctx, "shop"),
		w.Bind(ctx, "shop", "cart", id),
		w.CreatePod(ctx, "shop", "cart-0", podAddr, map[string]string{"aadpodidbinding": "cart"}),
	); err != nil {
		return err
	}

	var rows []row
	var body []byte
	for _, mode := range []string{"dnat", "redirect"} { // the rules of the last stay for the yardstick
		r, answer, err := measureAgent(ctx, w, pod, mode, length)
		if err != nil {
			return fmt.Errorf("mode %s: %w", mode, err)
		}
		rows, body = append(rows, r), answer
	}
	yardstick, err := measureBare(ctx, pod, body, length)
	if err != nil {
		return fmt.Errorf("bare net/http: %w", err)
	}
	report(append(rows, yardstick), len(body), length)
	return nil
}

func measureAgent(ctx context.Context, w *testbed.World, pod *testbed.Pod, mode string, length time.Duration) (r row, body []byte, err error) {
	w.IMDS.Reset()
	agent, err := testbed.StartPinnedAgent(serverCore, w.Kubeconfig, "--redirect-mode="+mode)
	if err != nil {
		return row{}, nil, err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err = agent.AwaitReady(ctx); err != nil {
		return row{}, nil, err
	}
	if body, err = fetch(ctx, pod); err != nil {
		return row{}, nil, err
	}
	result, cpu, err := load(ctx, pod, agent.Program, length)
	if err != nil {
		return row{}, nil, err
	}
	if n := w.IMDS.Requests(); n != 1 {
		return row{}, nil, fmt.Errorf("IMDS was asked %d times instead of once: these were not cached answers", n)
	}
	now, peak, err := agent.Memory()
	memory := fmt.Sprintf("%.1f / %.1f", float64(now)/(1<<20), float64(peak)/(1<<20))
	return row{name: "agent, mode " + mode, Result: result, cpu: cpu, memory: memory}, body, err
}

func measureBare(ctx context.Context, pod *testbed.Pod, body []byte, length time.Duration) (r row, err error) {
	file, err := os.CreateTemp("", "nmi-bench-")
	if err != nil {
		return row{}, err
	}
	defer os.Remove(file.Name())
	if _, err = file.Write(body); err != nil {
		return row{}, err
	}
	if err = file.Close(); err != nil {
		return row{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return row{}, err
	}
	server, err := testbed.StartProgram("taskset", nil, "-c", fmt.Sprint(serverCore), self, "-bare", file.Name())
	if err != nil {
		return row{}, err
	}
	defer func() { err = errors.Join(err, server.Kill()) }()
	for attempt := 0; ; attempt++ {
		if _, err = fetch(ctx, pod); err == nil {
			break
		}
		if attempt == 100 {
			return row{}, fmt.Errorf("%w; its log:\n%s", err, server.Log())
		}
		time.Sleep(20 * time.Millisecond) // it is starting
	}
	result, cpu, err := load(ctx, pod, server, length)
	return row{name: "bare net/http, same bytes and rules", Result: result, cpu: cpu, memory: "-"}, err
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

func report(rows []row, size int, length time.Duration) {
	fmt.Printf("Cached tokens from a pod's namespace through the redirect: %d bytes, %d keep-alive connections,\n", size, connections)
	fmt.Printf("server and wrk on a core each, %s a row. Ratio: requests/s over those of the bare server.\n", length)
	fmt.Printf("CPU is what the server used for a request; it changes less than the rest when the machine is busy.\n\n")
	fmt.Println("| server | requests/s | ratio | CPU, µs | p50 | p99 | resident memory now / peak, MiB |")
	fmt.Println("|---|---:|---:|---:|---:|---:|---:|")
	bare := rows[len(rows)-1].PerSecond
	for _, r := range rows {
		fmt.Printf("| %s | %.0f | %.2f | %.1f | %s | %s | %s |\n",
			r.name, r.PerSecond, r.PerSecond/bare, float64(r.cpu.Nanoseconds())/1000, r.P50, r.P99, strings.TrimSpace(r.memory))
	}
}

// load lets wrk ask for the token from the pod's namespace, after a second of
// warming up, and says how much CPU time the server used for a request.
func load(ctx context.Context, pod *testbed.Pod, server *testbed.Program, length time.Duration) (r wrk.Result, cpu time.Duration, err error) {
	tokens := wrk.Load{Core: clientCore, Connections: connections, URL: tokenURL}
	if _, err = tokens.Run(ctx, pod, time.Second); err != nil {
		return wrk.Result{}, 0, err
	}
	before, err := server.CPUTime()
	if err != nil {
		return wrk.Result{}, 0, err
	}
	if r, err = tokens.Run(ctx, pod, length); err != nil {
		return wrk.Result{}, 0, err
	}
	after, err := server.CPUTime()
	return r, time.Duration(float64(after-before) / (r.PerSecond * length.Seconds())), err
}
