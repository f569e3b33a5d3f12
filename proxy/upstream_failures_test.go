package proxy

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// logLine is the one line in the log that contains text.
func (w *world) logLine(text string) string {
	w.t.Helper()
	var found []string
	for line := range strings.Lines(w.log.String()) {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	require.Len(w.t, found, 1, "%s", text)
	return found[0]
}

// IMDS and the agent have the same words for two faults. The pod is told the same, since
// SDKs compare them; the operator is not.
func TestIdentityUnknownToIMDS(t *testing.T) {
	const hint = "bound, but IMDS does not know this identity on this node: assign it to the scale set (VM) or correct the AzureIdentity"
	w := newWorld(t, nil)
	w.imds.Inject(imdstest.Fault{Status: 400, Body: `{"error":"invalid_request","error_description":"Identity not found"}`})
	unknown, unknownBody := w.get(bound, tokenURL)
	none, noneBody := w.get(unbound, tokenURL)
	assert.Equal(t, 400, unknown.StatusCode)
	assert.Equal(t, none.StatusCode, unknown.StatusCode)
	assert.JSONEq(t, noneBody, unknownBody)
	line := w.logLine("pod shop/bound")
	assert.Contains(t, line, "identity shop/one")
	assert.Contains(t, line, hint)
	assert.NotContains(t, w.logLine("pod shop/unbound"), hint)

	w.imds.Inject(imdstest.Fault{Status: 400, Body: `{"error":"invalid_resource","error_description":"AADSTS500011"}`})
	w.get(alsoBound, tokenURL+"nowhere")
	assert.NotContains(t, w.logLine("pod shop/also-bound"), hint, "nor does another refusal")
}

func TestTokenRefusedByMetadataProxy(t *testing.T) {
	w := newWorld(t, nil)
	w.imds.Inject(imdstest.Fault{Status: 403})
	resp, body := w.get(bound, tokenURL)
	assert.Equal(t, 503, resp.StatusCode)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The metadata service is not available"}`, body)
	assert.Contains(t, w.logLine("pod shop/bound"), "allow this agent's process GET /metadata/identity/oauth2/token in the InVMAccessControlProfile for IMDS")
}
