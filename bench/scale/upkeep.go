package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// foreignRules is about what kube-proxy writes for 1,000 Services.
const foreignRules = 5000

// reconcile measures what a check of the rules costs beside those of other programs, and what
// an agent costs that has nothing to do.
func (b *bench) reconcile(ctx context.Context) error {
	var rules bytes.Buffer
	rules.WriteString("*nat\n:KUBE-BENCH - [0:0]\n")
	for i := range foreignRules {
		fmt.Fprintf(&rules, "-A KUBE-BENCH -d 10.96.%d.%d/32 -p tcp -m tcp --dport 443 -j RETURN\n", i/250, i%250)
	}
	rules.WriteString("COMMIT\n")
	if err := tool(ctx, rules.String(), "iptables-restore", "--noflush"); err != nil {
		return err
	}
	defer func() { _ = tool(ctx, "*nat\n-F KUBE-BENCH\n-X KUBE-BENCH\nCOMMIT\n", "iptables-restore", "--noflush") }()

	checking, checks, err := b.idle(ctx, "--ipt-update-interval-sec=1")
	if err != nil {
		return err
	}
	resting, _, err := b.idle(ctx, "--ipt-update-interval-sec=86400")
	if err != nil {
		return err
	}
	check := (checking - resting) / max(1, checks)
	topic := fmt.Sprintf("upkeep, beside %d foreign rules", foreignRules)
	b.report.Add(topic, "CPU time of a check of the rules", check*1000, "ms").Notef("the agent's and that of the tools it runs; %.0f checks", checks)
	perMinute := resting*60/b.watch.Seconds() + check
	b.report.Add(topic, "CPU time of an idle minute", perMinute*1000, "ms").Notef("with one check: %.3f %% of a core", perMinute/60*100)
	return nil
}

// idle returns what an agent and its tools use in seconds of CPU time, and how often it checks
// its rules, while nothing happens.
func (b *bench) idle(ctx context.Context, flags ...string) (used, checks float64, err error) {
	err = withAgent(ctx, b.small, func(agent *testbed.Agent) error {
		look := func() (used, checks float64, err error) {
			m, err := measure.Scrape(ctx, metricsURL)
			if err != nil {
				return 0, 0, err
			}
			own, err := measure.CPUTime(agent.PID())
			if err != nil {
				return 0, 0, err
			}
			tools, err := measure.ChildrenCPUTime(agent.PID())
			return (own + tools).Seconds(), m["nmi_rules_checks_total"], err
		}
		time.Sleep(min(2*time.Second, b.watch)) // the start is over
		usedBefore, checksBefore, err := look()
		if err != nil {
			return err
		}
		select {
		case <-time.After(b.watch):
		case <-ctx.Done():
		}
		used, checks, err = look()
		used, checks = used-usedBefore, checks-checksBefore
		return err
	}, flags...)
	return used, checks, err
}

func tool(ctx context.Context, stdin, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader([]byte(stdin))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// upgrade lets agents take over from one another while pods ask.
func (b *bench) upgrade(ctx context.Context) (err error) {
	const upgrades, perSecond = 3, 1000
	agent, err := testbed.StartAgent(b.small.Kubeconfig)
	if err != nil {
		return err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := agent.AwaitReady(ctx); err != nil {
		return err
	}
	r, err := startLoad(ctx, b.pods, some(few, 4).at(perSecond, b.watch))
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	var got result
	go func() {
		var err error
		got, err = r.run()
		done <- err
	}()
	for range upgrades {
		time.Sleep(b.watch / (2 * upgrades))
		next, err := testbed.StartAgent(b.small.Kubeconfig)
		if err != nil {
			return err
		}
		if err := next.AwaitReady(ctx); err != nil {
			return err
		}
		if _, err := agent.Stop(); err != nil {
			return err
		}
		agent = next
	}
	if err := <-done; err != nil {
		return err
	}
	topic := fmt.Sprintf("%d upgrades, %d requests/s", upgrades, perSecond)
	b.report.Add(topic, "failed", float64(got.Failed+got.Throttled), "").Exactly(0).Notef("of %d; %s", got.Requests, got.Error)
	b.report.Add(topic, "the slowest request", ms(got.Max), "ms").Notef("p99 %.1f ms", ms(got.P99))
	return nil
}
