package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validate/content"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/proxy/upstream"
)

// secrets reads Kubernetes Secrets one by one, when they are needed. It neither
// watches nor keeps any: a compromised agent leaks whatever it keeps.
type secrets struct{ client *rest.RESTClient }

// maxSecret bounds what is read of one. The API server takes 1 MiB of data,
// which base64 makes longer by a third.
const maxSecret = 4 << 20

func newSecrets(restConfig *rest.Config) (*secrets, error) {
	c := rest.CopyConfig(restConfig)
	c.GroupVersion, c.APIPath = &corev1.SchemeGroupVersion, "/api"
	c.ContentType, c.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	known := runtime.NewScheme()
	metav1.AddToGroupVersion(known, corev1.SchemeGroupVersion) // Status, with the API server's words
	c.NegotiatedSerializer = serializer.NewCodecFactory(known).WithoutConversion()
	c.QPS = -1 // no limit: upstream has pods take turns, which a queue of client-go's would undo
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("client for secrets: %w", err)
	}
	return &secrets{client}, nil
}

// read returns what is in a Secret; the signature is that of upstream.Config.Secret.
func (s *secrets) read(ctx context.Context, namespace, name string) (map[string][]byte, error) {
	for _, part := range []string{namespace, name} {
		if part == "" || len(content.IsPathSegmentName(part)) > 0 {
			return nil, fmt.Errorf("%w: %.100q cannot be part of a secret's name", upstream.ErrNoSecret, part)
		}
	}
	// As a stream: client-go has words for whole bodies in its log, and none for
	// streams.
	body, err := s.client.Get().Namespace(namespace).Resource("secrets").Name(name).Stream(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%w: there is no such secret", upstream.ErrNoSecret)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("%w: the agent's service account may not get it; apply deploy/service-principals/rbac.yaml to namespace %s, with the secret's name in it (%w)",
			upstream.ErrNoSecret, namespace, err)
	case err != nil:
		return nil, fmt.Errorf("asking the API server for it: %w", err)
	}
	defer body.Close()
	var secret struct {
		Kind string            `json:"kind"`
		Data map[string][]byte `json:"data"`
	}
	// The error would say what it met, which is a piece of the secret.
	if json.NewDecoder(io.LimitReader(body, maxSecret)).Decode(&secret) != nil || secret.Kind != "Secret" {
		return nil, errors.New("the API server's answer is not the JSON of a secret")
	}
	return secret.Data, nil
}
