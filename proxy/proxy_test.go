package proxy

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// Pods of the test node, each with a loopback address that it dials from.
const (
	bound     = "127.0.0.2" // may use one and two; one is the default
	unbound   = "127.0.0.3"
	excepted  = "127.0.0.4"
	secret    = "127.0.0.5" // bound to an identity of type 1 without a tenant
	alsoBound = "127.0.0.6" // as bound
	stranger  = "127.0.0.9" // no pod
)

const (
	noHeader = `{"error":"invalid_request","error_description":"Required metadata header not specified"}`
	noID     = `{"error":"invalid_request","error_description":"Identity not found"}`
)

// What an answer is made of, TestConformance checks.
func TestTokensComeFromMemory(t *testing.T) {
	w := newWorld(t, nil)
	for range 2 {
		_, body := w.get(bound, tokenURL)
		assert.Equal(t, one.ClientID, tokenSubject(body))
	}
	assert.Equal(t, 1, w.imds.Tokens())
}

// What TestConformance does not ask.
func TestTokenRequests(t *testing.T) {
	w := newWorld(t, nil)
	const base = "/metadata/identity/oauth2/token"
	for name, tc := range map[string]struct {
		raw    string // the request
		from   string // "" means bound
		status int
		body   string // exact; "" means it is not compared
		whose  string // of the token
	}{
		"no header, from nobody":               {request("GET", tokenURL), stranger, 400, noHeader, ""},
		"empty X-Forwarded-For":                {request("GET", tokenURL, "Metadata: true", "X-Forwarded-For:"), "", 400, "", ""},
		"another's client_id":                  {request("GET", tokenURL+"&client_id="+two.ClientID, "Metadata: true"), "", 400, noID, ""},
		"msi_res_id":                           {request("GET", tokenURL+"&msi_res_id="+two.ResourceID, "Metadata: true"), "", 200, "", two.ClientID},
		"client_id twice, once empty":          {request("GET", tokenURL+"&client_id=&client_id="+one.ClientID, "Metadata: true"), "", 400, "", ""},
		"query that cannot be parsed":          {request("GET", tokenURL+"&x=%zz", "Metadata: true"), "", 400, "", ""},
		"semicolon for ampersand":              {request("GET", tokenURL+";client_id=a", "Metadata: true"), "", 400, "", ""},
		"slash at the end, excepted pod":       {request("GET", strings.Replace(tokenURL, "?", "/?", 1), "Metadata: true"), excepted, 200, "", imdstest.Node},
		"unusable service principal":           {request("GET", tokenURL, "Metadata: true"), secret, 400, noID, ""},
		"excepted pod":                         {request("GET", tokenURL, "Metadata: true"), excepted, 200, "", imdstest.Node},
		"excepted pod, its errors are IMDS's":  {request("GET", base+"?api-version=2018-02-01", "Metadata: true"), excepted, 400, `{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`, ""},
		"excepted pod, odd spelling":           {request("GET", strings.Replace(tokenURL, "/identity", "//identity", 1), "Metadata: true"), excepted, 200, "", imdstest.Node},
		"excepted pod, X-Forwarded-For":        {request("GET", "/metadata//identity/oauth2/token?api-version=2018-02-01&resource=r", "Metadata: true", "X-Forwarded-For: 1.2.3.4"), excepted, 400, `{"error":"invalid_request","error_description":"X-Forwarded-For header is not allowed"}`, ""},
		"excepted pod, POST of its own":        {request("POST", "/metadata/scheduledevents?api-version=2020-07-01", "Metadata: true", "Content-Length: 0"), excepted, 200, "", ""},
		"a resource that is not UTF-8":         {request("GET", base+"?api-version=2018-02-01&resource=%ff", "Metadata: true"), "", 400, `{"error":"invalid_request","error_description":"Query variable 'resource' is not UTF-8"}`, ""},
		"a resource that must not be unquoted": {request("GET", base+"?api-version=2018-02-01&resource=%22%2c%22access_token%22%3a%22x", "Metadata: true"), "", 200, "", one.ClientID},
	} {
		t.Run(name, func(t *testing.T) {
			from := tc.from
			if from == "" {
				from = bound
			}
			resp, body := w.send(from, tc.raw)
			assert.Equal(t, tc.status, resp.StatusCode, body)
			if tc.body != "" {
				assert.Equal(t, tc.body, body)
			}
			assert.Equal(t, tc.whose, tokenSubject(body))
			assert.True(t, json.Valid([]byte(body)), body)
			assert.NotContains(t, body, "unreachable")
			assert.Equal(t, strconv.Itoa(len(body)), resp.Header.Get("Content-Length"))
		})
	}
	assert.Len(t, noHeader, 88)
	assert.Len(t, noID, 68)
	assert.NotContains(t, w.log.String(), "eyJ", "no token in the log, at any level")
}

func TestUnknownAddress(t *testing.T) {
	w := newWorld(t, nil)
	resp, body := w.get(stranger, tokenURL)
	assert.Equal(t, 503, resp.StatusCode)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The pod of this address is not known yet"}`, body)
	assert.Zero(t, w.imds.Requests())
}

// TestNoSpellingIsPassedThrough sends every spelling that the real service would
// forgive, and some more. Nobody gets a token by one, and IMDS is not asked.
func TestNoSpellingIsPassedThrough(t *testing.T) {
	w := newWorld(t, nil)
	targets := []string{
		`/metadata\identity\oauth2\token`, `\metadata\identity\oauth2\token`, "/metadata%5cidentity%5coauth2%5ctoken",
		"/metadata%2fidentity/oauth2/token", "/metadata/identity%2Foauth2/token", "/metadata%252fidentity/oauth2/token",
		"/metadata//identity/oauth2/token", "///metadata/identity/oauth2/token", "/metadata/identity//oauth2/token",
		"/./metadata/identity/oauth2/token", "/metadata/./identity/oauth2/token", "/x/../metadata/identity/oauth2/token",
		"/metadata/instance/../identity/oauth2/token", "/metadata/instance/%2e%2e/identity/oauth2/token",
		`/metadata/instance\..\identity\oauth2\token`, "/metadata/instance/..%2fidentity/oauth2/token",
		"/metadata/instance;/../identity/oauth2/token", "/metadata/versions/../identity/oauth2/token",
		"/metadata/identity;x=1/oauth2/token", "/metadata/identity/oauth2/token;x", "/metadata/identity/oauth2/tok%65n",
		"/metadata/Identity/oauth2/token", "/metadata/identity/OAuth2/token", "/metadata/identity/oauth2/Token",
		"/metadata/identity/oauth2/tokenfoo", "/metadata/identity/oauth2/token//", "/metadata/identity/oauth2/token/.", "/metadata/identity/oauth2/token%2f", `/metadata/identity/oauth2/token\`, "/metadata/identity/oauth2/token%20",
		"/metadata/identity/oauth2/token%00", "/metadata/identity/oauth2/token%3f", "/METADATA/instance/../identity/oauth2/token",
		"http://169.254.169.254//metadata//identity/oauth2/token", "http:///metadata/identity/oauth2/token",
		"/metadata/identity", "/metadata/identity/", "/metadata/identity/info", "/metadata/identity/issuecredential",
		"/metadata/identity/getplatformmetadata", "/metadata/attested/document", "/metadata/scheduledevents", "/metadata", "/", "*",
		"/host/token", "/metadata/Instance", "///metadata/versions", "/METADATA/versions", "/metadata/versions/", "/metadata/instance/a//b", "/metadata/instance/a;b", "/metadata/instance/a.b", "/metadata/instance/a%2fb",
	}
	for _, target := range targets {
		for _, method := range []string{"GET", "POST", "HEAD", "OPTIONS"} {
			sep := "?"
			if strings.HasSuffix(target, "*") {
				sep = ""
			}
			query := ""
			if sep != "" {
				query = "?api-version=2018-02-01&resource=https://vault.azure.net/"
			}
			for _, from := range []string{unbound, bound} {
				resp, body := w.send(from, request(method, target+query, "Metadata: true", "Content-Length: 0"))
				assert.GreaterOrEqual(t, resp.StatusCode, 400, "%s %s: %s", method, target, body)
				assert.Empty(t, tokenSubject(body), "%s %s", method, target)
			}
		}
	}
	assert.Empty(t, w.imds.Calls(), "nothing was passed through")
}

func TestPublicPaths(t *testing.T) {
	w := newWorld(t, nil)
	for target, want := range map[string]string{
		"/metadata/instance?api-version=2021-02-01":              `{"compute":{"azEnvironment":"AzurePublicCloud","name":"node1"}}`,
		"/metadata/instance/compute/name?api-version=2021-02-01": `{"compute":{"azEnvironment":"AzurePublicCloud","name":"node1"}}`,
		"/metadata/instance/?api-version=2021-02-01":             `{"compute":{"azEnvironment":"AzurePublicCloud","name":"node1"}}`,
		"/metadata/versions":                                     `{"apiVersions":["2018-02-01","2021-02-01"]}`,
		"/metadata/loadbalancer?api-version=2021-02-01":          `{"loadbalancer":{}}`,
	} {
		resp, body := w.get(unbound, target)
		assert.Equal(t, 200, resp.StatusCode, target)
		assert.Equal(t, want, body, target)
	}
	resp, _ := w.send(bound, request("POST", "/metadata/instance?api-version=2021-02-01", "Metadata: true", "Content-Length: 0"))
	assert.Equal(t, 405, resp.StatusCode)
}

func TestPublicPathsTakePlainGETsOnly(t *testing.T) {
	w := newWorld(t, nil)
	for name, raw := range map[string]string{
		"upgrade":      request("GET", "/metadata/versions", "Connection: Upgrade", "Upgrade: h2c"),
		"body":         request("GET", "/metadata/versions", "Content-Length: 1") + "x",
		"chunked body": request("GET", "/metadata/versions", "Transfer-Encoding: chunked") + "0\r\n\r\n",
	} {
		resp, body := w.send(unbound, raw)
		assert.Equal(t, 400, resp.StatusCode, name)
		assert.JSONEq(t, `{"error":"invalid_request","error_description":"Requests with a body or an upgrade are not served"}`, body, name)
	}
	assert.Zero(t, w.imds.Requests())
}

func TestHalfClosedClient(t *testing.T) {
	w := newWorld(t, nil)
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(stranger), 0))}
	conn, err := dialer.DialContext(t.Context(), "tcp", w.addr)
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, request("GET", tokenURL, "Metadata: true"))
	require.NoError(t, err)
	require.NoError(t, conn.(*net.TCPConn).CloseWrite())
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 503, resp.StatusCode, "never an empty 200")
}

func TestBlockInstanceMetadata(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.BlockInstanceMetadata = true })
	resp, _ := w.get(bound, "/metadata/instance?api-version=2021-02-01")
	assert.Equal(t, 403, resp.StatusCode)
	resp, _ = w.get(bound, "/metadata/versions")
	assert.Equal(t, 200, resp.StatusCode)
	resp, _ = w.get(excepted, "/metadata/instance?api-version=2021-02-01")
	assert.Equal(t, 200, resp.StatusCode)
}

func TestMetadataHeaderOptional(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MetadataHeaderOptional = true })
	_, body := w.send(bound, request("GET", tokenURL))
	assert.Equal(t, one.ClientID, tokenSubject(body))
}

// A client of App Service names its identity in that service's words, and never gets
// another's token for them.
func TestAppServiceSelectors(t *testing.T) {
	for name, tc := range map[string]struct {
		query    string
		optional string // whose token where the header is optional; "" if none
		says     string // otherwise
	}{
		"another identity of the pod's": {"&clientid=" + one.ClientID, one.ClientID, "use 'client_id'"},
		"in capitals":                   {"&ClientID=" + strings.ToUpper(one.ClientID), one.ClientID, "use 'client_id'"},
		"not the pod's":                 {"&clientid=" + "00000000-dead-4000-8000-000000000000", "", "use 'client_id'"},
		"the principal":                 {"&principal_id=" + one.ObjectID, "", "use 'client_id'"},
		"beside client_id":              {"&clientid=" + one.ClientID + "&client_id=" + one.ClientID, "", "use 'client_id'"},
		"beside mi_res_id":              {"&clientid=" + one.ClientID + "&mi_res_id=" + two.ResourceID, "", "use 'client_id'"},
		"twice":                         {"&clientid=" + one.ClientID + "&clientid=" + one.ClientID, "", "more than once"},
		"with a space":                  {"&clientid=%20", "", "use 'client_id'"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, optional := range []bool{true, false} {
				w := newWorld(t, func(c *Config) { c.MetadataHeaderOptional = optional })
				resp, body := w.get(bound, tokenURL+tc.query)
				if optional {
					assert.Equal(t, tc.optional, tokenSubject(body), body)
					if tc.optional == "" {
						assert.Equal(t, 400, resp.StatusCode, body)
					}
					continue
				}
				assert.Equal(t, 400, resp.StatusCode, body)
				assert.Contains(t, body, tc.says)
				assert.Zero(t, w.imds.Requests())
			}
		})
	}
}

func TestUpstreamErrors(t *testing.T) {
	w := newWorld(t, nil)
	fault := func(f imdstest.Fault) (*http.Response, string) {
		w.imds.Inject(f)
		return w.get(bound, tokenURL+"/"+fmt.Sprint(w.imds.Requests())) // a resource that is not in memory
	}
	resp, body := fault(imdstest.Fault{Status: 400, Body: `{"error":"invalid_resource","error_description":"AADSTS50001: The resource principal named \"x\" was not found"}`})
	assert.Equal(t, 400, resp.StatusCode)
	assert.Equal(t, `{"error":"invalid_resource","error_description":"AADSTS50001: The resource principal named \"x\" was not found"}`, body)

	resp, body = fault(imdstest.Fault{Status: 503, RetryAfter: "60"})
	assert.Equal(t, 503, resp.StatusCode)
	assert.Equal(t, "60", resp.Header.Get("Retry-After"))
	assert.True(t, json.Valid([]byte(body)))

	resp, body = fault(imdstest.Fault{Status: 200, Body: `{"access_token":"eyJ-secret","expires_on":"1"}`})
	assert.Equal(t, 503, resp.StatusCode)
	assert.NotContains(t, body+w.log.String(), "eyJ-secret")

	resp, _ = fault(imdstest.Fault{Status: 404, Body: "<html>"})
	assert.Equal(t, 200, resp.StatusCode, "tried again behind the pod's back")

	resp, body = fault(imdstest.Fault{Status: 429, RetryAfter: "7", Body: `{}`})
	assert.Equal(t, 429, resp.StatusCode)
	assert.Equal(t, "7", resp.Header.Get("Retry-After"))
	assert.Equal(t, `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`, body)
}

func TestUntrustedSource(t *testing.T) {
	w := newWorld(t, func(cfg *Config) {
		cfg.CheckSource = func(addr netip.Addr, _ int, _ *podresolver.Pod) error {
			if addr == netip.MustParseAddr(bound) || addr == netip.MustParseAddr(excepted) {
				return errors.New("bridge cbr0")
			}
			return nil
		}
	})
	for _, from := range []string{bound, excepted} {
		for _, target := range []string{tokenURL, "/metadata/identity/info?api-version=2018-02-01"} {
			resp, body := w.get(from, target)
			assert.Equal(t, 400, resp.StatusCode, "SDKs stop at once")
			assert.Contains(t, body, "does not show which pod is calling")
			assert.NotContains(t, body, "cbr0", "that is for the log")
		}
	}
	assert.Contains(t, w.log.String(), "pod shop/bound: its source address cannot be trusted: bridge cbr0")
	assert.Zero(t, w.imds.Requests())
	resp, _ := w.get(unbound, tokenURL)
	assert.Equal(t, 400, resp.StatusCode)
	resp, _ = w.get(bound, "/metadata/instance?api-version=2021-02-01")
	assert.Equal(t, 200, resp.StatusCode, "the same for everybody")
}

func TestPodsOnly(t *testing.T) {
	w := newWorld(t, func(cfg *Config) { cfg.PodsOnly = true })
	const instance = "/metadata/instance?api-version=2021-02-01"
	resp, _ := w.get(bound, instance)
	assert.Equal(t, 200, resp.StatusCode)
	asked := w.imds.Requests()
	for _, target := range []string{instance, "/metadata/versions", tokenURL, "/metadata/attested/document"} {
		resp, _ := w.get(stranger, target)
		assert.Equal(t, 503, resp.StatusCode, target)
	}
	assert.Equal(t, asked, w.imds.Requests())
}

// A name in capitals that were ignored would mean the default identity.
func TestParameterNamesAreCaseInsensitive(t *testing.T) {
	w := newWorld(t, nil)
	resp, body := w.get(bound, tokenURL+"&CLIENT_ID=not-bound")
	assert.Equal(t, 400, resp.StatusCode)
	assert.Equal(t, noID, body)
	for _, twice := range []string{"&client_id=" + one.ClientID + "&Client_Id=" + one.ClientID, "&CLIENT_ID=&Client_Id=" + one.ClientID} {
		_, body = w.get(bound, tokenURL+twice)
		assert.Contains(t, body, "Query variable 'client_id' was given more than once", twice)
	}
}

// A metadata security proxy's refusal is not IMDS's: the pod may come back, and the log says
// what to allow.
func TestPassThroughRefusedByMetadataProxy(t *testing.T) {
	w := newWorld(t, nil)
	w.imds.Inject(imdstest.Fault{Status: 403})
	resp, body := w.get(excepted, tokenURL)
	assert.Equal(t, 503, resp.StatusCode)
	assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The metadata service is not available"}`, body)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.Contains(t, w.log.String(), "allow this agent's process GET /metadata/identity/oauth2/token in the InVMAccessControlProfile")

	resp, body = w.get(excepted, tokenURL)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, imdstest.Node, tokenSubject(body))
	w.imds.ForgetConnections()
	resp, _ = w.get(bound, "/metadata/versions")
	assert.Equal(t, 200, resp.StatusCode)
}
