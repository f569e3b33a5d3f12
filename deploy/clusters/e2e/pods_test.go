//go:build cluster

package e2e

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// request is what an asker asks for, and the right answer.
type request struct {
	url     string
	status  int
	subject string // whose token; "" for an answer without a token
}

// token asks for a token of the scenario's own resource, with more parameters such as
// "client_id=…", and must get one of id.
func (s *scenario) token(id imdstest.Identity, query ...string) request {
	return request{tokenPath("https://"+s.namespace, query...), 200, id.ClientID}
}

// nodeToken is right for excepted pods alone.
func (s *scenario) nodeToken() request {
	return request{tokenPath("https://" + s.namespace), 200, imdstest.Node}
}

// refused asks for a token, and must be refused for good: SDKs do not try again.
func (s *scenario) refused(query ...string) request {
	return request{tokenPath("https://"+s.namespace, query...), 400, ""}
}

func tokenPath(resource string, query ...string) string {
	return strings.Join(append([]string{"/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(resource)}, query...), "&")
}

// asker is a container that asks. The zero value of what follows requests asks each of
// them once.
type asker struct {
	requests []request
	n        int           // number of requests, in turn; forever is no end
	every    time.Duration // between an answer and the next request; 0 is 100 ms
	fresh    bool          // a new connection for each
	retry    bool          // as an SDK does
	counted  bool          // right answers are counted, not written: for load. All requests are the first one's
	header   string
	timeout  time.Duration // for one try; 0 is 30 s
}

const forever = -1

func asks(requests ...request) asker { return asker{requests: requests} }

// everySoOften asks for the same without end, as load.
func everySoOften(r request, every time.Duration) asker {
	return asker{requests: []request{r}, n: forever, every: every, counted: true}
}

func (a asker) number() int {
	if a.n == 0 {
		return len(a.requests)
	}
	return max(a.n, 0)
}

func (a asker) container(name string) corev1.Container {
	args := []string{"-n=" + strconv.Itoa(a.number())}
	if a.every > 0 {
		args = append(args, "-every="+a.every.String())
	}
	if a.timeout > 0 {
		args = append(args, "-timeout="+a.timeout.String())
	}
	if a.fresh {
		args = append(args, "-fresh")
	}
	if a.retry {
		args = append(args, "-retry")
	}
	if a.counted {
		args = append(args, "-summary=1s", "-want="+a.requests[0].subject)
	}
	if a.header != "" {
		for line := range strings.SplitSeq(a.header, "\n") {
			args = append(args, "-header="+line)
		}
	}
	for _, r := range a.requests {
		args = append(args, r.url)
	}
	return corev1.Container{Name: name, Image: *askerFlag, ImagePullPolicy: corev1.PullIfNotPresent, Args: args}
}

// pod is a pod to start.
type pod struct {
	name    string
	binding string            // label aadpodidbinding
	labels  map[string]string // more labels
	init    *asker            // an init container, which ends with 0 only if all its answers are tokens of its first request's identity
	askers  []asker
	spec    func(*corev1.PodSpec) // changes what is unusual
}

// runningPod is one that was started.
type runningPod struct {
	pod
	askerOf map[string]asker // by container
}

// start starts pods, all before it waits for any.
func (s *scenario) start(pods ...pod) {
	s.t.Helper()
	for _, p := range pods {
		running := &runningPod{pod: p, askerOf: make(map[string]asker)}
		labels := map[string]string{}
		for k, v := range p.labels {
			labels[k] = v
		}
		if p.binding != "" {
			labels["aadpodidbinding"] = p.binding
		}
		spec := corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: new(int64(2)), AutomountServiceAccountToken: new(false)}
		for i, a := range p.askers {
			name := fmt.Sprintf("ask-%d", i)
			spec.Containers = append(spec.Containers, a.container(name))
			running.askerOf[name] = a
		}
		if p.init != nil {
			c := p.init.container("init")
			c.Args = append([]string{"-want=" + p.init.requests[0].subject}, c.Args...)
			spec.InitContainers = []corev1.Container{c}
			running.askerOf["init"] = *p.init
		}
		if p.spec != nil {
			p.spec(&spec)
		}
		object := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.name, Labels: labels}, Spec: spec}
		_, err := world.kube.CoreV1().Pods(s.namespace).Create(s.t.Context(), object, metav1.CreateOptions{})
		require.NoError(s.t, err)
		s.pods = append(s.pods, running)
	}
}

// get returns a pod of the scenario's.
func (s *scenario) get(name string) *corev1.Pod {
	s.t.Helper()
	got, err := world.kube.CoreV1().Pods(s.namespace).Get(s.t.Context(), name, metav1.GetOptions{})
	require.NoError(s.t, err)
	return got
}

// finish waits until all pods that come to an end have come to it. Whether their answers
// were right is judged later.
func (s *scenario) finish() {
	s.t.Helper()
	for _, p := range s.pods {
		if len(p.askerOf) > 0 && !p.endless() {
			// The first of forty takes long where other programs are busy.
			require.Eventually(s.t, func() bool {
				phase := s.get(p.name).Status.Phase
				return phase == corev1.PodSucceeded || phase == corev1.PodFailed
			}, 2*patience, 50*time.Millisecond, "the end of pod %s", p.name)
			assert.Equal(s.t, corev1.PodSucceeded, s.get(p.name).Status.Phase, "pod %s", p.name)
		}
	}
}

func (p *runningPod) endless() bool {
	for _, a := range p.askerOf {
		if a.n == forever {
			return true
		}
	}
	return false
}

// running waits until the containers of the pods run.
func (s *scenario) running(names ...string) {
	s.t.Helper()
	for _, name := range names {
		s.eventually("pod "+name+" to run", func() bool { return s.get(name).Status.Phase == corev1.PodRunning })
	}
}
