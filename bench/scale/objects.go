package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const (
	namespaces = 100
	few        = 10 // identities of the small cluster
)

// common is an identity that all pods of the small cluster have beside their own.
var common = imdstest.Identity{ClientID: "c0e1e000-0000-4000-8000-000000000001"}

// objects are what the clusters hold, the same in every run.
type objects struct {
	plan
	ids []imdstest.Identity
}

func newObjects(p plan) *objects {
	o := &objects{plan: p}
	random := rand.New(rand.NewPCG(1, 2))
	guid := func() string {
		a, b := random.Uint64(), random.Uint64()
		return fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", uint32(a), uint16(a>>32), a>>52, b>>52, b&(1<<48-1))
	}
	var subscriptions []string
	for range 10 {
		subscriptions = append(subscriptions, guid())
	}
	for i := range p.identities {
		o.ids = append(o.ids, imdstest.Identity{
			ClientID: guid(), ObjectID: guid(),
			ResourceID: fmt.Sprintf("/subscriptions/%s/resourcegroups/rg-%s-prod-westeurope/providers/Microsoft.ManagedIdentity/userAssignedIdentities/id-%s-prod",
				subscriptions[i%len(subscriptions)], namespace(i), service(i)),
		})
	}
	return o
}

func namespace(i int) string { return fmt.Sprintf("team-%03d", i%namespaces) }

// service names the i-th identity, its binding, and the pods it is for.
func service(i int) string {
	words := []string{"orders", "payments", "catalog", "invoices", "shipping", "search", "profile", "reports"}
	return fmt.Sprintf("%s-api-%04d", words[i%len(words)], i/namespaces)
}

// podAddress is the address of the i-th pod of the node; the first few are in the
// network.
func podAddress(i int) string { return fmt.Sprintf("10.244.%d.%d", i/200, i%200+11) }

// meta is what Helm leaves on an object; every fourth has been applied by kubectl
// instead, with the whole object once more in an annotation.
func meta(i int, kind string, spec map[string]any) map[string]any {
	m := map[string]any{
		"name": service(i), "namespace": namespace(i),
		"labels": map[string]any{
			"app.kubernetes.io/name": service(i), "app.kubernetes.io/instance": service(i),
			"app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "workload-identity-2.14.3",
		},
		"annotations": map[string]any{
			"meta.helm.sh/release-name": service(i), "meta.helm.sh/release-namespace": namespace(i),
		},
	}
	if i%4 == 0 {
		m["labels"] = map[string]any{"app": service(i), "team": namespace(i)}
		applied, err := json.Marshal(map[string]any{"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind, "metadata": m, "spec": spec})
		if err != nil {
			panic(err) // strings and maps
		}
		m["annotations"] = map[string]any{
			aadpodidentity.BehaviorAnnotation:                  aadpodidentity.BehaviorNamespaced,
			"kubectl.kubernetes.io/last-applied-configuration": string(applied) + "\n",
		}
	}
	return m
}

func (o *objects) identity(i int) map[string]any {
	return map[string]any{"type": 0, "resourceID": o.ids[i].ResourceID, "clientID": o.ids[i].ClientID}
}

func binding(i int) map[string]any {
	return map[string]any{"azureIdentity": service(i), "selector": service(i)}
}

// nodePod is the i-th pod of the node, bound to an identity.
func nodePod(i, identity int) *corev1.Pod {
	pod := fullPod(identity, testbed.NodeName)
	pod.Name = fmt.Sprintf("%s-7d9c6b5f4-n%04d", service(identity), i)
	pod.Labels[aadpodidentity.BindingLabel] = service(identity)
	return pod
}

// otherPod is a pod of another node; every second is a minimal one.
func otherPod(i int) *corev1.Pod {
	node := fmt.Sprintf("node-%04d", 2+i/30)
	name := fmt.Sprintf("%s-6f8d7c9b5-%05d", service(i), i)
	if i%2 == 0 {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace(i), Name: name, Labels: map[string]string{aadpodidentity.BindingLabel: service(i)}},
			Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "app", Image: "example/app"}}},
		}
	}
	pod := fullPod(i, node)
	pod.Name = name
	return pod
}

// fullPod is a pod as a Deployment makes it: some 4 KB with what the API server
// adds.
func fullPod(i int, node string) *corev1.Pod {
	name := service(i)
	yes, grace := true, int64(30)
	probe := func(path string) *corev1.Probe {
		return &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(8080)}},
			PeriodSeconds: 10, TimeoutSeconds: 1,
		}
	}
	var env []corev1.EnvVar
	for _, key := range []string{"HOST", "PORT", "TIMEOUT", "RETRIES", "POOL", "REGION", "LOG_LEVEL", "CACHE_TTL", "QUEUE", "VAULT"} {
		env = append(env, corev1.EnvVar{Name: "UPSTREAM_" + key, Value: "the value of " + strings.ToLower(key) + " for " + name})
	}
	container := func(name, image string, port int32) corev1.Container {
		return corev1.Container{
			Name: name, Image: image, Args: []string{"serve", "--config=/etc/app/config.yaml", "--listen=:8080"}, Env: env,
			Ports:          []corev1.ContainerPort{{Name: name, ContainerPort: port}},
			LivenessProbe:  probe("/healthz"),
			ReadinessProbe: probe("/readyz"),
			Resources: corev1.ResourceRequirements{
				Requests: corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("128Mi")},
				Limits:   corev1.ResourceList{"memory": resource.MustParse("256Mi")},
			},
			VolumeMounts: []corev1.VolumeMount{{Name: "config", MountPath: "/etc/app"}, {Name: "tmp", MountPath: "/tmp"}},
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace(i),
			Labels: map[string]string{
				"app.kubernetes.io/name": name, "app.kubernetes.io/instance": name, "app.kubernetes.io/version": "4.7.1",
				"pod-template-hash": "7d9c6b5f4", "team": namespace(i), "tier": "backend",
			},
			Annotations: map[string]string{
				"checksum/config":      strings.Repeat("8f1d", 16),
				"prometheus.io/scrape": "true", "prometheus.io/port": "9102", "prometheus.io/path": "/metrics",
			},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name + "-7d9c6b5f4", UID: "5b1d6c0e-9d53-4f0e-8d6b-3f4d0a1c2b3d", Controller: &yes, BlockOwnerDeletion: &yes,
			}},
		},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: name, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{
				container("app", "registry.example/"+namespace(i)+"/"+name+":4.7.1", 8080),
				container("metrics", "registry.example/platform/metrics-sidecar:1.12.0", 9102),
			},
			Volumes: []corev1.Volume{
				{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}}}},
				{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			},
		},
	}
}

// withStatus adds what a kubelet writes of a pod with this address.
func withStatus(pod *corev1.Pod, addr string) *corev1.Pod {
	now := metav1.NewTime(time.Now())
	yes := true
	pod.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, HostIP: testbed.NodeAddress, PodIP: addr, PodIPs: []corev1.PodIP{{IP: addr}}, StartTime: &now,
	}
	for _, c := range []corev1.PodConditionType{corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	for _, c := range pod.Spec.Containers {
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Image: c.Image, Ready: true, Started: &yes,
			ImageID:     c.Image + "@sha256:" + strings.Repeat("4e7a", 16),
			ContainerID: "containerd://" + strings.Repeat("c0de", 16),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		})
	}
	return pod
}
