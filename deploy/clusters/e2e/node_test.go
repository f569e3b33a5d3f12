//go:build cluster

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed/attack"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestHostToken(t *testing.T) {
	s := begin(t, "With nmi.hostTokenUIDs a root process of the node gets the token of a pod whose volumes are not mounted yet; pods and other users do not.", theIMDS)
	s.bind("cart", cart)
	s.upgrade("nmi.hostTokenUIDs={0}")
	// The kubelet waits for the volume before it makes the pod's network.
	s.start(pod{name: "mounting", binding: "cart", spec: func(spec *corev1.PodSpec) {
		spec.Containers = []corev1.Container{{Name: "c", Image: *askerFlag, VolumeMounts: []corev1.VolumeMount{{Name: "vault", MountPath: "/vault"}}}}
		spec.Volumes = []corev1.Volume{{Name: "vault", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}}}}}
	}})
	s.eventually("pod mounting to have a node", func() bool { return s.get("mounting").Spec.NodeName != "" })

	path := "/host/token/?resource=https://" + s.namespace
	provider := func(status int, subject string) []asker {
		return []asker{{requests: []request{{"http://127.0.0.1:2579" + path, status, subject}}, header: "podns: " + s.namespace + "\npodname: mounting"}}
	}
	hostNetwork := func(uid int64) func(*corev1.PodSpec) {
		return func(spec *corev1.PodSpec) {
			spec.HostNetwork, spec.NodeName = true, s.get("mounting").Spec.NodeName
			spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &uid}
		}
	}
	s.start(
		pod{name: "provider", askers: provider(200, cart.ClientID), spec: hostNetwork(0)},
		pod{name: "another-user", askers: provider(403, ""), spec: hostNetwork(65534)},
		pod{name: "curious", binding: "cart", askers: []asker{asks(request{path, 404, ""})}},
	)
	s.finish()
	assert.Empty(t, s.get("mounting").Status.PodIP, "it still waits for its volume")
}

func TestStartupTaint(t *testing.T) {
	s := begin(t, "With startupTaint pods of a new node wait for the agent, and none of them asks before it is ready.", theIMDS)
	const key, taint = "startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready", "startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready=true:NoSchedule"
	s.bind("cart", cart)
	t.Cleanup(func() { // where the scenario failed
		_, _ = world.command(context.Background(), "kubectl", "taint", "nodes", "--all", key+"-")
	})
	s.upgrade("cleanup=true") // no agent and no rules, as on a new node
	s.kubectl("taint", "nodes", "--all", taint)
	s.schedulerKnows(taint)
	for i := range 5 {
		s.start(
			pod{name: fmt.Sprintf("cart-%d", i), binding: "cart", askers: []asker{asks(s.token(cart))}},
			pod{name: fmt.Sprintf("unbound-%d", i), askers: []asker{asks(s.refused())}},
		)
	}
	for _, p := range s.pods {
		s.eventually("the scheduler to refuse pod "+p.name, func() bool { return untolerated(s.get(p.name)) })
	}
	begun := time.Now()
	s.upgrade("startupTaint=" + taint)
	s.note("the agent was rolled out in %.1f s", time.Since(begun).Seconds())
	s.finish()
	s.note("all pods had run %.1f s after the agent's installation", time.Since(begun).Seconds())
}

// schedulerKnows waits until pods are refused for the taint: of one that a new node has from its
// beginning the scheduler always knows, of this one some time after the API server.
func (s *scenario) schedulerKnows(taint string) {
	s.t.Helper()
	pods := world.kube.CoreV1().Pods(s.namespace)
	for i := range 100 {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("scheduled-%d", i)},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: *askerFlag, Command: []string{"none: it must not ask"}}}},
		}
		_, err := pods.Create(s.t.Context(), p, metav1.CreateOptions{})
		require.NoError(s.t, err)
		s.eventually("the scheduler to look at pod "+p.Name, func() bool {
			p = s.get(p.Name)
			return p.Spec.NodeName != "" || untolerated(p)
		})
		require.NoError(s.t, pods.Delete(s.t.Context(), p.Name, metav1.DeleteOptions{}))
		if untolerated(p) {
			return
		}
	}
	require.Fail(s.t, "pods are scheduled beside taint "+taint)
}

// untolerated reports whether the scheduler has refused a pod for a taint.
func untolerated(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Reason == corev1.PodReasonUnschedulable {
			return strings.Contains(c.Message, "untolerated taint")
		}
	}
	return false
}

// Half of the attempts with SYN succeed on a node that has the redirect, but neither the guards
// of the tables mangle and raw nor the routing rules.
func TestForgedPackets(t *testing.T) {
	s := begin(t, "A pod that may send raw packets forges the beginnings of connections, and gets no token and past no fence.", theIMDS)
	s.bind("cart", cart)
	var containers []corev1.Container
	for i, first := range []attack.FirstPacket{attack.ACK, attack.SYN, attack.SYN, attack.ACK} {
		containers = append(containers, s.attacker(first, 20000+1000*uint16(i)))
	}
	s.start(
		pod{name: "attacker", spec: func(spec *corev1.PodSpec) { spec.Containers = containers }},
		pod{name: "cart", binding: "cart", askers: []asker{{requests: []request{s.token(cart)}, n: 30}}},
	)
	s.finish()
	s.eventually("the end of the attack", func() bool { return s.get("attacker").Status.Phase == corev1.PodSucceeded })

	attempts := 0
	for _, c := range containers {
		var all []attack.Result
		require.NoError(t, json.Unmarshal([]byte(s.kubectl("-n", s.namespace, "logs", "attacker", "-c", c.Name)), &all))
		for _, r := range all {
			attempts++
			var got struct {
				Token string `json:"access_token"`
			}
			_ = json.Unmarshal([]byte(r.Answer), &got) // there need not be one
			if subject := imdstest.Subject(got.Token); subject != "" {
				s.result.NodeTokens++
				assert.Empty(t, subject, "attempt from port %d", r.Port)
			}
		}
	}
	assert.Equal(t, len(containers)*attackPorts, attempts)
	s.note("attempts with forged packets: %d", attempts)
}

// attackPorts is how many connections a container attacks at once.
const attackPorts = 32

// attacker is the asker as its other self, with the capability NET_RAW and no other.
func (s *scenario) attacker(first attack.FirstPacket, port uint16) corev1.Container {
	cfg := attack.Config{First: first, Patience: 5 * time.Second, Path: tokenPath("https://" + s.namespace)}
	for i := range uint16(attackPorts) {
		cfg.Ports = append(cfg.Ports, port+i)
	}
	text, err := json.Marshal(map[string]any{
		"First": cfg.First, "Metadata": "169.254.169.254:80", "Pod": "$(POD_IP)", "Ports": cfg.Ports, "Patience": cfg.Patience, "Path": cfg.Path,
	})
	require.NoError(s.t, err)
	ip := corev1.EnvVar{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}}
	return corev1.Container{
		Name: fmt.Sprintf("attack-%d", port), Image: *askerFlag, Env: []corev1.EnvVar{ip, {Name: attack.Env, Value: string(text)}},
		SecurityContext: &corev1.SecurityContext{RunAsUser: new(int64(0)), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_RAW"}}},
	}
}
