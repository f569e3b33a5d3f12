// Command clients gets tokens through Azure's Go SDKs, as an application in a pod
// does, and says what came of it and how long it took.
//
// Its one argument says what to do, in JSON; see job. It prints a list of
// results, in JSON too. Its sister in JavaScript, ../js, takes and prints the
// same.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// job is what to do.
type job struct {
	Client   string `json:"client"`   // a name of clients
	By       string `json:"by"`       // how the identity is named: "client", "resource" or "object"; "" for not at all
	ID       string `json:"id"`       // its ID
	Resource string `json:"resource"` // to get a token for, without a slash at its end
	Times    int    `json:"times"`    // how many tokens, one after the other, with one credential
}

// result is what came of one call.
type result struct {
	Subject string  `json:"subject,omitempty"` // whose token it is
	Minutes float64 `json:"minutes,omitempty"` // until it expires
	Error   string  `json:"error,omitempty"`
	MS      float64 `json:"ms"` // how long the call took
}

// getToken is one call of an SDK.
type getToken func(context.Context) (token string, expires time.Time, err error)

// clients make credentials.
var clients = map[string]func(job) (getToken, error){
	"azidentity":         managedIdentity,
	"azidentity default": defaultCredential,
	"msal":               msal,
	"adal":               adalToken,
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "clients:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("takes one argument: a job in JSON")
	}
	var j job
	if err := json.Unmarshal([]byte(os.Args[1]), &j); err != nil {
		return err
	}
	newClient, ok := clients[j.Client]
	if !ok {
		return fmt.Errorf("there is no client %q", j.Client)
	}
	get, err := newClient(j)
	if err != nil {
		return err
	}
	var results []result
	for range j.Times {
		begin := time.Now()
		token, expires, err := get(context.Background())
		r := result{MS: float64(time.Since(begin).Microseconds()) / 1000}
		if err != nil {
			r.Error = err.Error()
		} else {
			r.Subject, r.Minutes = subject(token), time.Until(expires).Minutes()
		}
		results = append(results, r)
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}

// subject reads whose token it is; those of proxy/imdstest begin with their claims.
func subject(token string) string {
	head, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	if json.Unmarshal(raw, &claims) != nil {
		return ""
	}
	return claims.Subject
}
