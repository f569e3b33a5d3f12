package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
)

// cluster is what the checks ask of the API server, with plain requests: the clients of
// client-go hide the header Date.
type cluster struct {
	*doctor
	client *http.Client // nil until it is connected
	err    error        // why the API server does not answer, after the check for it
	pods   []corev1.Pod // of the node; nil until they are listed

	received int // bytes of all responses
}

// This process shares the memory limit of the agent's container.
const (
	maxBody = 4 << 20 // of a response
	maxPods = 8 << 20 // of the pods of a node
)

// do sends a request, and decodes the response into a value unless that is nil.
func (c *cluster) do(ctx context.Context, method, path string, body, into any) (http.Header, error) {
	if c.cfg.API == nil {
		return nil, c.cfg.APIErr
	}
	if c.client == nil {
		client, err := rest.HTTPClientFor(c.cfg.API)
		if err != nil {
			return nil, err
		}
		c.client = client
	}
	base, _, err := rest.DefaultServerUrlFor(c.cfg.API)
	if err != nil {
		return nil, err
	}
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base.String(), "/")+path, content)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.cfg.API.UserAgent)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, err
	}
	if c.received += len(text); len(text) == maxBody {
		return nil, fmt.Errorf("the response has more than %d MiB, which is all that nmi doctor reads", maxBody>>20)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		var status metav1.Status
		if json.Unmarshal(text, &status) != nil || status.Message == "" {
			status.Message = resp.Status
		}
		status.Code = int32(resp.StatusCode) //nolint:gosec // it has three digits
		return nil, &apierrors.StatusError{ErrStatus: status}
	}
	if into != nil {
		err = json.Unmarshal(text, into)
	}
	return resp.Header, err
}

// listPods lists the node's pods that have not finished, once, and a few at a time: their authors choose
// how large they are.
func (c *cluster) listPods(ctx context.Context) ([]corev1.Pod, error) {
	switch {
	case c.pods != nil:
		return c.pods, nil
	case c.cfg.API == nil:
		return nil, skipf("needs the API server")
	case c.settings.Node == "":
		return nil, skipf("give --node, the node's name, to look at its pods")
	}
	onNode := fields.AndSelectors(fields.OneTermEqualSelector("spec.nodeName", c.settings.Node),
		fields.OneTermNotEqualSelector("status.phase", string(corev1.PodSucceeded)), fields.OneTermNotEqualSelector("status.phase", string(corev1.PodFailed)))
	query := url.Values{"fieldSelector": {onNode.String()}, "limit": {"10"}}
	pods := []corev1.Pod{}
	for before := c.received; ; {
		var page corev1.PodList
		if _, err := c.do(ctx, http.MethodGet, "/api/v1/pods?"+query.Encode(), nil, &page); err != nil {
			return nil, skipf("listing the node's pods: %s", err)
		}
		if c.received-before > maxPods {
			return nil, skipf("the node's pods have more than %d MiB together, which is all that nmi doctor reads", maxPods>>20)
		}
		for _, pod := range page.Items {
			pod.ManagedFields = nil
			pods = append(pods, pod)
		}
		if page.Continue == "" {
			c.pods = pods
			return pods, nil
		}
		query.Set("continue", page.Continue)
	}
}

// podAddresses returns the IPv4 addresses of the node's pods that run and have their own.
func (c *cluster) podAddresses(ctx context.Context) (addrs []netip.Addr, err error) {
	pods, err := c.listPods(ctx)
	for _, pod := range pods {
		if pod.Spec.HostNetwork {
			continue
		}
		if addr, err := netip.ParseAddr(pod.Status.PodIP); err == nil && addr.Is4() {
			addrs = append(addrs, addr)
		}
	}
	return addrs, err
}
