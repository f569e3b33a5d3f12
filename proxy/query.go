package proxy

import (
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/podidentity/nmi/podresolver"
)

// tokenRequest is what a query asks for.
type tokenRequest struct {
	resource string
	selector podresolver.Selector
	bypass   bool   // the caller wants a new token, whatever is in memory
	refresh  string // or one other than the token of this SHA-256, in hex
}

// The parameters that mean something here. Others are left alone: newer SDKs
// send some.
const (
	apiVersion = iota
	resource
	clientID
	objectID
	msiResID // the name that IMDS documents
	miResID  // the name that it takes as well
	bypassCache
	tokenToRefresh // sent by MSAL when a service has rejected a token
	// App Service's names of the client and the object ID (Microsoft, "How to use managed
	// identities for App Service and Azure Functions", REST endpoint reference, API
	// versions 2017-09-01 and 2019-08-01).
	appClientID
	appPrincipalID
	parameters
)

var parameterNames = [parameters]string{
	"api-version", "resource", "client_id", "object_id", "msi_res_id", "mi_res_id", "bypass_cache", "token_sha256_to_refresh",
	"clientid", "principal_id",
}

// queryRules are where the queries of two endpoints differ.
type queryRules struct {
	unversioned bool // an api-version need not be there: the old NMI did not ask for one everywhere
	// appService accepts App Service's names of IDs. IMDS ignores them, and answers with
	// the default identity, which is not the one that was asked for: without appService
	// they are refused.
	appService bool
}

// parseTokenRequest reads the query of a request for a token. What is required
// must be there, nothing may come twice, and at most one identity be named: a
// request that could be read in two ways is refused.
func parseTokenRequest(r *http.Request, rules queryRules) (tokenRequest, error) {
	if r.Method != http.MethodGet {
		return tokenRequest{}, errMethod
	}
	var value [parameters]string
	var given [parameters]bool
	// Not url.ParseQuery, which makes a map of all there is.
	for rest := r.URL.RawQuery; rest != ""; {
		var pair string
		pair, rest, _ = strings.Cut(rest, "&")
		name, text, _ := strings.Cut(pair, "=")
		name, nameErr := url.QueryUnescape(name)
		text, textErr := url.QueryUnescape(text)
		// A semicolon separated parameters once (W3C, HTML 4.01, appendix B.2.2);
		// a service that still thinks so would read another query.
		if nameErr != nil || textErr != nil || strings.Contains(pair, ";") {
			return tokenRequest{}, badRequest("The query cannot be parsed: encode the parameters")
		}
		for i, known := range parameterNames {
			if !strings.EqualFold(name, known) { // ignored, client_id in capitals would mean the default
				continue
			}
			if given[i] {
				return tokenRequest{}, badRequest("Query variable '" + name + "' was given more than once")
			}
			given[i], value[i] = true, text
		}
	}

	named := 0
	for _, i := range []int{clientID, objectID, msiResID, miResID, appClientID, appPrincipalID} {
		if value[i] != "" {
			named++
		}
	}
	switch {
	case value[apiVersion] == "" && !rules.unversioned:
		return tokenRequest{}, badRequest("Required query variable 'api-version' is missing")
	case value[resource] == "":
		return tokenRequest{}, badRequest("Required query variable 'resource' is missing")
	case !utf8.ValidString(value[resource]):
		// JSON cannot echo it (RFC 8259, 8.1), so that no answer of IMDS's would match.
		return tokenRequest{}, badRequest("Query variable 'resource' is not UTF-8")
	case !rules.appService && value[appClientID] != "":
		return tokenRequest{}, badRequest("Query variable 'clientid' is not supported: use 'client_id'")
	case !rules.appService && value[appPrincipalID] != "":
		return tokenRequest{}, badRequest("Query variable 'principal_id' is not supported: use 'client_id'")
	case named > 1:
		return tokenRequest{}, badRequest("client_id, object_id, msi_res_id and mi_res_id exclude each other: name the identity by one of them")
	}
	return tokenRequest{
		resource: value[resource],
		selector: podresolver.Selector{
			// At most one of all these is set.
			ClientID:   value[clientID] + value[appClientID],
			ObjectID:   value[objectID] + value[appPrincipalID],
			ResourceID: value[msiResID] + value[miResID],
		},
		bypass:  strings.EqualFold(value[bypassCache], "true"),
		refresh: value[tokenToRefresh],
	}, nil
}
