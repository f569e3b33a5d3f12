// Command asker is the program of the test pods: it asks the metadata service for tokens,
// from its first moment on, and writes what it gets to stdout (package answers).
//
//	asker [flags] [URL ...]
//
// A URL without a host is the metadata service's; without any URL it asks for a token of
// Azure Key Vault's. With several it asks for one after the other, again and again.
//
// As an init container it ends with 0 only if it got what it wants:
//
//	asker -retry -want <client ID>
//
// For load, what is right is only counted:
//
//	asker -n 0 -every 20ms -summary 5s -want <client ID>
//
// With the environment variable of package attack, which needs the capability NET_RAW, it
// forges packets instead.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
	"github.com/podidentity/nmi/deploy/testbed/attack"
)

const (
	metadata     = "http://169.254.169.254"
	defaultToken = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
)

func main() {
	attacked, err := attack.FromEnv()
	if err == nil && !attacked {
		err = ask()
	}
	if err != nil {
		if !errors.Is(err, errUnwanted) { // the answers are in the log already, and stderr's text would be among them
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}

var errUnwanted = errors.New("answers that are not a token of the wanted identity")

func ask() error {
	c := client{header: http.Header{"Metadata": {"true"}}}
	var o options
	flag.IntVar(&o.requests, "n", 1, "number of requests; 0 is no end")
	flag.DurationVar(&o.every, "every", 100*time.Millisecond, "time between an answer and the next request")
	flag.StringVar(&o.want, "want", "", "client ID: the exit code is 1 if any answer was not a token of it")
	flag.DurationVar(&o.summary, "summary", 0, "do not write tokens of -want that took one try, but their number, this often and at the end")
	flag.BoolVar(&c.retry, "retry", false, "try again as Azure's SDK for Go does")
	fresh := flag.Bool("fresh", false, "a new connection for each request")
	timeout := flag.Duration("timeout", 30*time.Second, "for one try")
	flag.Func("header", "`name: value` to send; may be repeated", func(text string) error {
		name, value, found := strings.Cut(text, ":")
		if !found {
			return errors.New("want name: value")
		}
		c.header.Set(name, strings.TrimSpace(value))
		return nil
	})
	flag.Parse()
	urls := flag.Args()
	if len(urls) == 0 {
		urls = []string{defaultToken}
	}
	c.http = &http.Client{Timeout: *timeout, Transport: &http.Transport{DisableKeepAlives: *fresh}}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return o.run(ctx, func(i int) answers.Answer {
		url := urls[i%len(urls)]
		if strings.HasPrefix(url, "/") {
			url = metadata + url
		}
		a := c.ask(ctx, url)
		a.Ask = i % len(urls)
		return a
	})
}

type options struct {
	requests       int
	every, summary time.Duration
	want           string
}

// run asks until all is asked or ctx ends, and writes the answers.
func (o options) run(ctx context.Context, ask func(i int) answers.Answer) error {
	out := json.NewEncoder(os.Stdout)
	var sum answers.Summary
	unwanted := false
	written := time.Now()
	for i := 0; (i < o.requests || o.requests == 0) && pause(ctx, o.every, i > 0); i++ {
		a := ask(i)
		if ctx.Err() != nil && a.Status == 0 {
			break // cut off by the end of the pod: nobody's failure
		}
		right := a.Status == http.StatusOK && a.Subject == o.want
		if !right {
			unwanted = true
		}
		if o.summary == 0 || !right || a.Tries > 1 {
			if err := out.Encode(answers.Line{Answer: &a}); err != nil {
				return err
			}
			continue
		}
		sum.Right++
		sum.WorstMillis = max(sum.WorstMillis, a.Millis)
		if time.Since(written) >= o.summary {
			written = time.Now()
			if err := out.Encode(answers.Line{Summary: &sum}); err != nil {
				return err
			}
		}
	}
	if o.summary > 0 {
		if err := out.Encode(answers.Line{Summary: &sum}); err != nil {
			return err
		}
	}
	if o.want != "" && unwanted {
		return errUnwanted
	}
	return nil
}

// pause waits for d if it is to, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration, wait bool) bool {
	if wait {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}
