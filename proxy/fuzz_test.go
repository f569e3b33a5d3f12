package proxy

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// FuzzRoute checks the promise of route: whatever the target, what is passed on
// leads IMDS, which forgives spellings, to where the list says, and nowhere else.
func FuzzRoute(f *testing.F) {
	for _, target := range []string{
		"/metadata/identity/oauth2/token?x=y", "//metadata/identity/oauth2/token", "/METADATA/identity/oauth2/token", "/metadata/identity/oauth2/token/",
		"http://h/metadata/versions", "/metadata/instance/compute/..", `/metadata/instance\..\identity`, "/metadata/instance/a/%2e%2e/b",
		"/metadata/instance//x", "/metadata/THIM/amd/certification?x", "/metadata/THIM/../identity/info", "/metadata/THIM/;/a", "/metadata/instance/;/x", "*", "", "https://", "http://h?x", "/metadata/instance/a#/../b",
	} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		leads := imdstest.Straighten(target)
		switch kind := route(target); {
		case kind == routeToken && leads != "/metadata/identity/oauth2/token",
			kind == routeOpen && leads != "/metadata/versions" && leads != "/metadata/loadbalancer",
			kind == routeSensitive && !slices.Contains(Sensitive[:3], leads) && !strings.HasPrefix(leads+"/", "/metadata/thim/"),
			kind == routeInstance && leads != "/metadata/instance" && !strings.HasPrefix(leads, "/metadata/instance/"):
			t.Fatalf("%q is of kind %d, and leads to %q", target, kind, leads)
		}
	})
}

// FuzzParseTokenRequest compares the parser with the standard library's.
func FuzzParseTokenRequest(f *testing.F) {
	f.Add("api-version=2018-02-01&resource=https://vault.azure.net/")
	f.Add("api-version=1&resource=a%20b&client_id=x&msi_res_id=&foo=%zz")
	f.Add("resource=a&resource=b&;")
	f.Add("api-version=1&resource=a&clientid=x")
	f.Fuzz(func(t *testing.T, query string) {
		request := &http.Request{Method: http.MethodGet, URL: &url.URL{RawQuery: query}}
		got, err := parseTokenRequest(request, queryRules{appService: true})
		parsed, wantErr := url.ParseQuery(query)
		want := make(url.Values) // by the names that are known, in whatever case
		for name, values := range parsed {
			for _, known := range parameterNames {
				if strings.EqualFold(name, known) {
					want[known] = append(want[known], values...)
				}
			}
		}
		if err != nil {
			if got != (tokenRequest{}) {
				t.Fatalf("an error and %+v", got)
			}
			return
		}
		_, err = parseTokenRequest(request, queryRules{})
		if (err != nil) != (want.Get("clientid")+want.Get("principal_id") != "") {
			t.Fatalf("%q without App Service's names: %v", query, err)
		}
		if wantErr != nil {
			t.Fatalf("took %q, of which url.ParseQuery says: %v", query, wantErr)
		}
		for _, name := range parameterNames {
			if len(want[name]) > 1 {
				t.Fatalf("took %q, which has %s more than once", query, name)
			}
		}
		ids := []string{want.Get("client_id"), want.Get("object_id"), want.Get("msi_res_id"), want.Get("mi_res_id"), want.Get("clientid"), want.Get("principal_id")}
		selector := podresolver.Selector{ClientID: ids[0] + ids[4], ObjectID: ids[1] + ids[5], ResourceID: ids[2] + ids[3]}
		if got.resource != want.Get("resource") || got.resource == "" || want.Get("api-version") == "" || got.selector != selector ||
			len(slices.DeleteFunc(ids, func(id string) bool { return id == "" })) > 1 {
			t.Fatalf("%q was read as %+v", query, got)
		}
	})
}
