package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/iptables/links"
)

// rawPackets looks for pods that may write packets to their interface (AF_PACKET) where nothing of mode
// ebpf sees them: no program on a cgroup does, and a dataplane that passes the node's routing by passes
// the routing fence by, too.
func (d *doctor) rawPackets(ctx context.Context) (string, error) {
	bypass := links.Bypass()
	if bypass == nil {
		return "the node's routing sees what they send", nil
	}
	pods, err := d.cluster.listPods(ctx)
	if err != nil {
		return "", err
	}
	excepted, err := d.exceptedPods(ctx)
	if err != nil {
		return "", err
	}
	const most = 10
	var found []string
	for _, pod := range pods {
		name := pod.Namespace + "/" + pod.Name
		if !pod.Spec.HostNetwork && mayUseRawPackets(pod.Spec) && !slices.Contains(excepted, name) {
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		return "none has NET_RAW", nil
	}
	if more := len(found) - most; more > 0 {
		found = append(found[:most], fmt.Sprintf("and %d more", more))
	}
	return "", warnf("these may send packets that no fence sees, and so reach the metadata service as the node (%w): %s. "+
		"Have them drop NET_RAW (securityContext.capabilities.drop: [ALL], as Pod Security's level restricted demands), or have the network plugin's policies deny 169.254.169.254",
		bypass, strings.Join(found, ", "))
}

// exceptedPods are those that get what IMDS gives the node anyway.
func (d *doctor) exceptedPods(ctx context.Context) (names []string, err error) {
	if !d.agent {
		return nil, nil
	}
	status, text, err := d.cfg.Ask(ctx, statusPage)
	if err != nil {
		return nil, err
	}
	var page struct {
		Pods []struct{ Namespace, Name, Exception string } `json:"pods"`
	}
	if status != http.StatusOK {
		return nil, skipf("%s says %d", statusPage, status)
	}
	if err := json.Unmarshal([]byte(text), &page); err != nil {
		return nil, fmt.Errorf("%s: %w", statusPage, err)
	}
	for _, pod := range page.Pods {
		if pod.Exception != "" {
			names = append(names, pod.Namespace+"/"+pod.Name)
		}
	}
	return names, nil
}

// mayUseRawPackets reports whether a container of the pod may have NET_RAW: containerd gives it to each
// that does not drop it. What can do more than that, a privileged container, is not meant.
func mayUseRawPackets(pod corev1.PodSpec) bool {
	contexts := make([]*corev1.SecurityContext, 0, len(pod.Containers))
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		contexts = append(contexts, c.SecurityContext)
	}
	for _, c := range pod.EphemeralContainers {
		contexts = append(contexts, c.SecurityContext)
	}
	return slices.ContainsFunc(contexts, func(sc *corev1.SecurityContext) bool {
		switch {
		case sc == nil:
			return true
		case sc.Privileged != nil && *sc.Privileged:
			return false
		case sc.Capabilities == nil:
			return true
		}
		return namesNetRaw(sc.Capabilities.Add) || !namesNetRaw(sc.Capabilities.Drop)
	})
}

// namesNetRaw reports whether NET_RAW is in a list of capabilities, however runtimes let it be written.
func namesNetRaw(list []corev1.Capability) bool {
	return slices.ContainsFunc(list, func(c corev1.Capability) bool {
		name := strings.TrimPrefix(strings.ToUpper(string(c)), "CAP_")
		return name == "ALL" || name == "NET_RAW"
	})
}
