package testbed

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const adminToken = "testbed-admin"

// ControlPlane is a real kube-apiserver with its etcd, on the node's loopback.
// There are no controllers: pods are what their creator says they are.
type ControlPlane struct {
	bin, dir  string
	shift     int // added to every port, so that two fit on one node
	etcd, api *Program
	clientCA  *clientCA
}

func (c *ControlPlane) apiServerURL() string {
	return fmt.Sprintf("https://127.0.0.1:%d", 6443+c.shift)
}
func (c *ControlPlane) etcdURL() string { return fmt.Sprintf("http://127.0.0.1:%d", 2379+c.shift) }
func (c *ControlPlane) peerURL() string { return fmt.Sprintf("http://127.0.0.1:%d", 2380+c.shift) }

// StartControlPlane starts both from the binaries in bin (see "make kube"), with
// their data in dir, and returns once the API server is ready.
func StartControlPlane(ctx context.Context, bin, dir string) (*ControlPlane, error) {
	return startControlPlane(ctx, bin, dir, 0)
}

func startControlPlane(ctx context.Context, bin, dir string, shift int) (*ControlPlane, error) {
	c := &ControlPlane{bin: bin, dir: dir, shift: shift}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("%s is not built: run make kube: %w", name, err)
		}
	}
	if err := c.writeCredentials(); err != nil {
		return nil, err
	}
	var err error
	c.etcd, err = StartProgram(filepath.Join(bin, "etcd"), nil,
		"--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls", c.etcdURL(), "--advertise-client-urls", c.etcdURL(), "--listen-peer-urls", c.peerURL())
	if err != nil {
		return nil, err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *ControlPlane) writeCredentials() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	if c.clientCA, err = newClientCA(); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(c.path("sa.key"), block, 0o600),
		os.WriteFile(c.path("clients.crt"), c.clientCA.pem(), 0o600),
		os.WriteFile(c.path("tokens.csv"), []byte(adminToken+`,admin,1,"system:masters"`+"\n"), 0o600),
	)
}

func (c *ControlPlane) path(name string) string { return filepath.Join(c.dir, name) }

// StartAPIServer starts the API server, again after StopAPIServer, and returns
// once it is ready.
func (c *ControlPlane) StartAPIServer(ctx context.Context) (err error) {
	flags := []string{
		"--etcd-servers=" + c.etcdURL(), "--bind-address=127.0.0.1", "--advertise-address=" + NodeAddress, fmt.Sprintf("--secure-port=%d", 6443+c.shift),
		"--cert-dir=" + c.path("certs"), "--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer=" + Issuer, "--service-account-key-file=" + c.path("sa.key"),
		"--service-account-signing-key-file=" + c.path("sa.key"), "--token-auth-file=" + c.path("tokens.csv"),
		"--client-ca-file=" + c.path("clients.crt"),
		// As on AKS: nodes may do what the node authorizer and NodeRestriction let them.
		"--authorization-mode=Node,RBAC",
		// No controller makes default service accounts.
		"--disable-admission-plugins=ServiceAccount",
	}
	if c.shift == 0 { // tests of a second cluster act as kubelets that have no node
		flags = append(flags, "--enable-admission-plugins=NodeRestriction")
	}
	if c.api, err = StartProgram(filepath.Join(c.bin, "kube-apiserver"), nil, flags...); err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(c.Admin())
	if err != nil {
		return err
	}
	err = poll(ctx, 2*time.Minute, "the API server", func() error {
		select {
		case <-c.api.Done():
			return errors.New("it has ended")
		default:
		}
		_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w; its log:\n%s\netcd's log:\n%s", err, c.api.Log(), c.etcd.Log())
	}
	return nil
}

// Issuer is that of the tokens of service accounts.
const Issuer = "https://testbed"

// IssuerKey is what tokens of service accounts are checked with.
func (c *ControlPlane) IssuerKey() (*rsa.PublicKey, error) {
	text, err := os.ReadFile(c.path("sa.key"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	return &key.PublicKey, nil
}

// StopAPIServer kills the API server; etcd stays.
func (c *ControlPlane) StopAPIServer() error { return c.api.Kill() }

// Stop ends both.
func (c *ControlPlane) Stop() error {
	var errs []error
	for _, p := range []*Program{c.api, c.etcd} {
		if p != nil {
			errs = append(errs, p.Kill())
		}
	}
	return errors.Join(errs...)
}

// Admin is how the cluster's administrator connects.
func (c *ControlPlane) Admin() *rest.Config {
	return &rest.Config{
		Host:        c.apiServerURL(),
		BearerToken: adminToken,
		// The certificate is the API server's own, made at its start.
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
		QPS:             1000, Burst: 1000,
	}
}

// Kubeconfig writes a kubeconfig for a service account, with a token that the
// API server issued to it, and returns its path.
func (c *ControlPlane) Kubeconfig(ctx context.Context, namespace, account string) (string, error) {
	return c.kubeconfig(ctx, namespace, account, account, nil)
}

// PodKubeconfig is Kubeconfig with the token that a pod of that account has: it names the
// pod and its node.
func (c *ControlPlane) PodKubeconfig(ctx context.Context, namespace, account, pod string) (string, error) {
	return c.kubeconfig(ctx, namespace, account, pod, &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod})
}

func (c *ControlPlane) kubeconfig(ctx context.Context, namespace, account, file string, bound *authenticationv1.BoundObjectReference) (string, error) {
	client, err := kubernetes.NewForConfig(c.Admin())
	if err != nil {
		return "", err
	}
	request, err := client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: bound}}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token for service account %s/%s: %w", namespace, account, err)
	}
	path := c.path(namespace + "-" + file + ".kubeconfig")
	config := clientcmdapi.NewConfig()
	config.Clusters["testbed"] = &clientcmdapi.Cluster{Server: c.apiServerURL(), InsecureSkipTLSVerify: true}
	config.AuthInfos[account] = &clientcmdapi.AuthInfo{Token: request.Status.Token}
	config.Contexts["testbed"] = &clientcmdapi.Context{Cluster: "testbed", AuthInfo: account}
	config.CurrentContext = "testbed"
	return path, clientcmd.WriteToFile(*config, path)
}

// APIServer is the kube-apiserver that runs.
func (c *ControlPlane) APIServer() *Program { return c.api }
