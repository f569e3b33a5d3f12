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
	"time"

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

func TestATokenAnswer(t *testing.T) {
	w := newWorld(t, nil)
	begin := time.Now().Unix()
	resp, body := w.get(bound, tokenURL)
	end := time.Now().Unix()
	require.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, "application/json; charset=utf-8", resp.Header.Get("Content-Type"))
	assert.Equal(t, strconv.Itoa(len(body)), resp.Header.Get("Content-Length"))

	var fields map[string]string // every one a string, or this fails
	require.NoError(t, json.Unmarshal([]byte(body), &fields))
	assert.Len(t, fields, 8)
	assert.Equal(t, one.ClientID, fields["client_id"])
	assert.Equal(t, "https://vault.azure.net/", fields["resource"])
	assert.Equal(t, "Bearer", fields["token_type"])
	on, err := strconv.ParseInt(fields["expires_on"], 10, 64)
	require.NoError(t, err)
	in, err := strconv.ParseInt(fields["expires_in"], 10, 64)
	require.NoError(t, err)
	assert.GreaterOrEqual(t, on-begin, in)
	assert.LessOrEqual(t, on-end, in)
	for _, name := range []string{"ext_expires_in", "not_before"} {
		_, err = strconv.ParseInt(fields[name], 10, 64)
		require.NoError(t, err, name)
	}
	order := -1
	for _, name := range []string{"access_token", "client_id", "expires_in", "expires_on", "ext_expires_in", "not_before", "resource", "token_type"} {
		at := strings.Index(body, `"`+name+`":`)
		assert.Greater(t, at, order, "the order of %s", name)
		order = at
	}

	assert.Equal(t, 1, w.imds.Tokens())
	_, again := w.get(bound, tokenURL)
	assert.Equal(t, one.ClientID, whose(again))
	assert.Equal(t, 1, w.imds.Tokens(), "the second came from memory")
}

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
		"no header":                          {request("GET", tokenURL), "", 400, noHeader, ""},
		"no header, from nobody":             {request("GET", tokenURL), stranger, 400, noHeader, ""},
		"bare probe":                         {request("GET", base), "", 400, noHeader, ""},
		"probe with api-version":             {request("GET", base+"?api-version=2018-02-01"), "", 400, noHeader, ""},
		"header True":                        {request("GET", tokenURL, "Metadata: True"), "", 400, noHeader, ""},
		"header twice":                       {request("GET", tokenURL, "Metadata: true", "Metadata: true"), "", 400, noHeader, ""},
		"header name in lower case":          {request("GET", tokenURL, "metadata: true"), "", 200, "", one.ClientID},
		"X-Forwarded-For":                    {request("GET", tokenURL, "Metadata: true", "X-Forwarded-For: 1.2.3.4"), "", 400, "", ""},
		"empty X-Forwarded-For":              {request("GET", tokenURL, "Metadata: true", "X-Forwarded-For:"), "", 400, "", ""},
		"no resource":                        {request("GET", base+"?api-version=2018-02-01", "Metadata: true"), "", 400, `{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`, ""},
		"no api-version":                     {request("GET", base+"?resource=r", "Metadata: true"), "", 400, "", ""},
		"client_id":                          {request("GET", tokenURL+"&client_id="+one.ClientID, "Metadata: true"), "", 200, "", one.ClientID},
		"client_id in capitals":              {request("GET", tokenURL+"&client_id="+strings.ToUpper(one.ClientID), "Metadata: true"), "", 200, "", one.ClientID},
		"unknown client_id":                  {request("GET", tokenURL+"&client_id=other", "Metadata: true"), "", 400, noID, ""},
		"another's client_id":                {request("GET", tokenURL+"&client_id="+two.ClientID, "Metadata: true"), "", 400, noID, ""},
		"object_id":                          {request("GET", tokenURL+"&object_id=o1", "Metadata: true"), "", 400, noID, ""},
		"msi_res_id":                         {request("GET", tokenURL+"&msi_res_id="+two.ResourceID, "Metadata: true"), "", 200, "", two.ClientID},
		"mi_res_id in capitals":              {request("GET", tokenURL+"&mi_res_id="+strings.ToUpper(two.ResourceID), "Metadata: true"), "", 200, "", two.ClientID},
		"msi-res-id without header":          {request("GET", tokenURL+"&msi-res-id=x"), "", 400, noHeader, ""},
		"two selectors":                      {request("GET", tokenURL+"&client_id="+one.ClientID+"&msi_res_id="+one.ResourceID, "Metadata: true"), "", 400, "", ""},
		"both resource IDs":                  {request("GET", tokenURL+"&mi_res_id="+two.ResourceID+"&msi_res_id="+two.ResourceID, "Metadata: true"), "", 400, "", ""},
		"resource twice":                     {request("GET", tokenURL+"&resource=x", "Metadata: true"), "", 400, "", ""},
		"client_id twice":                    {request("GET", tokenURL+"&client_id=a&client_id=b", "Metadata: true"), "", 400, "", ""},
		"client_id twice, once empty":        {request("GET", tokenURL+"&client_id=&client_id="+one.ClientID, "Metadata: true"), "", 400, "", ""},
		"query that cannot be parsed":        {request("GET", tokenURL+"&x=%zz", "Metadata: true"), "", 400, "", ""},
		"semicolon for ampersand":            {request("GET", tokenURL+";client_id=a", "Metadata: true"), "", 400, "", ""},
		"unknown parameters and SDK headers": {request("GET", tokenURL+"&xms_cc=cp1&foo=bar", "Metadata: true", "x-client-SKU: MSAL.x", "Content-Type: application/x-www-form-urlencoded"), "", 200, "", one.ClientID},
		"POST":                               {request("POST", tokenURL, "Metadata: true", "Content-Length: 0"), "", 405, "", ""},
		"PUT":                                {request("PUT", tokenURL, "Metadata: true", "Content-Length: 0"), "", 405, "", ""},
		"DELETE":                             {request("DELETE", tokenURL, "Metadata: true"), "", 405, "", ""},
		"METADATA":                           {request("GET", strings.Replace(tokenURL, "metadata", "METADATA", 1), "Metadata: true"), "", 200, "", one.ClientID},
		"doubled slash":                      {request("GET", "/"+tokenURL, "Metadata: true"), "", 200, "", one.ClientID},
		"slash at the end":                   {request("GET", strings.Replace(tokenURL, "?", "/?", 1), "Metadata: true"), "", 200, "", one.ClientID},
		"slash at the end, doubled one, no header": {request("GET", "/"+base+"/"), "", 400, noHeader, ""},
		"slash at the end, another's client_id":    {request("GET", strings.Replace(tokenURL, "?", "/?", 1)+"&client_id="+two.ClientID, "Metadata: true"), "", 400, noID, ""},
		"slash at the end, no binding":             {request("GET", strings.Replace(tokenURL, "?", "/?", 1), "Metadata: true"), unbound, 400, noID, ""},
		"slash at the end, excepted pod":           {request("GET", strings.Replace(tokenURL, "?", "/?", 1), "Metadata: true"), excepted, 200, "", imdstest.Node},
		"absolute form, foreign host":              {request("GET", "http://example.com"+tokenURL, "Metadata: true"), "", 200, "", one.ClientID},
		"absolute form of a pod without any":       {request("GET", "http://example.com"+tokenURL, "Metadata: true"), unbound, 400, noID, ""},
		"no binding":                               {request("GET", tokenURL, "Metadata: true"), unbound, 400, noID, ""},
		"unusable service principal":               {request("GET", tokenURL, "Metadata: true"), secret, 400, noID, ""},
		"excepted pod":                             {request("GET", tokenURL, "Metadata: true"), excepted, 200, "", imdstest.Node},
		"excepted pod, its errors are IMDS's":      {request("GET", base+"?api-version=2018-02-01", "Metadata: true"), excepted, 400, `{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`, ""},
		"excepted pod, odd spelling":               {request("GET", strings.Replace(tokenURL, "/identity", "//identity", 1), "Metadata: true"), excepted, 200, "", imdstest.Node},
		"excepted pod, X-Forwarded-For":            {request("GET", "/metadata//identity/oauth2/token?api-version=2018-02-01&resource=r", "Metadata: true", "X-Forwarded-For: 1.2.3.4"), excepted, 400, `{"error":"invalid_request","error_description":"X-Forwarded-For header is not allowed"}`, ""},
		"excepted pod, POST of its own":            {request("POST", "/metadata/scheduledevents?api-version=2020-07-01", "Metadata: true", "Content-Length: 0"), excepted, 200, "", ""},
		"a resource that is not UTF-8":             {request("GET", base+"?api-version=2018-02-01&resource=%ff", "Metadata: true"), "", 400, `{"error":"invalid_request","error_description":"Query variable 'resource' is not UTF-8"}`, ""},
		"a resource that must not be unquoted":     {request("GET", base+"?api-version=2018-02-01&resource=%22%2c%22access_token%22%3a%22x", "Metadata: true"), "", 200, "", one.ClientID},
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
			assert.Equal(t, tc.whose, whose(body))
			assert.True(t, json.Valid([]byte(body)), body)
			assert.NotContains(t, body, "unreachable")
			assert.Equal(t, strconv.Itoa(len(body)), resp.Header.Get("Content-Length"))
		})
	}
	assert.Len(t, noHeader, 88)
	assert.Len(t, noID, 68)
	assert.NotContains(t, w.log.String(), "eyJ", "no token in the log, at any level")
}

func TestAnAddressNotKnownYetIsToldToComeBack(t *testing.T) {
	w := newWorld(t, nil)
	resp, body := w.get(stranger, tokenURL)
	assert.Equal(t, 503, resp.StatusCode)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The pod of this address is not known yet"}`, body)
	assert.Zero(t, w.imds.Requests())
}

// TestNoSpellingIsPassedOn sends every spelling that the real service would
// forgive, and some more. Nobody gets a token by one, and IMDS is not asked.
func TestNoSpellingIsPassedOn(t *testing.T) {
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
				assert.Empty(t, whose(body), "%s %s", method, target)
			}
		}
	}
	assert.Empty(t, w.imds.Calls(), "nothing was passed through")

	resp, body := w.get(bound, "/metadata/identity")
	assert.Equal(t, 404, resp.StatusCode)
	assert.Equal(t, `{"error":"Not Found"}`, body)
	resp, _ = w.send(bound, request("GET", "/metadata/identity/getplatformmetadata?cred-api-version=2.0"))
	assert.Equal(t, 404, resp.StatusCode, "a 400 would mean IMDSv2 to MSAL.NET")
}

func TestWhatIsPassedOn(t *testing.T) {
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
	resp, body := w.get(bound, "/metadata/instance")
	assert.Equal(t, 400, resp.StatusCode)
	assert.Contains(t, body, "newest-versions")
	resp, body = w.send(bound, request("GET", "/metadata/instance?api-version=2021-02-01"))
	assert.Equal(t, 400, resp.StatusCode)
	assert.Equal(t, `{ "error": "Bad request: . Required metadata header not specified" }`, body)
	resp, _ = w.send(bound, request("POST", "/metadata/instance?api-version=2021-02-01", "Metadata: true", "Content-Length: 0"))
	assert.Equal(t, 405, resp.StatusCode)
}

func TestWhatIsPassedOnIsAPlainGET(t *testing.T) {
	w := newWorld(t, nil)
	for name, raw := range map[string]string{
		"upgrade":      request("GET", "/metadata/versions", "Connection: Upgrade", "Upgrade: h2c"),
		"body":         request("GET", "/metadata/versions", "Content-Length: 1") + "x",
		"chunked body": request("GET", "/metadata/versions", "Transfer-Encoding: chunked") + "0\r\n\r\n",
	} {
		resp, body := w.send(unbound, raw)
		assert.Equal(t, 400, resp.StatusCode, name)
		assert.JSONEq(t, `{"error":"invalid_request","error_description":"Requests with a body or for an upgrade are not served"}`, body, name)
	}
	assert.Zero(t, w.imds.Requests())
}

func TestAClientThatHasFinishedSendingIsAnsweredAllTheSame(t *testing.T) {
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
	assert.Equal(t, one.ClientID, whose(body))
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
					assert.Equal(t, tc.optional, whose(body), body)
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

func TestUpstreamErrorsReachThePod(t *testing.T) {
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

// blockingIMDS answers once it is released, and says when it has been asked.
type blockingIMDS struct{ asked, release chan struct{} }

func (b blockingIMDS) RoundTrip(r *http.Request) (*http.Response, error) {
	close(b.asked)
	<-b.release
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("{}")), Request: r}, nil
}

func TestAPodWhoseAddressMayBeAnothersIsRefusedWhateverItIs(t *testing.T) {
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
			assert.Contains(t, body, "does not tell which pod is calling")
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
func TestParametersHaveNoCase(t *testing.T) {
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
func TestAProxyBeforeIMDSRefusesWhatIsPassedThrough(t *testing.T) {
	w := newWorld(t, nil)
	w.imds.Inject(imdstest.Fault{Status: 403})
	resp, body := w.get(excepted, tokenURL)
	assert.Equal(t, 503, resp.StatusCode)
	assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The metadata service is not available"}`, body)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.Contains(t, w.log.String(), "allow this agent's process GET /metadata/identity/oauth2/token in the InVMAccessControlProfile")

	resp, body = w.get(excepted, tokenURL)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, imdstest.Node, whose(body))
	w.imds.ForgetConnections()
	resp, _ = w.get(bound, "/metadata/versions")
	assert.Equal(t, 200, resp.StatusCode)
}
