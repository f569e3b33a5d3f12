package proxy

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestSensitivePathsAreForPodsWhereAllowed(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = Sensitive })
	for _, path := range Sensitive {
		resp, _ := w.get(bound, path+"?api-version=2021-02-01")
		assert.Equal(t, 200, resp.StatusCode, path)
		resp, _ = w.get(bound, "/"+path+"?api-version=2021-02-01")
		assert.Equal(t, 200, resp.StatusCode, "two slashes, %s", path)
		resp, _ = w.get(stranger, path+"?api-version=2021-02-01")
		assert.Equal(t, 503, resp.StatusCode, "not a pod that is known, %s", path)
		for _, odd := range []string{path + "/", path + "/x", path + "%2f", "/metadata/x/.." + path[len("/metadata"):], "/METADATA" + path[len("/metadata"):]} {
			resp, _ = w.get(bound, odd+"?api-version=2021-02-01")
			assert.Equal(t, 404, resp.StatusCode, odd)
		}
	}
	post := func(path string) int {
		resp, _ := w.send(bound, request("POST", path+"?api-version=2020-07-01", "Metadata: true", "Content-Length: 2")+"{}")
		return resp.StatusCode
	}
	assert.Equal(t, 200, post("/metadata/scheduledevents"))
	assert.Equal(t, 405, post("/metadata/attested/document"))
	assert.Equal(t, 405, post("/metadata/identity/info"))
}

func TestEachSensitivePathIsAllowedByItself(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = []string{"/metadata/attested/document"} })
	for path, want := range map[string]int{"/metadata/attested/document": 200, "/metadata/scheduledevents": 404, "/metadata/identity/info": 404} {
		resp, _ := w.get(bound, path+"?api-version=2021-02-01")
		assert.Equal(t, want, resp.StatusCode, path)
	}
}

func TestAnApprovalIsNoUpgrade(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = Sensitive })
	resp, _ := w.send(bound, request("POST", "/metadata/scheduledevents?api-version=2020-07-01", "Metadata: true", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 2")+"{}")
	assert.Equal(t, 400, resp.StatusCode)
	assert.Zero(t, w.imds.Requests())
}
