package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

// slot is an address that one pod after another has.
type slot struct {
	addr string
	pod  *pod
	pods int // so far
}

// replace ends the pod of a slot, and gives its address to a pod of another selector. The
// order is that of a node: the network plugin gives an address away when the last pod's network
// is gone, whether or not the API server has heard of that.
func (s *soak) replace(ctx context.Context, at *slot) error {
	last := at.pod
	last.end(&s.tally)
	news := rand.N(3)
	var err error
	switch news {
	case 0: // before the network is gone
		err = s.world.DeletePod(ctx, namespace, last.name)
	case 1: // that its containers have ended; the object stays
		err = s.world.EndPod(ctx, namespace, last.name)
	default: // when the next pod has been asking for a while
	}
	if err != nil {
		return err
	}
	if err := s.disconnect(last); err != nil {
		return err
	}
	next, err := s.connect(ctx, at, last.selector)
	if err != nil {
		return err
	}
	pause(ctx, rand.N(5*time.Second))
	if news != 0 {
		if err := s.world.DeletePod(ctx, namespace, last.name); err != nil {
			return err
		}
	}
	return s.announce(ctx, next)
}

// connect gives a new pod the slot's address on the node. It asks for tokens from now on.
func (s *soak) connect(ctx context.Context, at *slot, not string) (*pod, error) {
	sel := s.selectors[rand.N(len(s.selectors))]
	for sel.name == not {
		sel = s.selectors[rand.N(len(s.selectors))]
	}
	s.network.Lock()
	network, err := s.world.AddPod(at.addr, testbed.Ptp)
	s.network.Unlock()
	if err != nil {
		return nil, err
	}
	at.pods++
	p := &pod{Pod: network, name: fmt.Sprintf("pod-%s-%d", strings.ReplaceAll(at.addr, ".", "-"), at.pods), selector: sel.name, entitled: &sel.entitlement}
	for _, other := range s.selectors {
		if other != sel {
			p.foreign = append(p.foreign, other.clientIDs[:]...)
		}
	}
	at.pod = p
	p.start(ctx, &s.tally)
	return p, nil
}

// announce writes to the API server what a kubelet would.
func (s *soak) announce(ctx context.Context, p *pod) error {
	p.known = time.Now()
	s.pods.Add(1)
	return s.world.CreatePod(ctx, namespace, p.name, p.Addr.String(), map[string]string{"aadpodidbinding": p.selector})
}

func (s *soak) disconnect(p *pod) error {
	s.network.Lock()
	defer s.network.Unlock()
	return p.Close()
}

// churn replaces the pods of its slots, the oldest first, until ctx ends.
func (s *soak) churn(ctx context.Context, slots []*slot) error {
	for n := 0; pause(ctx, time.Second); n++ {
		if err := s.replace(context.WithoutCancel(ctx), slots[n%len(slots)]); err != nil {
			return fmt.Errorf("replacing a pod of %s: %w", slots[n%len(slots)].addr, err)
		}
	}
	return nil
}

// upgrade lets another agent take over from the one that runs, until ctx ends.
func (s *soak) upgrade(ctx context.Context, every time.Duration) error {
	for pause(ctx, every) {
		if err := s.takeOver(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("upgrade: %w", err)
		}
		s.upgrades.Add(1)
	}
	return nil
}

// takeOver is an upgrade.
func (s *soak) takeOver(ctx context.Context) error {
	s.tally.takeovers.Add(1)
	defer s.tally.takeovers.Add(1)
	last := s.agent.Load()
	next, err := testbed.StartAgent(s.world.Kubeconfig)
	if err != nil {
		return err
	}
	if err := next.AwaitReady(ctx); err != nil {
		return err
	}
	s.agent.Store(next)
	code, err := last.Stop()
	if err == nil && code != 0 {
		err = fmt.Errorf("the last agent ended with code %d; its log:\n%s", code, last.Log())
	}
	return err
}

// pause reports whether ctx has not ended meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
