package proxy

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestSensitivePaths(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = AllowablePaths() })
	for _, path := range allowable[:3] {
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

func TestSensitivePathsAreAllowedOneByOne(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = []string{"/metadata/attested/document"} })
	for path, want := range map[string]int{"/metadata/attested/document": 200, "/metadata/scheduledevents": 404, "/metadata/identity/info": 404} {
		resp, _ := w.get(bound, path+"?api-version=2021-02-01")
		assert.Equal(t, want, resp.StatusCode, path)
	}
}

func TestApprovalWithUpgrade(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = AllowablePaths() })
	resp, _ := w.send(bound, request("POST", "/metadata/scheduledevents?api-version=2020-07-01", "Metadata: true", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 2")+"{}")
	assert.Equal(t, 400, resp.StatusCode)
	assert.Zero(t, w.imds.Requests())
}

// THIM is a folder: what is below it, made of plain names, and nothing beside it.
func TestTHIM(t *testing.T) {
	const certification = "/metadata/THIM/amd/certification"
	for _, allowed := range []bool{false, true} {
		w := newWorld(t, func(c *Config) {
			if allowed {
				c.Allow = []string{"/metadata/THIM"}
			}
		})
		for target, want := range map[string]int{
			certification: 200, "/" + certification: 200, certification + "?platformId=a.b%2f..": 200, "/metadata/THIM/sgx/certification/v4/qe/identity": 200,
			"/metadata/THIM": 404, "/metadata/thim/amd/certification": 404, "/METADATA/THIM/amd/certification": 404, "/metadata/THIMx/amd": 404,
			"/metadata/THIM//amd": 404, "/metadata/THIM/../identity/oauth2/token": 404, "/metadata/THIM/%2e%2e/identity/info": 404,
			`/metadata/THIM/..\identity`: 404, "/metadata/THIM/amd;x": 404, "/metadata/THIM/amd%2fx": 404, "/metadata/THIM/amd/x.y": 404,
			"/metadata/attested/document": 404,
		} {
			if !allowed {
				want = 404
			}
			sep := "?"
			if strings.Contains(target, "?") {
				sep = "&"
			}
			resp, body := w.get(unbound, target+sep+"api-version=1")
			assert.Equal(t, want, resp.StatusCode, "%s: %s", target, body)
		}
		resp, _ := w.send(unbound, request("POST", certification, "Metadata: true", "Content-Length: 0"))
		assert.Equal(t, map[bool]int{false: 404, true: 405}[allowed], resp.StatusCode)
		resp, _ = w.get(excepted, certification+"?api-version=1")
		assert.Equal(t, 200, resp.StatusCode)
		resp, _ = w.get(stranger, certification)
		assert.Equal(t, 503, resp.StatusCode, "not a pod that is known")
	}
}

func TestInstanceMetadataNamespaces(t *testing.T) {
	const target = "/metadata/instance?api-version=2021-02-01"
	for namespace, want := range map[string]int{"shop": 200, "other": 403} {
		w := newWorld(t, func(c *Config) {
			c.BlockInstanceMetadata, c.InstanceMetadataNamespaces = true, []string{"kube-system", namespace}
		})
		resp, _ := w.get(unbound, target)
		assert.Equal(t, want, resp.StatusCode, namespace)
		resp, _ = w.get(excepted, target)
		assert.Equal(t, 200, resp.StatusCode)
		resp, _ = w.get(stranger, target)
		assert.Equal(t, 503, resp.StatusCode, "not a pod that is known")
		resp, _ = w.send(unbound, request("POST", target, "Metadata: true", "Content-Length: 0"))
		assert.Equal(t, map[int]int{200: 405, 403: 403}[want], resp.StatusCode)
	}
}
