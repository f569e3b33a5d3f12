package imdstest

import (
	"net/url"
	"path"
	"strings"
)

// Straighten reads the path of a request target as the real service does:
// whatever spelling leads there, this is where it leads.
func Straighten(target string) string {
	if u, err := url.Parse(target); err == nil && u.Host != "" && u.Scheme != "" {
		target = u.RequestURI()
	}
	p, _, _ := strings.Cut(target, "?")
	for range 3 { // encoded, and encoded again
		decoded, err := url.PathUnescape(p)
		if err != nil {
			break
		}
		p = decoded
	}
	p = strings.ToLower(strings.ReplaceAll(p, `\`, "/"))
	segments := strings.Split(p, "/")
	for i, segment := range segments {
		segments[i], _, _ = strings.Cut(segment, ";")
	}
	return path.Clean("/" + strings.Join(segments, "/"))
}
