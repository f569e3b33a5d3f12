package proxy

import (
	"net/http"
	"slices"
	"strings"
)

// kind says how requests for a path are handled.
type kind int

const (
	routeNone      kind = iota // not on the list: 404
	routeToken                 // served by the agent
	routePresence              // served by the agent: says that it is there
	routeInstance              // passed through, unless blocked
	routePublic                // passed through: says nothing about identities
	routeSensitive             // passed through for known pods, where Config.Allow has the path
)

const (
	scheduledEvents = "/metadata/scheduledevents"
	thim            = "/metadata/THIM"
)

// AllowablePaths returns the paths that Config.Allow may list: the events of the node's
// maintenance, which a POST approves; a document that the node signs; the node's tenant; and,
// for the paths below it, the certificates of the node's processor, which confidential
// containers use for attestation (Microsoft, "Trusted Hardware Identity Management").
func AllowablePaths() []string { return slices.Clone(allowable[:]) }

var allowable = [...]string{scheduledEvents, "/metadata/attested/document", "/metadata/identity/info", thim}

// route matches a raw request target against the list of what is served. IMDS normalizes
// paths: it folds case, and reads "\", "%5c" and "//" as a slash. A filter that normalizes
// differently would pass a spelling of the token path through, and so hand out the node's
// identity (CVE-2022-23551). So nothing is decoded or cleaned here: a path is on the list
// byte for byte, or it is refused.
//
// Three other spellings of the token path are served because clients send them: the first
// segment in any case (the old NMI's route), a doubled first slash (MSAL4J), and a trailing
// slash (msal-node and @azure/identity with AZURE_POD_IDENTITY_AUTHORITY_HOST set).
func route(target string) kind {
	path, _, _ := strings.Cut(originForm(target), "?")
	if strings.HasPrefix(path, "//") {
		path = path[1:]
	}
	const root = "/metadata/"
	if len(path) < len(root) || !strings.EqualFold(path[:len(root)], root) {
		return routeNone
	}
	rest := path[len(root):]
	switch {
	case rest == "identity/oauth2/token", rest == "identity/oauth2/token/":
		return routeToken
	case path[:len(root)] != root:
		return routeNone
	case rest == "versions", rest == "loadbalancer":
		return routePublic
	case rest == "nmi":
		return routePresence
	case sensitive(path) != "":
		return routeSensitive
	case rest == "instance":
		return routeInstance
	case strings.HasPrefix(rest, "instance/") && plain(rest):
		return routeInstance
	default:
		return routeNone
	}
}

// sensitive returns the one of allowable that a path is, or is below; "" for other paths.
func sensitive(path string) string {
	const root = "/metadata/"
	switch {
	case strings.HasPrefix(path, thim+"/") && plain(path[len(root):]):
		return thim
	case path != thim && slices.Contains(allowable[:], path):
		return path
	default:
		return ""
	}
}

// pathOf is the path that route has matched.
func pathOf(r *http.Request) string {
	path, _, _ := strings.Cut(originForm(r.RequestURI), "?")
	return strings.Replace(path, "//", "/", 1)
}

// originForm strips scheme and host from an absolute-form target (RFC 9112,
// section 3.2.2: servers must accept it). Whatever host it names, the
// connection was to the metadata service; but it must name one (RFC 9110, 4.2.1).
func originForm(target string) string {
	for _, scheme := range []string{"http://", "https://"} {
		if len(target) >= len(scheme) && strings.EqualFold(target[:len(scheme)], scheme) {
			rest := target[len(scheme):]
			if slash := strings.IndexAny(rest, "/?"); slash > 0 {
				return rest[slash:]
			}
			return "/"
		}
	}
	return target
}

// plain reports whether a path, relative to /metadata/, has only names and single slashes, so
// that it cannot lead out of its first directory.
func plain(path string) bool {
	for i := range len(path) {
		switch c := path[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		case c == '/' && path[i-1] != '/': // the path begins with a name
		default:
			return false
		}
	}
	return true
}
