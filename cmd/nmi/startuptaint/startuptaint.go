// Package startuptaint keeps ordinary pods off the agent's own node until the agent can
// serve them, by a taint that someone else sets on new nodes.
//
// The life of the taint:
//
//  1. Whatever creates the node sets it: the node pool, or the kubelet's
//     --register-with-taints. Pods that do not tolerate it wait.
//  2. The agent watches its node, and removes the taint once it is ready.
//  3. A taint that is set later is removed as well, for as long as the agent is ready.
//  4. An agent that runs and cannot write its rules sets the taint again.
//  5. An agent that stops changes nothing: its rules stay, and pods are refused until the
//     next one runs.
//
// spec.taints is an atomic list: whoever writes it writes all of it. Each change carries
// the resource version that it is based on, so that the API server refuses it if somebody
// else has changed the node meanwhile, and the agent tries again with the newer list.
package startuptaint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
)

// Config says which taint of which node it is, and when it is removed and set. All fields
// are required.
type Config struct {
	Node   string
	Taint  corev1.Taint // key and effect identify it; the value is for setting it
	Ready  func() error // nil when pods may come
	Rules  func() error // why the rules are not in place; nil when they are
	Logger *slog.Logger
}

// Parse parses <key>[=<value>]:<effect>, the form in which kubectl taint takes a taint.
// PreferNoSchedule is refused, since it keeps no pod off a node that has room.
func Parse(text string) (corev1.Taint, error) {
	name, effect, found := strings.Cut(text, ":")
	key, value, _ := strings.Cut(name, "=")
	taint := corev1.Taint{Key: key, Value: value, Effect: corev1.TaintEffect(effect)}
	if !found || taint.Effect != corev1.TaintEffectNoSchedule && taint.Effect != corev1.TaintEffectNoExecute {
		return corev1.Taint{}, errors.New("want <key>[=<value>]:NoSchedule or <key>[=<value>]:NoExecute")
	}
	if problems := slices.Concat(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)); len(problems) > 0 {
		return corev1.Taint{}, fmt.Errorf("%q is not the key and value of a taint: %s", name, strings.Join(problems, "; "))
	}
	return taint, nil
}

const (
	// checkInterval is how often the agent's readiness is looked at. That is a matter of
	// memory: the API server is asked for nothing.
	checkInterval = time.Second
	// rulesGrace is how long rules must have been missing before the taint is set:
	// longer than a program that holds the xtables lock takes.
	rulesGrace = 20 * time.Second
	// The pause after a failed change; it doubles.
	firstRetry = time.Second
	maxRetry   = time.Minute
)

// Manager removes and sets the taint.
type Manager struct {
	cfg     Config
	client  *rest.RESTClient
	changed chan struct{} // holds a value when node has changed

	mu       sync.Mutex   // guards all following fields
	node     *corev1.Node // trimmed; nil as long as it is not known
	watchErr error        // of the last list or watch; nil if it succeeded
	patchErr error        // likewise, of the last change

	failingSince time.Time // when the rules were first missing; used by Run only
}

// New returns a Manager that sends nothing before Run.
func New(config *rest.Config, cfg Config) (*Manager, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("adding the types of %s: %w", corev1.SchemeGroupVersion, err)
	}
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &corev1.SchemeGroupVersion, "/api"
	c.ContentType = runtime.ContentTypeProtobuf
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("creating a client for nodes: %w", err)
	}
	return &Manager{cfg: cfg, client: client, changed: make(chan struct{}, 1)}, nil
}

// Run removes and sets the taint until ctx ends, and then leaves it as it is. It may be
// called again when it has returned.
func (m *Manager) Run(ctx context.Context) {
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { m.watch(ctx) })
	m.failingSince = time.Time{}
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	var retryAt time.Time
	pause := firstRetry
	for {
		select {
		case <-tick.C:
		case <-m.changed:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		wanted := m.decide(now)
		if now.Before(retryAt) {
			continue
		}
		err := m.apply(ctx, wanted)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			pause = firstRetry
		case apierrors.IsConflict(err), apierrors.IsNotFound(err):
			// The watch brings the newer node, or that there is none.
		default:
			m.setError(&m.patchErr, err)
			retryAt, pause = now.Add(pause), min(2*pause, maxRetry)
		}
	}
}

// action is what is to be done with the taint.
type action int

const (
	leave action = iota
	remove
	set
)

// decide says what is to be done with the taint now.
func (m *Manager) decide(now time.Time) action {
	failing := m.cfg.Rules() != nil
	switch {
	case !failing:
		m.failingSince = time.Time{}
	case m.failingSince.IsZero():
		m.failingSince = now
	}
	switch {
	case failing && now.Sub(m.failingSince) >= rulesGrace:
		return set
	case m.cfg.Ready() == nil:
		return remove
	default:
		return leave
	}
}

// apply changes the node, unless it is as wanted.
func (m *Manager) apply(ctx context.Context, wanted action) error {
	m.mu.Lock()
	node := m.node
	m.mu.Unlock()
	if node == nil || wanted == leave {
		return nil
	}
	taint := m.cfg.Taint
	taints := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.MatchTaint(&taint) })
	there := len(taints) < len(node.Spec.Taints)
	if there == (wanted == set) {
		m.setError(&m.patchErr, nil)
		return nil
	}
	if wanted == set {
		taints = append(taints, taint)
	}
	patch, err := mergePatch(node.ResourceVersion, taints)
	if err != nil {
		return err
	}
	var changed corev1.Node
	if err := m.client.Patch(types.MergePatchType).Resource("nodes").Name(node.Name).Body(patch).Do(ctx).Into(&changed); err != nil {
		return err
	}
	m.setNode(&changed)
	m.setError(&m.patchErr, nil)
	if wanted == set {
		m.cfg.Logger.Warn("set the startup taint: no new pods until the rules can be written", "node", node.Name, "taint", taint.ToString(), "error", m.cfg.Rules())
	} else {
		m.cfg.Logger.Info("removed the startup taint: the agent is ready for pods", "node", node.Name, "taint", taint.ToString())
	}
	return nil
}

// mergePatch replaces the taints of the node with this resource version; of any other
// version the API server refuses it with a conflict.
func mergePatch(resourceVersion string, taints []corev1.Taint) ([]byte, error) {
	if len(taints) == 0 {
		taints = nil // null removes the field (RFC 7396)
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": resourceVersion},
		"spec":     map[string]any{"taints": taints},
	})
}

// setNode replaces what is known of the node; nil if there is none.
func (m *Manager) setNode(node *corev1.Node) {
	m.mu.Lock()
	m.node = node
	m.mu.Unlock()
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// setError replaces one of the two errors. A repeated one is logged once.
func (m *Manager) setError(field *error, err error) {
	err = m.explain(err)
	m.mu.Lock()
	isNew := err != nil && (*field == nil || (*field).Error() != err.Error())
	*field = err
	m.mu.Unlock()
	if isNew {
		m.cfg.Logger.Warn("the startup taint cannot be managed; retrying", "taint", m.cfg.Taint.ToString(), "error", err)
	}
}

// explain says what an operator has to do about an error of the API server.
func (m *Manager) explain(err error) error {
	var request *url.Error // its URL is long, and differs for each try
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("apply deploy/admission/startup-taint.yaml, with this taint in it: it gives the agent's service account the right to list, watch and patch nodes, and limits that to this taint of its own node: %w", err)
	case errors.As(err, &request):
		return fmt.Errorf("cannot reach the API server: %w", request.Err)
	default:
		return fmt.Errorf("the API server returned an error: %w", err)
	}
}

// Status is what an operator should know of the taint, a sentence; "" for nothing.
func (m *Manager) Status() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(m.watchErr, m.patchErr); err != nil {
		return "the startup taint " + m.cfg.Taint.ToString() + " cannot be managed: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return ""
}
