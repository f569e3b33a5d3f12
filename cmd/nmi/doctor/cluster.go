package doctor

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// maxSkew is how far the node's clock may be from the API server's. Date is in whole seconds
// (RFC 9110, section 5.6.7).
const maxSkew = 10 * time.Second

func (d *doctor) clusterChecks() []check {
	c := d.cluster
	checks := []check{
		{"api-server", "the API server answers", c.answers},
		{"clock", "the node's clock is right", c.clock},
	}
	if !d.cfg.Pre { // another account is asked then
		checks = append(checks, check{"definitions", "the custom resources are served", c.definitions})
		for _, r := range d.rights() {
			checks = append(checks, check{"rights", "this account may " + r.String(), func(ctx context.Context) (string, error) { return "", c.may(ctx, r) }})
		}
		checks = append(checks, check{"federation", "this account may request service account tokens for federation", c.federation})
	}
	return append(checks, check{"workload-identity", "no pod expects tokens of both this agent and Azure Workload Identity", c.workloadIdentity})
}

// answers asks for the version, which every account may.
func (c *cluster) answers(ctx context.Context) (string, error) {
	if c.cfg.API == nil {
		c.err = c.cfg.APIErr
		if c.cfg.Pre {
			return "", skipped(c.err.Error())
		}
		return "", c.err
	}
	var version struct {
		GitVersion string `json:"gitVersion"`
	}
	if _, c.err = c.do(ctx, http.MethodGet, "/version", nil, &version); c.err != nil {
		return "", c.err
	}
	return version.GitVersion, nil
}

// unreachable is why other checks cannot be made.
func (c *cluster) unreachable() error {
	if c.err != nil || c.cfg.API == nil {
		return skipf("the API server does not answer")
	}
	return nil
}

func (c *cluster) clock(ctx context.Context) (string, error) {
	if err := c.unreachable(); err != nil {
		return "", err
	}
	begin := time.Now()
	header, err := c.do(ctx, http.MethodGet, "/version", nil, nil)
	end := time.Now()
	if err != nil {
		return "", err
	}
	date, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		return "", skipf("the API server's response has no date")
	}
	return skew(begin, end, date)
}

// skew compares the node's time before and after a request with the date in the response.
func skew(begin, end, date time.Time) (string, error) {
	var behind time.Duration
	switch {
	case end.Before(date):
		behind = date.Sub(end)
	case begin.After(date.Add(time.Second)):
		behind = date.Add(time.Second).Sub(begin)
	}
	if behind.Abs() <= maxSkew {
		return fmt.Sprintf("within %s of the API server's", maxSkew), nil
	}
	return "", warnf("it is %s off the API server's: tokens are refreshed too late or too early, and certificates may count as expired. See the node's time synchronization (chronyd)", behind.Abs().Round(time.Second))
}

func (c *cluster) definitions(ctx context.Context) (string, error) {
	if err := c.unreachable(); err != nil {
		return "", err
	}
	var served metav1.APIResourceList
	if _, err := c.do(ctx, http.MethodGet, "/apis/"+aadpodidentity.GroupVersion.String(), nil, &served); err != nil && !apierrors.IsNotFound(err) {
		return "", err
	}
	var missing, optional []string
	for _, resource := range c.resources() {
		there := false
		for _, s := range served.APIResources {
			there = there || s.Name == resource.Resource
		}
		switch {
		case there:
		case resource == aadpodidentity.AzurePodIdentityExceptions:
			optional = append(optional, resource.Resource)
		default:
			missing = append(missing, resource.Resource)
		}
	}
	const advice = "apply deploy/manifests/crds.yaml, or the chart's crds"
	switch {
	case len(missing) > 0:
		return "", fmt.Errorf("the API server does not serve %s: %s", strings.Join(append(missing, optional...), ", "), advice)
	case len(optional) > 0:
		return "", warnf("the API server does not serve %s, and no pod is excepted: %s", strings.Join(optional, ", "), advice)
	}
	return "", nil
}

// resources are the custom resources that the agent reads.
func (d *doctor) resources() []schema.GroupVersionResource {
	all := []schema.GroupVersionResource{aadpodidentity.AzureIdentities, aadpodidentity.AzureIdentityBindings, aadpodidentity.AzurePodIdentityExceptions}
	if d.settings.Mode == podresolver.Standard {
		all = append(all, aadpodidentity.AzureAssignedIdentities)
	}
	return all
}

// right is one verb on one resource.
type right struct {
	group, resource, verb string // a subresource is <resource>/<subresource>
	namespace             string // "" for all
	optional              bool   // the agent serves pods without it
	apply                 string // what gives it
}

func (r right) String() string { return r.verb + " " + r.resource }

// rights are those that the agent needs with its flags.
func (d *doctor) rights() (all []right) {
	role := "its ClusterRole (deploy/manifests/account.yaml)"
	if d.settings.Mode == podresolver.Standard {
		role = "its ClusterRole (deploy/manifests/standard)"
	}
	for _, verb := range []string{"list", "watch"} {
		all = append(all, right{resource: "pods", verb: verb, apply: role})
	}
	for _, resource := range d.resources() {
		for _, verb := range []string{"list", "watch"} {
			all = append(all, right{group: resource.Group, resource: resource.Resource, verb: verb, apply: role})
		}
	}
	for _, verb := range []string{"create", "patch"} {
		all = append(all, right{group: "events.k8s.io", resource: "events", verb: verb, optional: true, apply: role})
	}
	if d.settings.StartupTaint.Key != "" {
		for _, verb := range []string{"list", "watch", "patch"} {
			all = append(all, right{resource: "nodes", verb: verb, optional: true, apply: "deploy/admission/startup-taint.yaml"})
		}
	}
	return append(all, d.federationRights()...)
}

// may says what to do if this process's account does not have a right.
func (c *cluster) may(ctx context.Context, r right) error {
	if err := c.unreachable(); err != nil {
		return err
	}
	allowed, err := c.allowed(ctx, r)
	switch {
	case err != nil:
		return err
	case allowed:
		return nil
	case r.optional:
		return warnf("it may not: apply %s", r.apply)
	}
	return fmt.Errorf("it may not: apply %s", r.apply)
}

// allowed asks whether this process's account, which is the agent's in its pod, has a right. Every
// account may ask that of itself.
func (c *cluster) allowed(ctx context.Context, r right) (bool, error) {
	resource, subresource, _ := strings.Cut(r.resource, "/")
	review := authorizationv1.SelfSubjectAccessReview{
		TypeMeta: metav1.TypeMeta{APIVersion: authorizationv1.SchemeGroupVersion.String(), Kind: "SelfSubjectAccessReview"},
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Group: r.group, Resource: resource, Subresource: subresource, Verb: r.verb, Namespace: r.namespace,
		}},
	}
	_, err := c.do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review, &review)
	if apierrors.IsForbidden(err) {
		return false, skipf("%s", err)
	}
	return review.Status.Allowed, err
}

// proxyAnnotation has Azure Workload Identity put a sidecar into a pod that answers its requests to IMDS.
const proxyAnnotation = "azure.workload.identity/inject-proxy-sidecar"

func (c *cluster) workloadIdentity(ctx context.Context) (string, error) {
	pods, err := c.listPods(ctx)
	if err != nil {
		return "", err
	}
	var both, proxies []string
	others := 0
	for _, pod := range pods {
		if pod.Annotations[proxyAnnotation] == "true" {
			proxies = append(proxies, pod.Namespace+"/"+pod.Name)
		}
		if podresolver.WorkloadIdentity(&pod) == "" {
			continue
		}
		if pod.Labels[aadpodidentity.BindingLabel] == "" {
			others++
			continue
		}
		both = append(both, pod.Namespace+"/"+pod.Name)
	}
	if len(proxies) > 0 && c.settings.Rules.Mode == iptables.EBPF {
		return "", warnf("%s: with --redirect-mode=ebpf their requests to IMDS come to the agent, and never to Azure Workload Identity's proxy in the pod: use SDKs that need no proxy, or another mode on their nodes", some(proxies))
	}
	if len(both) > 0 {
		return "", warnf("%s: most Azure SDKs prefer Azure Workload Identity (the variable AZURE_FEDERATED_TOKEN_FILE), and never ask the agent: remove the pods' label %s, or that of Azure Workload Identity",
			some(both), aadpodidentity.BindingLabel)
	}
	if others > 0 {
		return fmt.Sprintf("%d of the node's pods use Azure Workload Identity alone", others), nil
	}
	return "", nil
}

// some lists the first few names.
func some(names []string) string {
	const few = 5
	if more := len(names) - few; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), more)
	}
	return strings.Join(names, ", ")
}
