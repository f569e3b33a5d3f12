package events

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
	"unicode"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

func newClient(config *rest.Config) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme() // for the API server's errors
	if err := eventsv1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("adding the types of %s: %w", eventsv1.SchemeGroupVersion, err)
	}
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &eventsv1.SchemeGroupVersion, "/apis"
	c.ContentType, c.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("client for events: %w", err)
	}
	return client, nil
}

// controller is the reportingController of all Events.
const controller = "nmi"

// maxInstance is of the field reportingInstance (ReportingInstanceLengthLimit of Kubernetes'
// pkg/apis/core/validation).
const maxInstance = 128

// object is the Event that is created for a series.
func (w *Writer) object(s *series) *eventsv1.Event {
	namespace := s.Regarding.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault // where those of nodes belong
	}
	return &eventsv1.Event{
		TypeMeta:            metav1.TypeMeta{APIVersion: eventsv1.SchemeGroupVersion.String(), Kind: "Event"},
		ObjectMeta:          metav1.ObjectMeta{Namespace: namespace, Name: s.name},
		EventTime:           metav1.NewMicroTime(s.first),
		Series:              s.observed(),
		ReportingController: controller,
		ReportingInstance:   w.cfg.Node[:min(len(w.cfg.Node), maxInstance)],
		Type:                corev1.EventTypeWarning,
		Reason:              s.Reason,
		Action:              s.Action,
		Regarding:           s.Regarding,
		Note:                s.Note,
	}
}

// observed is how often the Event happened; nil for once, as validation demands.
func (s *series) observed() *eventsv1.EventSeries {
	if s.Count < 2 {
		return nil
	}
	return &eventsv1.EventSeries{
		Count:            int32(min(s.Count, math.MaxInt32)), //nolint:gosec // it fits
		LastObservedTime: metav1.NewMicroTime(s.last),
	}
}

// send creates or patches the Event of a series.
func (w *Writer) send(ctx context.Context, s *series) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	event := w.object(s)
	request, content := w.client.Post(), any(event)
	if s.verb() == patch {
		request, content = w.client.Patch(types.MergePatchType).Name(s.name), map[string]any{"series": event.Series}
	}
	body, err := json.Marshal(content)
	if err != nil {
		return err
	}
	err = request.Namespace(event.Namespace).Resource("events").SetHeader("Content-Type", contentType(s.verb())).Body(body).Do(ctx).Error()
	if s.verb() == create && apierrors.IsAlreadyExists(err) {
		return nil // an earlier request's response was lost
	}
	return err
}

func contentType(v verb) string {
	if v == patch {
		return string(types.MergePatchType)
	}
	return runtime.ContentTypeJSON
}

// write writes a series. It returns false if the API server cannot take it now.
func (w *Writer) write(ctx context.Context, s *series) bool {
	err := w.send(ctx, s)
	switch {
	case err == nil:
		w.written.Add(1)
		w.done(s, func(now *series) {
			now.written = s.Count
			now.pause = min(max(2*now.pause, firstUpdate), maxUpdate)
			now.due = time.Now().Add(now.pause)
		})
	case s.verb() == patch && apierrors.IsNotFound(err): // it has expired, or was deleted
		w.done(s, func(now *series) { now.name, now.written = nameOf(s.Regarding.Name, time.Now()), 0 })
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), "cannot "+string(s.verb())+" resource"):
		// The words of k8s.io/apiserver's forbiddenMessage. Without them it is admission (a quota, a
		// policy, a namespace that terminates), which is about one namespace.
		w.forbidden(s.verb(), err)
	case temporary(err):
		w.cfg.Logger.DebugContext(ctx, "event not written; trying again", "reason", s.Reason, "error", err)
		w.done(s, func(now *series) { now.due = time.Now() }) // after the others: it may be its namespace alone
		return false
	default: // its namespace is gone, or nothing like it will ever be accepted
		w.cfg.Logger.DebugContext(ctx, "event not written", "reason", s.Reason, "error", err)
		w.drop(s)
	}
	return true
}

// forbidden notes that this account may not write Events, which is logged once. They are as good
// as the log, and the agent does without.
func (w *Writer) forbidden(v verb, err error) {
	w.mu.Lock()
	w.paused[v] = time.Now().Add(forbiddenRetry)
	told := w.told[v]
	w.told[v] = true
	w.mu.Unlock()
	if !told {
		w.cfg.Logger.Warn("the agent's service account may not write events: what they would say is in this log alone; apply its ClusterRole (deploy/manifests/account.yaml)", "verb", v, "error", err)
	}
}

// temporary reports whether the same request may succeed later.
func temporary(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return true // of the network
	}
	code := status.Status().Code
	return code >= 500 || apierrors.IsTooManyRequests(err) || apierrors.IsTimeout(err) || apierrors.IsUnauthorized(err)
}

// maxNote is the API server's limit (NoteLengthLimit, see maxInstance), in bytes.
const maxNote = 1024

// clean makes one line of a text, of limited length.
func clean(text string, limit int) string {
	text = strings.ToValidUTF8(strings.Join(strings.Fields(text), " "), "")
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, text)
	if len(text) <= limit {
		return text
	}
	const more = "…"
	return strings.ToValidUTF8(text[:limit-len(more)], "") + more
}
