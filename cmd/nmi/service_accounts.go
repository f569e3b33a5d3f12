package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

const (
	// accountTokenLife is the shortest that the API server gives, in seconds. A token is used
	// once.
	accountTokenLife = 600
	// maxBoundPods is how many pods are tried as what a token is bound to: one may have gone.
	maxBoundPods = 3
	// maxAccountToken bounds what is read of a response. Tokens are of some 1 KB.
	maxAccountToken = 64 << 10
)

// accountTokens requests tokens of service accounts from the API server (kubernetes.io,
// "TokenRequest"). It keeps none.
type accountTokens struct {
	client   *rest.RESTClient
	audience string
	// pods are those that a token can be bound to; the API server then takes the token back
	// with the pod.
	pods func(podresolver.ServiceAccount) []podresolver.BoundPod
	// asNode is the node in whose name the tokens are requested; "" for the agent's own.
	asNode string
}

func newAccountTokens(restConfig *rest.Config, cfg federationConfig, node string, pods func(podresolver.ServiceAccount) []podresolver.BoundPod) (*accountTokens, error) {
	t := &accountTokens{audience: cfg.audience, pods: pods}
	c := rest.CopyConfig(restConfig)
	c.GroupVersion, c.APIPath = &corev1.SchemeGroupVersion, "/api"
	c.ContentType, c.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	known := runtime.NewScheme()
	metav1.AddToGroupVersion(known, corev1.SchemeGroupVersion) // Status, with the API server's words
	c.NegotiatedSerializer = serializer.NewCodecFactory(known).WithoutConversion()
	c.QPS = -1 // no limit: upstream has pods take turns, which a queue of client-go's would undo
	if cfg.asNode {
		t.asNode = node
		// The user alone: with a group, the API server would not take it for constrained
		// impersonation (KEP-5284).
		c.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + node}
	}
	var err error
	if t.client, err = rest.RESTClientFor(c); err != nil {
		return nil, fmt.Errorf("client for tokens of service accounts: %w", err)
	}
	return t, nil
}

// request returns a new token; the signature is that of upstream.Config.ServiceAccountToken.
func (t *accountTokens) request(ctx context.Context, account tokencache.ServiceAccount) (token string, err error) {
	pods := t.pods(podresolver.ServiceAccount(account))
	err = errors.New("no pod of this node that has it is left")
	for _, pod := range pods[:min(len(pods), maxBoundPods)] {
		token, err = t.requestFor(ctx, account, pod)
		if !isGone(err) {
			break
		}
	}
	return token, t.explain(account, err)
}

// isGone reports whether an error may be about the pod that the token was to be bound to: it does
// not exist, or is another one of the same name.
func isGone(err error) bool {
	return (apierrors.IsNotFound(err) || apierrors.IsConflict(err)) && !isAboutAccount(err)
}

// isAboutAccount reports whether such an error is about the service account instead. The API server
// says so of one that does not exist, and names the request where the UID is another's
// (pkg/registry/core/serviceaccount/storage/token.go).
func isAboutAccount(err error) bool {
	var answer apierrors.APIStatus
	if !errors.As(err, &answer) || answer.Status().Details == nil {
		return false
	}
	kind := answer.Status().Details.Kind
	return kind == "serviceaccounts" || kind == "TokenRequest"
}

func (t *accountTokens) requestFor(ctx context.Context, account tokencache.ServiceAccount, pod podresolver.BoundPod) (token string, err error) {
	life := int64(accountTokenLife)
	body, err := json.Marshal(&authenticationv1.TokenRequest{
		TypeMeta:   metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "TokenRequest"},
		ObjectMeta: metav1.ObjectMeta{UID: types.UID(account.UID)}, // refused for another one of the same name
		Spec: authenticationv1.TokenRequestSpec{
			Audiences: []string{t.audience}, ExpirationSeconds: &life,
			BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: types.UID(pod.UID)},
		},
	})
	if err != nil {
		return "", err
	}
	// As a stream: client-go has words for whole bodies in its log, and none for streams.
	response, err := t.client.Post().Namespace(account.Namespace).Resource("serviceaccounts").Name(account.Name).SubResource("token").
		Body(bytes.NewReader(body)).Stream(ctx)
	if err != nil {
		return "", err
	}
	defer response.Close()
	var got authenticationv1.TokenRequest
	// The error would say what it met, which is a piece of the token.
	if json.NewDecoder(io.LimitReader(response, maxAccountToken)).Decode(&got) != nil || got.Status.Token == "" {
		return "", errors.New("the API server's response is not the JSON of a token")
	}
	return got.Status.Token, nil
}

// explain says what an operator has to do about an error.
func (t *accountTokens) explain(account tokencache.ServiceAccount, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err) && t.asNode != "":
		return fmt.Errorf("%w: the agent may not request it as its node %s; apply deploy/federation/own-node.yaml, which needs Kubernetes 1.36, and see docs/federation.md#the-right-to-request-tokens (%w)",
			upstream.ErrNoServiceAccountToken, t.asNode, err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%w: the agent's service account may not request it; apply deploy/federation/namespace.yaml to namespace %s, or see docs/federation.md#the-right-to-request-tokens (%w)",
			upstream.ErrNoServiceAccountToken, account.Namespace, err)
	case apierrors.IsNotFound(err) && isAboutAccount(err):
		return fmt.Errorf("%w: there is no such service account (%w)", upstream.ErrNoServiceAccountToken, err)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fmt.Errorf("%w: %w", upstream.ErrNoServiceAccountToken, err)
	}
	return fmt.Errorf("requesting its token from the API server: %w", err)
}
