//go:build cluster

package e2e

import (
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
)

// What underLoad starts. The containers of a bound pod must get tokens, those of an
// unbound one are refused.
const (
	bound, unbound = "bound", "unbound"

	overOneConnection = "ask-0"
	overNewOnes       = "ask-1"
	asAnSDK           = "ask-2" // of the bound pod: tries again
)

// underLoad starts pods that ask all the time, and waits until they are answered.
func (s *scenario) underLoad() {
	s.t.Helper()
	s.bind("cart", cart)
	const often = 20 * time.Millisecond
	token, sdk := everySoOften(s.token(cart), often), everySoOften(s.token(cart), 5*often)
	sdk.retry = true
	// Nobody answers where the guard drops the packet. The agent answers in 10 s at most.
	refused := asker{requests: []request{s.refused()}, n: forever, every: often, timeout: 15 * time.Second}
	s.start(
		pod{name: bound, binding: "cart", askers: []asker{token, token.overNewConnections(), sdk}},
		pod{name: unbound, askers: []asker{refused, refused.overNewConnections()}},
	)
	s.running(bound, unbound)
	s.served(bound)
}

func (a asker) overNewConnections() asker {
	a.fresh = true
	return a
}

// served waits until every asker of the pod gets right answers from now on.
func (s *scenario) served(name string) {
	s.t.Helper()
	for _, p := range s.pods {
		if p.name != name {
			continue
		}
		for container := range p.askerOf {
			before := s.rightAnswers(name, container)
			s.eventually("answers for "+name+"/"+container, func() bool { return s.rightAnswers(name, container) > before })
		}
	}
}

// rightAnswers reads how many a counting asker had when it last wrote that, which is each
// second in which there was one. Without an answer of the API server it is 0.
func (s *scenario) rightAnswers(pod, container string) int {
	s.t.Helper()
	log, err := world.kube.CoreV1().Pods(s.namespace).GetLogs(pod, &corev1.PodLogOptions{Container: container, TailLines: new(int64(100))}).Stream(s.t.Context())
	if err != nil {
		return 0
	}
	defer log.Close()
	_, last, err := answers.Read(log)
	require.NoError(s.t, err)
	return last.Right
}

// failed returns the answers of a container that were not the right ones.
func (s *scenario) failed(name, container string) (failed []answers.Answer) {
	s.t.Helper()
	for _, p := range s.pods {
		if p.name != name {
			continue
		}
		all, _ := s.answers(name, container)
		for _, a := range all {
			if want := p.askerOf[container].requests[a.Ask]; a.Status != want.status || a.Subject != want.subject {
				failed = append(failed, a)
			}
		}
	}
	return failed
}

// noteOutage says how long requests failed.
func (s *scenario) noteOutage() {
	s.t.Helper()
	for _, container := range []string{overOneConnection, overNewOnes, asAnSDK} {
		failed := s.failed(bound, container)
		if len(failed) == 0 {
			continue
		}
		first, last := failed[0], failed[len(failed)-1]
		until := last.Time.Add(time.Duration(last.Millis * float64(time.Millisecond)))
		s.note("%s/%s: %d requests failed, within %s", bound, container, len(failed), until.Sub(first.Time).Round(time.Millisecond))
	}
}
