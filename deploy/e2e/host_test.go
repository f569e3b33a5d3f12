//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const hostToken = "/host/token/?resource=" + vault

// asHost asks as the Secrets Store CSI driver's provider does: a root process of the node,
// on behalf of a pod that has no address yet.
func asHost(t *testing.T, pod string) (status int, body []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:2579"+hostToken, nil)
	require.NoError(t, err)
	req.Header.Set("podns", "shop")
	req.Header.Set("podname", pod)
	client := &http.Client{Timeout: patience}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, body
}

func TestARootProcessGetsTheTokenOfAPodWithoutAnAddress(t *testing.T) {
	s := begin(t)
	s.object("shop", "mounting", "", map[string]string{"aadpodidbinding": "cart"})
	s.agent()
	status, body := asHost(t, "mounting")
	require.Equal(t, http.StatusOK, status, "%s", body)
	var answer struct {
		Token struct {
			Text string `json:"access_token"`
		} `json:"token"`
		ClientID string `json:"clientid"`
	}
	require.NoError(t, json.Unmarshal(body, &answer))
	assert.Equal(t, cart.ClientID, answer.ClientID)
	assert.Equal(t, cart.ClientID, imdstest.Subject(answer.Token.Text))

	status, body = asHost(t, "nobody-knows-it")
	assert.Equal(t, http.StatusServiceUnavailable, status, "%s", body)

	// Another user of the node, from the same namespace.
	raw := fmt.Sprintf(`exec 3<>/dev/tcp/127.0.0.1/2579; printf 'GET %s HTTP/1.1\r\nHost: h\r\npodns: shop\r\npodname: mounting\r\nConnection: close\r\n\r\n' >&3; cat <&3`, hostToken)
	cmd := exec.CommandContext(t.Context(), "bash", "-c", raw)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Contains(t, string(out), "HTTP/1.1 403 ")
	assert.NotContains(t, string(out), "access_token")

	// A pod does not get there: neither by the metadata service's address nor by the node's.
	p := s.pod("curious", "10.244.0.51", testbed.Ptp, "cart")
	assert.Equal(t, http.StatusNotFound, p.get("http://"+testbed.MetadataAddress+hostToken, patience).status)
	assert.Zero(t, p.get("http://10.244.0.1:2579"+hostToken, 5*time.Second).status)
}
