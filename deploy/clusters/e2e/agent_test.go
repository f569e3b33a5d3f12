//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Where the chart puts the agent.
const (
	agentNamespace = "kube-system"
	agentName      = "nmi"
	agentPods      = "component=nmi,tier=node"
)

// install installs the agent with the chart, as a user does, or changes it, and waits until
// it is rolled out.
func (c *cluster) install(ctx context.Context, values ...string) error {
	if err := c.apply(ctx, values...); err != nil {
		return err
	}
	return c.awaitRollout(ctx)
}

// apply does not wait. Fields that a scenario changed with kubectl become Helm's again.
func (c *cluster) apply(ctx context.Context, values ...string) error {
	repository, image, tag, err := splitImage(*imageFlag)
	if err != nil {
		return err
	}
	args := []string{"upgrade", "--install", "--force-conflicts", agentName, "deploy/chart", "--set=image.repository=" + repository, "--set=nmi.image=" + image, "--set=nmi.tag=" + tag}
	if onBridge() {
		values = append([]string{"nmi.allowNetworkPluginKubenet=true"}, values...)
	}
	for _, value := range values {
		args = append(args, "--set="+value)
	}
	return c.helm(ctx, args...)
}

// onBridge reports whether pods share a bridge, on which the agent hands out tokens only if
// it is told to (docs/security.md, "Spoofed addresses").
func onBridge() bool { return os.Getenv("CNI") == "bridge" }

// uninstall removes the agent as docs/install.md says, the rules of the nodes included.
func (c *cluster) uninstall(ctx context.Context) error {
	if err := c.install(ctx, "cleanup=true"); err != nil {
		return err
	}
	return c.helm(ctx, "uninstall", agentName, "--wait")
}

func splitImage(ref string) (repository, image, tag string, err error) {
	slash, colon := strings.LastIndex(ref, "/"), strings.LastIndex(ref, ":")
	if slash < 0 || colon < slash {
		return "", "", "", fmt.Errorf("-image %q: want <repository>/<name>:<tag>", ref)
	}
	return ref[:slash], ref[slash+1 : colon], ref[colon+1:], nil
}

func (c *cluster) helm(ctx context.Context, args ...string) error {
	path, err := c.helmPath(ctx)
	if err != nil {
		return err
	}
	_, err = c.command(ctx, path, append(args, "--namespace="+agentNamespace)...)
	return err
}

// helmPath builds Helm, once.
func (c *cluster) helmPath(ctx context.Context) (string, error) {
	path, err := c.command(ctx, "go", "tool", "-modfile=.ci/helm/go.mod", "-n", "helm")
	return strings.TrimSpace(path), err
}

// daemonSet returns the agent's, or with cleanup=true that which replaces it.
func (c *cluster) daemonSet(ctx context.Context) (*appsv1.DaemonSet, error) {
	list, err := c.kube.AppsV1().DaemonSets(agentNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/instance=" + agentName})
	if err != nil {
		return nil, err
	}
	if len(list.Items) != 1 {
		return nil, fmt.Errorf("namespace %s has %d DaemonSets of the chart, want one", agentNamespace, len(list.Items))
	}
	return &list.Items[0], nil
}

// isRolledOut is what "kubectl rollout status" waits for.
func isRolledOut(ds *appsv1.DaemonSet) bool {
	s := ds.Status
	return s.ObservedGeneration >= ds.Generation && s.UpdatedNumberScheduled >= s.DesiredNumberScheduled && s.NumberAvailable >= s.DesiredNumberScheduled && s.DesiredNumberScheduled > 0
}

func (c *cluster) awaitRollout(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ds, err := c.daemonSet(ctx)
		if err == nil && isRolledOut(ds) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the agent was not rolled out in %s: %w", patience, err)
		}
	}
}

// upgrade changes values of the chart until the end of the scenario, and waits until the
// agent is rolled out.
func (s *scenario) upgrade(values ...string) {
	s.t.Helper()
	s.restoreAgent()
	require.NoError(s.t, world.install(s.t.Context(), values...))
}

// restoreAgent has the agent as it was installed at the end of the scenario.
func (s *scenario) restoreAgent() {
	s.t.Cleanup(func() { assert.NoError(s.t, world.install(context.Background())) })
}

// agents returns the agent's pods that are not being deleted.
func (s *scenario) agents() (pods []corev1.Pod) {
	s.t.Helper()
	list, err := world.kube.CoreV1().Pods(agentNamespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: agentPods})
	require.NoError(s.t, err)
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			pods = append(pods, p)
		}
	}
	return pods
}
