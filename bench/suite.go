package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/podidentity/nmi/bench/peer"
	"github.com/podidentity/nmi/bench/report"
	"github.com/podidentity/nmi/bench/sdk"
	"github.com/podidentity/nmi/deploy/testbed"
)

// suite is the world, the servers, and what has been measured.
type suite struct {
	options
	world      *testbed.World
	kubepods   *testbed.Kubepods
	pods       []*testbed.Pod // in it
	servers    []peer.Server
	tokenBytes int
	nginx      string // its version
	report     report.Report
}

// load is one way to ask for tokens, in a closed loop.
type load struct {
	name        string
	pods        int
	connections int    // of each pod
	head        string // name of the SDK; "" for wrk's request
	close       bool   // a new connection for each request
}

const (
	keepAlive     = "keep-alive, 32 connections"
	identityJS    = "@azure/identity, 32 connections"
	identityGo    = "azidentity, 32 connections"
	newConnection = "new connection each, 32 at once"
	halfRate      = "half of its own highest"
)

var loads = []load{
	{name: "keep-alive, 1 connection", pods: 1, connections: 1},
	{name: keepAlive, pods: 1, connections: 32},
	{name: "keep-alive, 256 connections of 4 pods", pods: 4, connections: 64},
	{name: identityJS, pods: 1, connections: 32, head: "@azure/identity"},
	{name: identityGo, pods: 1, connections: 32, head: "azidentity"},
	{name: newConnection, pods: 1, connections: 32, close: true},
}

// openShares are the rates of the open loops, as shares of the slowest server's highest.
var openShares = []float64{0.25, 0.50, 0.75, 0.90}

// shortLoads are measured with -short.
var shortLoads = map[string]bool{keepAlive: true, identityGo: true, newConnection: true}

// The agent in two of its redirect modes, as the tables name it.
const (
	dnat     = "agent, dnat"
	programs = "agent, ebpf"
)

// goals are those of the fast path, and that mode ebpf is as fast as redirect, as ratios in one run.
func goals(agent, nginx, netHTTP string) []report.Goal {
	var all []report.Goal
	for _, name := range []string{keepAlive, identityJS, identityGo} {
		all = append(all,
			report.Goal{Load: name, Server: agent, Than: nginx, Least: 1.6},
			report.Goal{Load: name, Server: agent, Than: netHTTP, Least: 1.7})
	}
	return append(all,
		report.Goal{Load: keepAlive, Server: programs, Than: agent, Least: 0.95},
		report.Goal{Load: newConnection, Server: programs, Than: agent, Least: 0.95},
		report.Goal{Load: newConnection, Server: agent, Than: nginx, Least: 0.95},
		report.Goal{Load: halfRate, Server: agent, Than: nginx, Most: 1.3})
}

func measureAll(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "nmi-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	s, err := newSuite(ctx, o, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if s.report, err = s.newReport(); err != nil {
		return err
	}
	for _, part := range []func(context.Context) error{s.closedLoops, s.openLoops, s.clients} {
		if err = part(ctx); err != nil {
			break
		}
	}
	fmt.Print(s.report.Markdown()) // also if it is not complete
	if err != nil || o.out == "" {
		return err
	}
	var plotted []string
	for _, server := range s.servers {
		if server.Name != dnat { // it is as fast as redirect
			plotted = append(plotted, server.Name)
		}
	}
	return s.report.Write(o.out, plotted)
}

func (s *suite) wanted(name string) bool { return s.only.MatchString(name) }

// closedLoops measures the servers in turn under each load, round after round, so that
// a machine that becomes slower does so for all of them.
func (s *suite) closedLoops(ctx context.Context) error {
	for round := range s.rounds {
		for _, l := range loads {
			if !s.wanted(l.name) || s.short && !shortLoads[l.name] {
				continue
			}
			for _, server := range s.servers {
				if err := s.closedLoop(ctx, server, l, round+1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (s *suite) openLoops(ctx context.Context) error {
	shares := openShares
	if s.short {
		shares = shares[1:2]
	}
	highest, err := s.highestRates(ctx, shares)
	if err != nil {
		return err
	}
	slowest := math.Inf(1)
	for _, server := range s.servers {
		if !server.Optional {
			slowest = min(slowest, highest[server.Name])
		}
	}
	for round := range s.rounds {
		for _, share := range shares {
			for _, server := range s.servers {
				rate := share * slowest
				if !s.wanted(shareName(share)) || rate > 0.95*highest[server.Name] {
					continue
				}
				if err := s.openLoop(ctx, server, shareName(share), rate, round+1); err != nil {
					return err
				}
			}
		}
		for _, server := range s.servers {
			if rate := highest[server.Name] / 2; s.wanted(halfRate) && rate > 0 {
				if err := s.openLoop(ctx, server, halfRate, rate, round+1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func shareName(share float64) string {
	return fmt.Sprintf("%.0f %% of the slowest's highest", 100*share)
}

// openHead is what open loops send.
const openHead = "azidentity"

// highestRates returns the servers' medians under the closed loop that sends what the
// open loops send. They are measured once if -only left them out.
func (s *suite) highestRates(ctx context.Context, shares []float64) (map[string]float64, error) {
	wanted := s.wanted(halfRate)
	for _, share := range shares {
		wanted = wanted || s.wanted(shareName(share))
	}
	rates := make(map[string]float64)
	if !wanted {
		return rates, nil
	}
	for _, server := range s.servers {
		if math.IsNaN(s.report.Median(identityGo, server.Name)) {
			for _, l := range loads {
				if l.name != identityGo {
					continue
				}
				if err := s.closedLoop(ctx, server, l, 1); err != nil {
					return nil, err
				}
			}
		}
		if median := s.report.Median(identityGo, server.Name); !math.IsNaN(median) {
			rates[server.Name] = median
		}
	}
	return rates, nil
}

// clients lets each SDK get tokens in new processes, and notes what the agent's counters
// of its fast path say of it.
func (s *suite) clients(ctx context.Context) error {
	const name, processes = "Azure's SDKs", 5
	if !s.wanted(name) || s.short {
		return nil
	}
	agent := s.servers[0]
	program, err := s.start(ctx, agent)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, agent.Stop(program)) }()
	for _, c := range sdk.Clients {
		before, err := fastPathCounters(ctx)
		if err != nil {
			return err
		}
		for range processes {
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			err := c.GetToken(ctx, s.pods[0].Namespace, "https://vault.azure.net")
			cancel()
			if err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
		}
		after, err := fastPathCounters(ctx)
		if err != nil {
			return err
		}
		s.report.Clients = append(s.report.Clients, report.Client{Name: c.Name, Requests: processes, FastPath: growth(before, after)})
	}
	return nil
}
