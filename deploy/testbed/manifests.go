package testbed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

// ReadManifests reads every object of the YAML files that match the patterns, in
// the order of the patterns.
func ReadManifests(fsys fs.FS, patterns ...string) ([]*unstructured.Unstructured, error) {
	var all []*unstructured.Unstructured
	for _, pattern := range patterns {
		names, err := fs.Glob(fsys, pattern)
		if err != nil {
			return nil, err
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("no manifest matches %s", pattern)
		}
		for _, name := range names {
			text, err := fs.ReadFile(fsys, name)
			if err != nil {
				return nil, err
			}
			objects, err := parseManifests(text)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			all = append(all, objects...)
		}
	}
	return all, nil
}

func parseManifests(text []byte) ([]*unstructured.Unstructured, error) {
	var all []*unstructured.Unstructured
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		object := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict(document, &object.Object); err != nil {
			return nil, err
		}
		if len(object.Object) > 0 { // a document may hold comments alone
			all = append(all, object)
		}
	}
}

// Apply applies the objects in their order, on the server's side and strictly: a
// field that the API server does not know is an error. It waits until the API
// server serves the custom resources among them.
func Apply(ctx context.Context, client dynamic.Interface, objects []*unstructured.Unstructured) error {
	for _, object := range objects {
		// Every kind used here has the plural that the guess gives.
		resource, _ := meta.UnsafeGuessKindToResource(object.GroupVersionKind())
		var target dynamic.ResourceInterface = client.Resource(resource)
		if namespace := object.GetNamespace(); namespace != "" {
			target = client.Resource(resource).Namespace(namespace)
		}
		data, err := object.MarshalJSON()
		if err != nil {
			return err
		}
		force := true
		_, err = target.Patch(ctx, object.GetName(), "application/apply-patch+yaml", data,
			metav1.PatchOptions{FieldManager: "testbed", Force: &force, FieldValidation: metav1.FieldValidationStrict})
		if err != nil {
			return fmt.Errorf("applying %s %s: %w", object.GetKind(), object.GetName(), err)
		}
		if object.GetKind() == "CustomResourceDefinition" {
			if err := awaitEstablished(ctx, target, object.GetName()); err != nil {
				return err
			}
		}
	}
	return nil
}

func awaitEstablished(ctx context.Context, definitions dynamic.ResourceInterface, name string) error {
	return poll(ctx, 30*time.Second, "definition of "+name+" to be served", func() error {
		got, err := definitions.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, _ := unstructured.NestedSlice(got.Object, "status", "conditions")
		for _, c := range conditions {
			if c, ok := c.(map[string]any); ok && c["type"] == "Established" && c["status"] == "True" {
				return nil
			}
		}
		return errors.New("not established yet")
	})
}

// poll calls try until it returns nil, for at most timeout.
func poll(ctx context.Context, timeout time.Duration, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", timeout, what, err)
		}
	}
}
