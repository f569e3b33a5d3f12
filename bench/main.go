// Command bench measures the agent's main job beside its peers: cached tokens through
// the real redirect, asked for from pods' network namespaces.
//
// It builds the world of the e2e (kernel, API server, the real binary) and lets every
// server of package peer answer the same loads, in turn, round after round:
//
//  1. Closed loops of wrk, for the highest rate of each server: with wrk's constant
//     request, with the recorded heads of SDKs, with a new connection for each request.
//  2. Open loops, for the latency at fixed rates: shares of the slowest server's highest
//     rate, and half of each server's own.
//  3. Azure's SDKs themselves, for how much of what they send takes the fast path.
//
// main.go reads the flags and builds the world, suite.go has the loads and the rounds,
// observe.go takes one measurement, machine.go says what it was taken on.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/bench/openloop"
	"github.com/podidentity/nmi/bench/peer"
	"github.com/podidentity/nmi/bench/sdk"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// The server has one core for itself, the load the other.
const serverCore, clientCore = 0, 1

// Internal first arguments, with which the program does a part of the work.
const (
	serveBody = "serve-body" // peer.ServeBody
	generate  = "generate"   // openloop.Main
)

// options are what can be chosen.
type options struct {
	only    *regexp.Regexp // names of loads
	rounds  int
	seconds int
	short   bool
	out     string
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case serveBody:
			return peer.ServeBody(os.Args[2])
		case generate:
			return openloop.Main(os.Args[2])
		}
	}
	var o options
	only := flag.String("only", "", "regular expression: measure only loads whose name matches")
	flag.IntVar(&o.rounds, "rounds", 5, "times that every server is measured under every load")
	flag.IntVar(&o.seconds, "seconds", 5, "length of one measurement")
	flag.BoolVar(&o.short, "short", false, "one round of one second, few loads: to see that it works, not to compare")
	flag.StringVar(&o.out, "out", "", "directory to write the report and its plots to, besides printing it")
	heads := flag.String("record-heads", "", "record the request heads of the SDKs into this directory, and do nothing else")
	flag.Parse()
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if flag.NArg() > 0 || o.rounds < 1 || o.seconds < 1 {
		return errors.New("want no arguments, and at least one round of at least one second")
	}
	if o.short {
		o.rounds, o.seconds = 1, 1
	}
	if err := testbed.EnterNode(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *heads != "" {
		return sdk.Record(ctx, *heads)
	}
	return measureAll(ctx, o)
}

// pods is how many pods there are. The agent keeps 64 connections of each.
const pods = 4

// newSuite builds the world and the servers. Close it when done.
func newSuite(ctx context.Context, o options, dir string) (_ *suite, err error) {
	id := imdstest.Identity{ClientID: "ca470000-0000-4000-8000-000000000001"}
	s := &suite{options: o}
	if s.world, err = testbed.NewWorld(ctx, imdstest.Config{Identities: []imdstest.Identity{id}}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := errors.Join(s.world.CreateNamespace(ctx, "shop"), s.world.Bind(ctx, "shop", "cart", id)); err != nil {
		return nil, err
	}
	if s.kubepods, err = testbed.NewKubepods(); err != nil {
		return nil, err
	}
	for i := range pods {
		addr := fmt.Sprintf("10.244.0.%d", 11+i)
		pod, err := s.world.AddPod(addr, testbed.Ptp)
		if err != nil {
			return nil, err
		}
		s.pods = append(s.pods, pod)
		name := fmt.Sprintf("cart-%d", i)
		if err := s.world.CreatePod(ctx, "shop", name, addr, map[string]string{"aadpodidbinding": "cart"}); err != nil {
			return nil, err
		}
		object, err := s.world.Kube.CoreV1().Pods("shop").Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		container, err := s.kubepods.NewContainer(string(object.UID), pod.Namespace)
		if err != nil {
			return nil, err
		}
		pod.Enter(container)
	}
	return s, s.addServers(ctx, peer.Config{World: s.world, Pods: s.kubepods, Core: serverCore, Dir: dir})
}

// close takes everything down.
func (s *suite) close() error {
	var errs []error
	for _, pod := range s.pods {
		errs = append(errs, pod.Close())
	}
	if s.kubepods != nil {
		errs = append(errs, s.kubepods.Close())
	}
	return errors.Join(append(errs, s.world.Close())...)
}

func (s *suite) addServers(ctx context.Context, c peer.Config) (err error) {
	redirect := c.Agent("redirect")
	if c.Body, err = s.body(ctx, redirect); err != nil {
		return fmt.Errorf("a token from the agent: %w", err)
	}
	s.tokenBytes = len(c.Body)
	nginx, err := c.Nginx()
	if err != nil {
		return err
	}
	s.nginx = nginx.Version
	s.servers = []peer.Server{redirect, c.Agent("dnat"), c.AgentEBPF(), nginx, c.NetHTTP(serveBody)}
	if s.short {
		s.servers = slices.Delete(s.servers, 1, 2)
	}
	if path := strings.TrimSpace(os.Getenv("BENCH_PEER")); path != "" {
		other, err := c.OtherAgent(ctx, path)
		if err != nil {
			return fmt.Errorf("BENCH_PEER: %w", err)
		}
		s.servers = append(s.servers, other)
	}
	return nil
}
