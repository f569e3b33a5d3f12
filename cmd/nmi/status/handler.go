package status

import (
	_ "embed"
	"encoding/json"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"time"
)

// Page is the path of the status page.
const Page = "/statusz" // ?format=json; ?refresh=off

// refreshInterval is how often a browser loads the page again, in seconds.
const refreshInterval = 30

// Handler serves the page, and next for all other paths. It is for root alone: the page names the
// node's pods and their identities.
func Handler(snapshot func() Snapshot, next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", next)
	mux.HandleFunc("GET "+Page, func(w http.ResponseWriter, r *http.Request) { serve(w, r, snapshot()) })
	return mux
}

// LoopbackHandler is Handler for a listener on a loopback address. It serves the page to programs
// in the node's own network namespace, to which kubectl port-forward connects, too. It refuses
// other names of the host: a browser that reaches the page by port-forward must not be led
// there by another site (DNS rebinding).
func LoopbackHandler(snapshot func() Snapshot, next http.Handler) http.Handler {
	page := Handler(snapshot, next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from, err := netip.ParseAddrPort(r.RemoteAddr); r.URL.Path == Page && (err != nil || !from.Addr().IsLoopback() || !isAddress(r.Host)) {
			http.Error(w, "this page is served on the node alone, by its loopback address", http.StatusForbidden)
			return
		}
		page.ServeHTTP(w, r)
	})
}

// isAddress reports whether a host is an IP address, which no name server has a say in, or localhost.
func isAddress(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost"
}

func serve(w http.ResponseWriter, r *http.Request, s Snapshot) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	// What follows writes to memory: http.TimeoutHandler has the page until it is complete.
	if r.URL.Query().Get("format") == "json" {
		header.Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s) // fails when the client has gone
		return
	}
	// No scripts, nothing from elsewhere, in no frame: names on the page are from the cluster.
	header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	header.Set("Content-Type", "text/html; charset=utf-8")
	shown := view{Snapshot: &s}
	if r.URL.Query().Get("refresh") != "off" {
		shown.Refresh = refreshInterval
	}
	_ = pageTemplate.Execute(w, shown) // likewise
}

// view is what the template shows.
type view struct {
	*Snapshot
	Refresh int // seconds; 0 for never
}

//go:embed statusz.html
var source string

var pageTemplate = template.Must(template.New("statusz").Parse(source))

// Lines are for the template, as are the following.
func (v view) Lines() []line {
	lines := v.lines()
	for i := range lines {
		lines[i].Text = amount.ReplaceAllString(lines[i].Text, "$1\u00a0$2")
	}
	return lines
}

// amount is a number and its unit, which stay on one line.
var amount = regexp.MustCompile(`(\d) (d|h|min|s)\b`)

// Verdict is the agent in a word.
func (v view) Verdict() line { return v.verdict() }

// Summary counts the pods.
func (v view) Summary() string { return v.summary() }

// Up is for how long the agent has run.
func (v view) Up() string { return human(v.Time.Sub(v.Agent.Started)) }

// Shown are the pods that are shown each by itself.
func (v view) Shown() (all []*Pod) {
	for i := range v.Pods {
		if v.Pods[i].State != None {
			all = append(all, &v.Pods[i])
		}
	}
	return all
}

// Quiet are the others: nothing gives them an identity, and they do not ask.
func (v view) Quiet() (all []*Pod) {
	for i := range v.Pods {
		if v.Pods[i].State == None {
			all = append(all, &v.Pods[i])
		}
	}
	return all
}

// Until is how long it is until then.
func (v view) Until(at time.Time) string { return human(at.Sub(v.Time)) }

// Since is how long ago that was.
func (v view) Since(at time.Time) string { return human(v.Time.Sub(at)) }

// Clock is a time to the second.
func (v view) Clock(at time.Time) string { return at.UTC().Format(time.RFC3339) }
