//go:build e2e

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// TestAdmission installs deploy/admission, as it is, on a cluster of its own in which
// objects exist that the policies would have refused. The tests are in
// admission_exceptions_test.go and admission_identities_test.go.
func TestAdmission(t *testing.T) {
	c := newAdmissionCluster(t)
	c.storeOldObjects(t)
	c.install(t)
	t.Run("exception", c.testExceptions)
	t.Run("excepted pod", c.testExceptedPods)
	t.Run("excepted template", c.testExceptedTemplates)
	t.Run("revision", c.testRevisions)
	t.Run("excepted by update", c.testLabelUpdates)
	t.Run("controllers", c.testControllers)
	t.Run("stored excepted pod", c.testStoredExceptedPods)
	t.Run("allowed identities", c.testAllowedIdentities)
	t.Run("MIC", c.testMICIsNotHindered)
	t.Run("warnings", c.testWarnings)
	t.Run("warnings of federation", c.testFederationWarnings)
	t.Run("stored invalid objects", c.testStoredInvalidObjects)
}

type admissionCluster struct {
	*testbed.World
	admin *apiUser
	bob   *apiUser // all verbs on all resources in namespaces shop and bank, by RoleBinding
	alice *apiUser // the same, and ClusterRole nmi-except
	carol *apiUser // the same, and a copy of nmi-except for namespace shop only
}

func newAdmissionCluster(t *testing.T) *admissionCluster {
	t.Helper()
	ctx := t.Context()
	second, err := world.AddCluster(ctx)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, second.Close()) })
	c := &admissionCluster{World: second}
	c.admin, c.bob, c.alice, c.carol = c.user(t, ""), c.user(t, "bob"), c.user(t, "alice"), c.user(t, "carol")
	for _, namespace := range []string{"shop", "bank"} {
		require.NoError(t, c.CreateNamespace(ctx, namespace))
		c.grant(t, namespace, everything, "bob", "alice", "carol")
	}
	return c
}

var everything = rbacv1.PolicyRule{APIGroups: []string{"*"}, Resources: []string{"*"}, Verbs: []string{"*"}}

// grant gives users a role, in a namespace or, if that is "", in the cluster, and waits
// until they have it.
func (c *admissionCluster) grant(t *testing.T, namespace string, rule rbacv1.PolicyRule, users ...string) {
	t.Helper()
	ctx, rbac := t.Context(), c.Kube.RbacV1()
	name := metav1.ObjectMeta{Name: "e2e:" + users[0], Namespace: namespace}
	var subjects []rbacv1.Subject
	for _, user := range users {
		subjects = append(subjects, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: "User", Name: user})
	}
	ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name.Name}
	if namespace != "" {
		_, err := rbac.Roles(namespace).Create(ctx, &rbacv1.Role{ObjectMeta: name, Rules: []rbacv1.PolicyRule{rule}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = rbac.RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: name, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
		require.NoError(t, err)
	} else {
		ref.Kind = "ClusterRole"
		_, err := rbac.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: name, Rules: []rbacv1.PolicyRule{rule}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: name, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	attributes := &authorizationv1.ResourceAttributes{Namespace: namespace, Group: rule.APIGroups[0], Resource: rule.Resources[0], Verb: rule.Verbs[0]}
	if len(rule.ResourceNames) > 0 {
		attributes.Name = rule.ResourceNames[0]
	}
	for _, user := range users {
		require.Eventually(t, func() bool {
			ctx, cancel := requestContext()
			defer cancel()
			review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: user, ResourceAttributes: attributes}}
			review, err := c.Kube.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
			return err == nil && review.Status.Allowed
		}, patience, 20*time.Millisecond, "role of %s", user)
	}
}

// install applies deploy/admission with a list for these tests, and waits until every
// policy is in force: the API server reads changed policies once a second.
func (c *admissionCluster) install(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	root, err := testbed.Root()
	require.NoError(t, err)
	manifests, err := testbed.ReadManifests(os.DirFS(filepath.Join(root, "deploy", "admission")), "*.yaml")
	require.NoError(t, err)
	for _, object := range manifests {
		if object.GetKind() == "ConfigMap" {
			object.Object["data"] = allowedIdentities
		}
	}
	require.NoError(t, testbed.Apply(ctx, c.Custom, manifests))
	_, err = c.Kube.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "nmi-except"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "nmi-except"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: "alice"}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.grant(t, "", rbacv1.PolicyRule{APIGroups: []string{"aadpodidentity.k8s.io"}, Resources: []string{"azurepodidentityexceptions"}, ResourceNames: []string{"shop"}, Verbs: []string{"except"}}, "carol")

	for name, inForce := range map[string]func() bool{
		"nmi-exceptions":         func() bool { return c.bob.dryRun(newException("shop", "probe", "a", "b")) != nil },
		"nmi-excepted-pods":      func() bool { return c.bob.dryRun(workload("Pod", "probe", excepted)) != nil },
		"nmi-allowed-identities": func() bool { return c.admin.dryRun(newIdentity("shop", "probe", managedSpec(unlisted, ""))) != nil },
		"nmi-azureidentity-values": func() bool {
			return c.admin.dryRun(newIdentity("shop", "probe", managedSpec("", ""))) == nil && len(c.admin.warned()) > 0
		},
		"nmi-azureidentitybinding-values": func() bool {
			return c.admin.dryRun(newBinding("shop", "probe", "i", "")) == nil && len(c.admin.warned()) > 0
		},
		"nmi-azurepodidentityexception-values": func() bool {
			return c.admin.dryRun(newCustom("AzurePodIdentityException", "shop", "probe", nil)) == nil && len(c.admin.warned()) > 0
		},
		"nmi-serviceaccount-values": func() bool {
			return c.admin.dryRun(newServiceAccount("bank", "probe", podresolver.ClientIDAnnotation, "odd")) == nil && len(c.admin.warned()) > 0
		},
		"alice's role": func() bool { return c.alice.dryRun(newException("shop", "probe", "a", "b")) == nil },
	} {
		require.Eventually(t, inForce, patience, 50*time.Millisecond, "%s to be in force", name)
	}
}

// apiUser writes objects as somebody, and remembers what the API server warned of.
type apiUser struct {
	custom dynamic.Interface
	kube   kubernetes.Interface

	mu       sync.Mutex
	warnings []string
}

// user is somebody whom the administrator impersonates; "" is the administrator. The
// groups of a service account come from its name.
func (c *admissionCluster) user(t *testing.T, name string, groups ...string) *apiUser {
	t.Helper()
	u := &apiUser{}
	config := c.Admin()
	config.Impersonate = rest.ImpersonationConfig{UserName: name, Groups: groups}
	config.WarningHandler = u
	var err error
	u.custom, err = dynamic.NewForConfig(config)
	require.NoError(t, err)
	u.kube, err = kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return u
}

// HandleWarningHeader implements rest.WarningHandler.
func (u *apiUser) HandleWarningHeader(_ int, _, text string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.warnings = append(u.warnings, text)
}

// warned returns the warnings since it was called last.
func (u *apiUser) warned() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	warnings := slices.Clone(u.warnings)
	u.warnings = nil
	return warnings
}

func (u *apiUser) resource(object *unstructured.Unstructured) dynamic.ResourceInterface {
	resource, _ := meta.UnsafeGuessKindToResource(object.GroupVersionKind())
	return u.custom.Resource(resource).Namespace(object.GetNamespace())
}

// Every request has a time limit of its own, since it is not made in a test's
// goroutine alone.
func requestContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

func (u *apiUser) create(object *unstructured.Unstructured) error {
	ctx, cancel := requestContext()
	defer cancel()
	_, err := u.resource(object).Create(ctx, object, metav1.CreateOptions{})
	return err
}

// dryRun is a creation that is not stored. Policies apply to it all the same.
func (u *apiUser) dryRun(object *unstructured.Unstructured) error {
	ctx, cancel := requestContext()
	defer cancel()
	_, err := u.resource(object).Create(ctx, object, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	return err
}

func (u *apiUser) patch(object *unstructured.Unstructured, mergePatch string, subresources ...string) error {
	ctx, cancel := requestContext()
	defer cancel()
	_, err := u.resource(object).Patch(ctx, object.GetName(), types.MergePatchType, []byte(mergePatch), metav1.PatchOptions{}, subresources...)
	return err
}

func (u *apiUser) remove(object *unstructured.Unstructured) error {
	ctx, cancel := requestContext()
	defer cancel()
	now := int64(0)
	return u.resource(object).Delete(ctx, object.GetName(), metav1.DeleteOptions{GracePeriodSeconds: &now})
}

// refused checks that a policy refused a request, with a message that has each part.
func refused(t *testing.T, err error, policy string, parts ...string) {
	t.Helper()
	if !assert.Error(t, err) {
		return
	}
	assert.True(t, apierrors.IsForbidden(err), "%v", err)
	assert.ErrorContains(t, err, "ValidatingAdmissionPolicy '"+policy+"' with binding '"+policy+"' denied request: ")
	for _, part := range parts {
		assert.ErrorContains(t, err, part)
	}
}

// custom makes one of the project's custom resources.
func newCustom(kind, namespace, name string, spec map[string]any) *unstructured.Unstructured {
	object := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind,
		"metadata": map[string]any{"namespace": namespace, "name": name},
	}}
	if spec != nil {
		object.Object["spec"] = spec
	}
	return object
}

func newException(namespace, name, label, value string) *unstructured.Unstructured {
	return newCustom("AzurePodIdentityException", namespace, name, map[string]any{"podLabels": map[string]any{label: value}})
}

func newIdentity(namespace, name string, spec map[string]any) *unstructured.Unstructured {
	return newCustom("AzureIdentity", namespace, name, spec)
}

func newBinding(namespace, name, identity, selector string) *unstructured.Unstructured {
	return newCustom("AzureIdentityBinding", namespace, name, map[string]any{"azureIdentity": identity, "selector": selector})
}

// managedSpec is the spec of an AzureIdentity of type 0, without the IDs that are "".
func managedSpec(clientID, resourceID string) map[string]any {
	spec := map[string]any{"type": int64(0)}
	if clientID != "" {
		spec["clientID"] = clientID
	}
	if resourceID != "" {
		spec["resourceID"] = resourceID
	}
	return spec
}
