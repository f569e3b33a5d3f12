//go:build cluster

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// oldImage is the NMI of aad-pod-identity, which deploy/clusters/old-nmi builds beside
// copies of its manifests.
const oldImage = "localhost/old-nmi:v1.8.17"

// oldNMI is an installation of aad-pod-identity.
type oldNMI struct {
	mode      string // "managed" or "standard"
	namespace string
	manifest  string // file: what aad-pod-identity's own has about the NMI
}

// replaceAgentBy removes the agent with all its rules, until the end of the scenario, and
// installs aad-pod-identity's NMI with its own manifest and this image.
func (s *scenario) replaceAgentBy(mode, image string) oldNMI {
	s.t.Helper()
	if onBridge() {
		s.skip("with these manifests the agent hands out no tokens on a bridge")
	}
	text, err := os.ReadFile(filepath.Join(world.root, ".cache", "clusters", "old-nmi", mode+".yaml"))
	if os.IsNotExist(err) {
		s.skip("needs what deploy/clusters/old-nmi/build.sh builds")
	}
	require.NoError(s.t, err)
	old := oldNMI{mode: mode, namespace: "kube-system", manifest: filepath.Join(s.t.TempDir(), "old.yaml")}
	if mode == "standard" {
		old.namespace = "default"
	}
	// Neither its definitions, which have been replaced, nor MIC, which needs Azure.
	var kept []string
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		if !strings.Contains(document, "kind: CustomResourceDefinition") && !strings.Contains(document, "aad-pod-id-mic-") {
			kept = append(kept, strings.ReplaceAll(document, "mcr.microsoft.com/oss/azure/aad-pod-identity/nmi:v1.8.17", image))
		}
	}
	require.NoError(s.t, os.WriteFile(old.manifest, []byte(strings.Join(kept, "\n---\n")), 0o600))

	if image == oldImage {
		s.run(world.script, "load", filepath.Join(world.root, ".cache", "clusters", "images", "old-nmi.tar"))
	}
	s.restoreAgent()
	require.NoError(s.t, world.uninstall(s.t.Context()))
	s.t.Cleanup(func() {
		_, err := world.command(context.Background(), "kubectl", "delete", "--ignore-not-found", "--cascade=foreground", "-f", old.manifest)
		assert.NoError(s.t, err)
	})
	s.apply(old)
	return old
}

func (s *scenario) apply(old oldNMI) {
	s.t.Helper()
	s.kubectl("apply", "-f", old.manifest)
	s.kubectl("-n", old.namespace, "rollout", "status", "daemonset/nmi", "--timeout="+patience.String())
}

// assign does what MIC does in standard mode for a pod that will be on the only node.
func (s *scenario) assign(pod string, id imdstest.Identity) {
	s.t.Helper()
	nodes, err := world.kube.CoreV1().Nodes().List(s.t.Context(), metav1.ListOptions{})
	require.NoError(s.t, err)
	node := nodes.Items[0].Name
	ref := func(spec map[string]any) map[string]any {
		return map[string]any{"metadata": map[string]any{"name": "cart", "namespace": s.namespace}, "spec": spec}
	}
	object := &unstructured.Unstructured{Object: map[string]any{
		"spec": map[string]any{
			"azureIdentityRef": ref(map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID}),
			"azureBindingRef":  ref(map[string]any{"azureIdentity": "cart", "selector": "cart"}),
			"pod":              pod, "podNamespace": s.namespace, "nodename": node,
		},
		"status": map[string]any{"status": "Assigned"},
	}}
	object.SetGroupVersionKind(aadpodidentity.GroupVersion.WithKind("AzureAssignedIdentity"))
	object.SetName(pod + "-" + s.namespace + "-cart")
	object.SetLabels(map[string]string{"nodename": node, "podname": pod})
	assigned := world.custom.Resource(aadpodidentity.AzureAssignedIdentities).Namespace("default")
	_, err = assigned.Create(s.t.Context(), object, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		assert.NoError(s.t, assigned.Delete(context.Background(), object.GetName(), metav1.DeleteOptions{}))
	})
}

// unlimitedIMDS is for the old NMI, which asks for each request.
func (s *scenario) unlimitedIMDS() {
	s.t.Helper()
	require.NoError(s.t, world.imds.Configure(s.t.Context(), control.Config{IMDS: imdstest.Config{Identities: []imdstest.Identity{cart, report}}}))
	s.t.Cleanup(func() { assert.NoError(s.t, world.configureIMDS(context.Background())) })
}

func TestOldManifestWithOurImage(t *testing.T) {
	for _, mode := range []string{"managed", "standard"} {
		t.Run(mode, func(t *testing.T) {
			s := begin(t, "The agent runs in aad-pod-identity's manifest ("+mode+" mode), of which only the image was changed.", theIMDS, theNode)
			old := s.replaceAgentBy(mode, *imageFlag)
			s.bind("cart", cart)
			if mode == "standard" {
				s.assign("cart", cart)
			}
			s.start(
				pod{name: "cart", binding: "cart", askers: []asker{asks(s.token(cart), s.refused("client_id="+report.ClientID))}},
				pod{name: "unbound", askers: []asker{asks(s.refused())}},
			)
			s.finish()
			log := s.kubectl("-n", old.namespace, "logs", "daemonset/nmi", "--tail=-1")
			assert.Contains(t, log, "no agent can take over from this one")
		})
	}
}
