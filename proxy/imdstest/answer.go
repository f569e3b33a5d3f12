package imdstest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

const tokenPath = "/metadata/identity/oauth2/token"

// answer is what is sent, unless its fault says otherwise.
type answer struct {
	status int
	body   string
	fault  Fault
}

// ServeHTTP answers as the real service would.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	call := Call{Method: r.Method, Target: r.RequestURI, Path: Straighten(r.RequestURI)}
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		call.From = from.Addr().Unmap()
	}
	if !s.knows(r.RemoteAddr) {
		call.Status = http.StatusMisdirectedRequest
		s.record(call)
		w.Header().Set("Connection", "close")
		w.WriteHeader(call.Status)
		return
	}
	leave, allowed := func() {}, true
	if call.Path == tokenPath {
		leave, allowed = s.arrive()
		defer leave()
	}
	a := throttled
	if allowed {
		a = s.answer(r, &call)
	}
	call.Status = a.status
	s.record(call)
	a.send(w, r, leave)
}

// pause waits for d, or until the client has gone or the server is closed.
func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// refuse is an error in the shape of the identity endpoint.
func refuse(description string) answer {
	return answer{status: http.StatusBadRequest, body: fmt.Sprintf(`{"error":"invalid_request","error_description":%q}`, description)}
}

// throttled is the answer to a request above the limits.
var throttled = answer{status: http.StatusTooManyRequests, body: `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`}

var notFound = answer{status: http.StatusNotFound, body: `{"error":"Not Found"}`}

func (s *Server) answer(r *http.Request, call *Call) answer {
	headers := r.Header.Get("Metadata") == "true"
	query := r.URL.Query()
	switch p := call.Path; {
	case p == tokenPath:
		return s.token(r, query, call)
	case p == "/metadata/identity/getplatformmetadata" && !headers:
		return refuse("Required metadata header not specified")
	case strings.HasPrefix(p, "/metadata/identity") && p != "/metadata/identity/info" && p != "/metadata/identity/issuecredential":
		return notFound
	case p == "/metadata/versions":
		return answer{status: 200, body: `{"apiVersions":["2018-02-01","2021-02-01"]}`}
	case !headers:
		return answer{status: 400, body: `{ "error": "Bad request: . Required metadata header not specified" }`}
	case query.Get("api-version") == "":
		return answer{status: 400, body: `{"error":"Bad request. api-version was not specified in the request. For more information refer to aka.ms/azureimds","newest-versions":["2021-02-01","2020-12-01","2020-10-01"]}`}
	case p == "/metadata/instance" || strings.HasPrefix(p, "/metadata/instance/"):
		return answer{status: 200, body: `{"compute":{"azEnvironment":"AzurePublicCloud","name":"node1"}}`}
	case p == "/metadata/loadbalancer":
		return answer{status: 200, body: `{"loadbalancer":{}}`}
	case p == "/metadata/scheduledevents":
		return answer{status: 200, body: `{"DocumentIncarnation":1,"Events":[]}`}
	case p == "/metadata/attested/document":
		return answer{status: 200, body: `{"encoding":"pkcs7","signature":"the node's own signature"}`}
	case strings.HasPrefix(p, "/metadata/thim/"):
		return answer{status: 200, body: `{"vcekCert":"the processor's own"}`}
	case p == "/metadata/identity/info":
		return answer{status: 200, body: `{"tenantId":"the node's own tenant"}`}
	case p == "/metadata/identity/issuecredential":
		return answer{status: 200, body: `{"certificate":"the node's own certificate"}`}
	default:
		return notFound
	}
}

func (s *Server) token(r *http.Request, query url.Values, call *Call) answer {
	if r.Header.Get("Metadata") != "true" {
		return refuse("Required metadata header not specified")
	}
	if r.Header.Get("X-Forwarded-For") != "" {
		return refuse("X-Forwarded-For header is not allowed")
	}
	if r.Method != http.MethodGet {
		return answer{status: 405, body: `{"error":"Method Not Allowed"}`}
	}
	fault := s.nextFault()
	pause(r.Context(), fault.Delay)
	if fault.Hang || fault.Reset || fault.Status != 0 {
		return answer{status: fault.Status, body: fault.Body, fault: fault}
	}
	for _, required := range []string{"api-version", "resource"} {
		if query.Get(required) == "" {
			return refuse(fmt.Sprintf("Required query variable '%s' is missing", required))
		}
	}
	subject, ok := s.subject(query)
	if !ok {
		return refuse("Identity not found")
	}
	pause(r.Context(), s.latency())
	if s.cfg.Resources != nil && !slices.Contains(s.cfg.Resources, query.Get("resource")) {
		return answer{status: http.StatusBadRequest, body: `{"error":"invalid_resource","error_description":"AADSTS500011: The resource principal was not found in the tenant."}`}
	}
	call.Subject = subject
	fields := s.tokenFields(subject, query.Get("resource"), query.Get("bypass_cache") == "true")
	if fault.Edit != nil {
		fault.Edit(fields)
	}
	body, err := json.Marshal(fields) // a map's keys are written in order
	if err != nil {
		panic(err) // what Edit put there is no JSON
	}
	return answer{status: 200, body: string(body), fault: fault}
}

// subject finds the identity that the query names; none named is the node's.
func (s *Server) subject(query url.Values) (string, bool) {
	client, object := query.Get("client_id"), query.Get("object_id")
	resource := query.Get("msi_res_id")
	if resource == "" {
		resource = query.Get("mi_res_id")
	}
	if client == "" && object == "" && resource == "" {
		return Node, true
	}
	for _, id := range s.cfg.Identities {
		if (client == "" || strings.EqualFold(client, id.ClientID)) &&
			(object == "" || strings.EqualFold(object, id.ObjectID)) &&
			(resource == "" || strings.EqualFold(resource, id.ResourceID)) {
			return id.ClientID, true
		}
	}
	return "", false
}
