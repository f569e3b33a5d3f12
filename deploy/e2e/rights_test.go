//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podidentity/nmi/deploy/testbed"
)

// right is one verb on one resource.
type right struct{ group, resource, name, verb string }

func (r right) String() string { return r.verb + " " + r.resource }

// chartRights are those of the chart's roles of a kind, in one of its golden files.
func chartRights(t *testing.T, file, kind, name string) []right {
	t.Helper()
	objects, err := testbed.ReadManifests(os.DirFS("../chart/testdata"), file)
	require.NoError(t, err)
	var rights []right
	for _, object := range objects {
		if object.GetKind() != kind || object.GetName() != name {
			continue
		}
		var role rbacv1.ClusterRole // a Role has the same rules
		require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &role))
		for _, rule := range role.Rules {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					right := right{group: rule.APIGroups[0], resource: resource, verb: verb}
					if len(rule.ResourceNames) > 0 {
						right.name = rule.ResourceNames[0]
					}
					rights = append(rights, right)
				}
			}
		}
	}
	require.NotEmpty(t, rights, "%s %s of %s", kind, name, file)
	return rights
}

// startupTaintRights are those that the chart gives for its value startupTaint.
func startupTaintRights(t *testing.T) []right {
	t.Helper()
	return chartRights(t, "everything.yaml", "ClusterRole", "agent-startup-taint")
}

// account makes a service account that has these rights in the cluster and no others, until the
// test ends, and returns its kubeconfig.
func (s *scenario) account(name string, rights []right) string {
	s.t.Helper()
	ctx, meta := s.t.Context(), metav1.ObjectMeta{Name: name}
	role := &rbacv1.ClusterRole{ObjectMeta: meta}
	for _, r := range rights {
		rule := rbacv1.PolicyRule{APIGroups: []string{r.group}, Resources: []string{r.resource}, Verbs: []string{r.verb}}
		if r.name != "" {
			rule.ResourceNames = []string{r.name}
		}
		role.Rules = append(role.Rules, rule)
	}
	accounts, rbac := world.Kube.CoreV1().ServiceAccounts("kube-system"), world.Kube.RbacV1()
	_, err := accounts.Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	_, err = rbac.ClusterRoles().Create(ctx, role, metav1.CreateOptions{})
	require.NoError(s.t, err)
	_, err = rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "kube-system", Name: name}},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		ctx := context.Background()
		assert.NoError(s.t, rbac.ClusterRoleBindings().Delete(ctx, name, metav1.DeleteOptions{}))
		assert.NoError(s.t, rbac.ClusterRoles().Delete(ctx, name, metav1.DeleteOptions{}))
		assert.NoError(s.t, accounts.Delete(ctx, name, metav1.DeleteOptions{}))
	})
	// The API server reads roles by watches of its own.
	for _, r := range rights {
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User:               "system:serviceaccount:kube-system:" + name,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: r.group, Resource: r.resource, Name: r.name, Verb: r.verb},
		}}
		require.Eventually(s.t, func() bool {
			got, err := world.Kube.AuthorizationV1().SubjectAccessReviews().Create(context.Background(), review, metav1.CreateOptions{})
			return err == nil && got.Status.Allowed
		}, patience, 10*time.Millisecond, "%s", r)
	}
	path, err := world.ControlPlane.Kubeconfig(ctx, "kube-system", name)
	require.NoError(s.t, err)
	return path
}

// agentOf starts an agent with an account's rights.
func (s *scenario) agentOf(kubeconfig string, flags ...string) *testbed.Agent {
	s.t.Helper()
	a, err := testbed.StartAgent(kubeconfig, flags...)
	require.NoError(s.t, err)
	s.endsWell(a)
	return a
}

// TestTheChartsRightsAreEnough has an agent do all that needs the API server, with the rights
// that the chart gives in each mode.
func TestTheChartsRightsAreEnough(t *testing.T) {
	for mode, file := range map[string]string{"managed": "defaults.yaml", "standard": "standard.yaml"} {
		t.Run(mode, func(t *testing.T) {
			s := begin(t)
			rights := slices.Concat(chartRights(t, file, "ClusterRole", "nmi"), startupTaintRights(t),
				chartRights(t, "everything.yaml", "Role", "agent-service-principals"))
			s.createNode(testbed.NodeName, startupTaint)
			kubeconfig := s.account("nmi-"+mode, rights)
			_, authority := s.entra(10)
			s.writeSecret("cart-credentials", firstSecret)
			s.principalIdentity("principal", authority, map[string]any{"name": "cart-credentials"})
			a := s.agentOf(kubeconfig, "--operation-mode="+mode, "--entra-authority="+authority, "--pod-wait=1s", startupTaintFlag)
			require.NoError(t, a.AwaitReady(t.Context()))

			require.Eventually(t, func() bool { return !hasTaint(s.taints(), startupTaint) }, patience, 50*time.Millisecond)

			// What changes after the start is seen by watches.
			p := s.pod("rights-0", "10.244.0.91", testbed.Ptp, "standard")
			s.identity("shop", "standard", cart)
			s.binding("shop", "standard", "standard", "standard")
			sp := s.pod("rights-1", "10.244.0.92", testbed.Ptp, "principal")
			if mode == "standard" {
				s.assignment("standard", "rights-0", "Assigned", cart)
			}
			p.hears(vault, cart.ClientID)
			if mode == "managed" {
				assert.True(t, isToken(sp.asks(resource(1))))
			}
			// A pod that is not known is looked up.
			assert.Equal(t, http.StatusServiceUnavailable, s.network("10.244.0.93", testbed.Ptp).asks(vault).status)
			// Of a pod without an address, by the Secrets Store CSI driver.
			if mode == "managed" {
				s.object("shop", "mounting", "", map[string]string{"aadpodidbinding": "standard"})
				status, body := asHost(t, "mounting")
				assert.Equal(t, http.StatusOK, status, "%s", body)
			}
			code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + kubeconfig}, "explain", "--operation-mode="+mode, "shop/rights-0")
			require.NoError(t, err)
			assert.Zero(t, code, output)

			_, text := a.Ready(t.Context())
			for _, refusal := range []string{"may not", "forbidden"} {
				assert.NotContains(t, a.Log(), refusal)
				assert.NotContains(t, text, refusal)
			}
		})
	}
}

// TestEachRightIsNeeded takes the rights away one by one: the agent is missing each.
func TestEachRightIsNeeded(t *testing.T) {
	all := append(chartRights(t, "standard.yaml", "ClusterRole", "nmi"), startupTaintRights(t)...)
	for i, missing := range all {
		t.Run("without "+missing.String(), func(t *testing.T) {
			s := begin(t)
			if missing.verb == "list" {
				// As for an API server that cannot list by a watch (WatchList, before 1.34).
				t.Setenv("KUBE_FEATURE_WatchListClient", "false")
			}
			s.createNode(testbed.NodeName, startupTaint)
			kubeconfig := s.account(fmt.Sprintf("nmi-without-%d", i), slices.Delete(slices.Clone(all), i, i+1))
			a := s.agentOf(kubeconfig, "--operation-mode=standard", "--pod-wait=100ms", startupTaintFlag)
			s.says(a, "iptables rules put in place")
			unknown := s.network("10.244.0.93", testbed.Ptp)
			refused := s.pod("refused-0", "10.244.0.94", testbed.Ptp, "nothing") // has an Event
			require.Eventually(t, func() bool {
				refused.probes()
				unknown.probes() // a pod that is not known is looked up, if the agent is in sync
				_, text := a.Ready(t.Context())
				for _, line := range strings.Split(a.Log()+text, "\n") {
					if strings.Contains(line, missing.resource) && (strings.Contains(line, "may not") || strings.Contains(line, "forbidden")) {
						return true
					}
				}
				return false
			}, patience, 100*time.Millisecond, "the agent says nothing of %s", missing)
		})
	}
}
