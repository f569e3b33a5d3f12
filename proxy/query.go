package proxy

import (
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/podidentity/nmi/podresolver"
)

// tokenRequest is a parsed query.
type tokenRequest struct {
	resource string
	selector podresolver.Selector
	// bypassCache asks for a new token, refreshSHA256 for another than the one with this
	// SHA-256, in hex.
	bypassCache   bool
	refreshSHA256 string
}

// query is the parameters that mean something here. Others are ignored: newer SDKs send some.
type query struct {
	apiVersion, resource   string
	clientID, objectID     string
	msiResID, miResID      string // the name that IMDS documents, and one that it takes as well
	bypassCache, toRefresh string
	// App Service's names of the client and the object ID (Microsoft, "How to use managed
	// identities for App Service and Azure Functions", REST endpoint reference, API versions
	// 2017-09-01 and 2019-08-01).
	appClientID, appPrincipalID string
}

// field returns where the value of a parameter goes; nil if it is to be ignored.
func (q *query) field(name string) *string {
	switch name {
	case "api-version":
		return &q.apiVersion
	case "resource":
		return &q.resource
	case "client_id":
		return &q.clientID
	case "object_id":
		return &q.objectID
	case "msi_res_id":
		return &q.msiResID
	case "mi_res_id":
		return &q.miResID
	case "bypass_cache":
		return &q.bypassCache
	case "token_sha256_to_refresh": // sent by MSAL when a service has rejected a token
		return &q.toRefresh
	case "clientid":
		return &q.appClientID
	case "principal_id":
		return &q.appPrincipalID
	default:
		return nil
	}
}

// parseQuery parses a query. The names of parameters have no case: client_id in capitals,
// if it were ignored, would mean the default identity. What could be read in two ways is
// refused: a parameter that is repeated, a bad escape, and a semicolon, which separated
// parameters once (W3C, HTML 4.01, appendix B.2.2).
func parseQuery(raw string) (q query, err error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return query{}, badRequest("The query cannot be parsed: encode the parameters")
	}
	for given, all := range values {
		name := strings.ToLower(given)
		field := q.field(name)
		if field == nil {
			continue
		}
		if len(all) > 1 || name != given && values.Has(name) {
			return query{}, badRequest("Query variable '" + name + "' was given more than once")
		}
		*field = all[0]
		if name != given {
			values[name] = all // so that another spelling is a repetition
		}
	}
	return q, nil
}

// queryRules are the differences between the queries of the endpoints.
type queryRules struct {
	versionOptional bool // api-version may be missing, as at the old NMI's /host/token
	// appServiceNames accepts App Service's names of IDs. Otherwise they are refused: IMDS
	// ignores them and returns a token of the default identity, which was not asked for.
	appServiceNames bool
}

// parseTokenRequest parses the query of a request for a token. It refuses queries without a
// required parameter, and those that could be read in two ways: no parameter may be repeated,
// and at most one may name an identity.
func parseTokenRequest(r *http.Request, rules queryRules) (tokenRequest, error) {
	if r.Method != http.MethodGet {
		return tokenRequest{}, errMethod
	}
	q, err := parseQuery(r.URL.RawQuery)
	if err != nil {
		return tokenRequest{}, err
	}
	selectors := 0
	for _, value := range []string{q.clientID, q.objectID, q.msiResID, q.miResID, q.appClientID, q.appPrincipalID} {
		if value != "" {
			selectors++
		}
	}
	switch {
	case q.apiVersion == "" && !rules.versionOptional:
		return tokenRequest{}, badRequest("Required query variable 'api-version' is missing")
	case q.resource == "":
		return tokenRequest{}, badRequest("Required query variable 'resource' is missing")
	case !utf8.ValidString(q.resource):
		// JSON cannot echo it (RFC 8259, 8.1), so that no answer of IMDS's would match.
		return tokenRequest{}, badRequest("Query variable 'resource' is not UTF-8")
	case !rules.appServiceNames && q.appClientID != "":
		return tokenRequest{}, badRequest("Query variable 'clientid' is not supported: use 'client_id'")
	case !rules.appServiceNames && q.appPrincipalID != "":
		return tokenRequest{}, badRequest("Query variable 'principal_id' is not supported: use 'client_id'")
	case selectors > 1:
		return tokenRequest{}, badRequest("client_id, object_id, msi_res_id and mi_res_id exclude each other: name the identity by one of them")
	}
	return tokenRequest{
		resource: q.resource,
		selector: podresolver.Selector{
			// At most one of all these is set.
			ClientID:   q.clientID + q.appClientID,
			ObjectID:   q.objectID + q.appPrincipalID,
			ResourceID: q.msiResID + q.miResID,
		},
		bypassCache:   strings.EqualFold(q.bypassCache, "true"),
		refreshSHA256: q.toRefresh,
	}, nil
}
