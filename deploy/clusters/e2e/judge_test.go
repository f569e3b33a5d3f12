//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"time"

	"github.com/stretchr/testify/assert"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// tooLong is what a right answer takes at most without an explanation in the results.
const tooLong = 30 * time.Second

// judge reads the logs of all pods, counts their answers, and fails the scenario for wrong
// ones and for leaks.
func (s *scenario) judge() {
	s.t.Helper()
	s.judgePods()
	r := s.result
	if r.Retried > 0 {
		s.note("requests that took more than one try: %d", r.Retried)
	}
	if world.imds != nil {
		counts := s.imds()
		r.Leaks = counts.Leaks
		assert.Empty(s.t, counts.Leaked, "requests from a pod's own address: they bypassed the agent")
	}
	assert.Zero(s.t, r.Wrong, "tokens of another identity")
	assert.Zero(s.t, r.NodeTokens, "tokens of the node for pods that are not excepted")
	if s.failuresAllowed != "" {
		s.note("failures allowed: %s", s.failuresAllowed)
		return
	}
	if s.early > 0 {
		s.note("%d requests were told to come back: the kubelet had not reported their pods' addresses for longer than the agent waits", s.early)
	}
	assert.Equal(s.t, s.early, r.Failed, "failed requests: %v", r.Failures)
}

// judgePods counts the answers of the pods so far, and then forgets the pods.
func (s *scenario) judgePods() {
	s.t.Helper()
	for _, p := range s.pods {
		for container, a := range p.askerOf {
			s.judgeContainer(p.name, container, a)
		}
	}
	s.pods = nil
}

func (s *scenario) judgeContainer(pod, container string, a asker) {
	s.t.Helper()
	all, sum := s.answers(pod, container)
	s.result.Requests += sum.Right
	s.result.WorstMillis = max(s.result.WorstMillis, sum.WorstMillis)
	for _, answer := range all {
		s.judgeAnswer(pod, container, a.requests[answer.Ask], answer)
	}
	if a.n != forever {
		assert.Len(s.t, all, a.number(), "answers of %s/%s", pod, container)
	} else {
		assert.NotZero(s.t, len(all)+sum.Right, "answers of %s/%s", pod, container)
	}
}

func (s *scenario) judgeAnswer(pod, container string, want request, got answers.Answer) {
	r, from := s.result, pod+"/"+container
	r.Requests++
	if got.Tries > 1 {
		r.Retried++
	}
	switch {
	case got.Status == want.status && got.Subject == want.subject:
		r.WorstMillis = max(r.WorstMillis, got.Millis)
		if got.Millis > 1000*tooLong.Seconds() {
			s.note("%s %s: right after %.0f s and %d tries: %q", got.Time.Format("15:04:05"), from, got.Millis/1000, got.Tries, got.Failures)
		}
		return
	case got.Subject == imdstest.Node:
		r.NodeTokens++
	case got.Subject != "":
		r.Wrong++
	default:
		r.Failed++
		if s.addresses.tooEarly(pod, got) {
			s.early++
		}
	}
	limit := maxFailures
	if s.failuresAllowed != "" && got.Subject == "" {
		limit = maxAllowedFailures
	}
	if len(r.Failures) < limit {
		r.Failures = append(r.Failures, fmt.Sprintf("%s %s: status %d after %.0f ms and %d tries, subject %q, %s; want status %d, subject %q",
			got.Time.Format("15:04:05.000"), from, got.Status, got.Millis, got.Tries, got.Subject, got.Error, want.status, want.subject))
	}
}

// answers reads the log of a container, and that of the container before it if it was
// restarted.
func (s *scenario) answers(pod, container string) ([]answers.Answer, answers.Summary) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's context is over
	defer cancel()
	pods := world.kube.CoreV1().Pods(s.namespace)
	object, err := pods.Get(ctx, pod, metav1.GetOptions{})
	if !assert.NoError(s.t, err) {
		return nil, answers.Summary{}
	}
	var all []answers.Answer
	var sum answers.Summary
	for _, status := range append(object.Status.InitContainerStatuses, object.Status.ContainerStatuses...) {
		if status.Name != container {
			continue
		}
		for _, previous := range []bool{true, false} {
			if (previous && status.RestartCount == 0) || (!previous && status.State.Waiting != nil) {
				continue
			}
			log, err := pods.GetLogs(pod, &corev1.PodLogOptions{Container: container, Previous: previous}).Stream(ctx)
			if !assert.NoError(s.t, err, "log of %s/%s", pod, container) {
				continue
			}
			some, last, err := answers.Read(log)
			_ = log.Close()
			assert.NoError(s.t, err, "log of %s/%s", pod, container)
			all = append(all, some...)
			sum.Right += last.Right
			sum.WorstMillis = max(sum.WorstMillis, last.WorstMillis)
		}
	}
	return all, sum
}
