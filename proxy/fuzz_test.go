package proxy

import (
	"slices"
	"strings"
	"testing"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// FuzzRoute checks the promise of route: whatever the target, what is passed through
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
			kind == routePublic && leads != "/metadata/versions" && leads != "/metadata/loadbalancer",
			kind == routeSensitive && !slices.Contains(allowable[:3], leads) && !strings.HasPrefix(leads+"/", "/metadata/thim/"),
			kind == routeInstance && leads != "/metadata/instance" && !strings.HasPrefix(leads, "/metadata/instance/"):
			t.Fatalf("%q is of kind %d, and leads to %q", target, kind, leads)
		}
	})
}
