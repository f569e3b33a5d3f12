// Command cmd runs the conformance suite against a base URL: an agent's, from
// inside a pod, or that of a virtual machine's own service, to see whether the
// table tells the truth.
//
// Cases that need more than a URL can give are listed as not run, with what they
// need. It ends with 1 if a case fails.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/podidentity/nmi/deploy/conformance"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed, err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(2)
	}
	if failed {
		os.Exit(1)
	}
}

func run(ctx context.Context) (failed bool, err error) {
	base := flag.String("url", "", "base URL of the service (required), such as http://169.254.169.254 from inside a pod or a virtual machine")
	clientID := flag.String("client-id", "", "client ID of an identity that the caller may use; valid requests name it")
	objectID := flag.String("object-id", "", "its object ID")
	resourceID := flag.String("resource-id", "", "its resource ID")
	resource := flag.String("resource", "https://management.azure.com/", "resource to ask tokens for")
	unknown := flag.String("unknown-resource", "", "resource that Entra does not know, such as https://nobody.example")
	skipPolicy := flag.Bool("skip-policy", false, "leave out the cases marked P, in which the real service gives more than the agent")
	only := flag.String("only", "", "numbers of the cases to run, with commas; all by default")
	markdown := flag.Bool("markdown", false, "print a table in Markdown")
	flag.Parse()
	target, err := targetOf(*base)
	if err != nil {
		return false, err
	}
	target.ClientID, target.ObjectID, target.ResourceID = *clientID, *objectID, *resourceID
	target.NameIdentity = *clientID != ""
	target.Resource, target.UnknownResource = *resource, *unknown

	cases := conformance.Cases()
	if *skipPolicy {
		cases = conformance.WithoutPolicy(cases)
	}
	if *only != "" {
		numbers := strings.Split(*only, ",")
		cases = slices.DeleteFunc(cases, func(c conformance.Case) bool { return !slices.Contains(numbers, strconv.Itoa(c.Number)) })
	}
	results := conformance.Run(ctx, target, cases)
	failed = slices.ContainsFunc(results, conformance.Result.Failed)
	if *markdown {
		return failed, conformance.WriteMarkdown(os.Stdout, conformance.Column{Title: "result", Results: results})
	}
	return failed, conformance.WriteText(os.Stdout, results)
}

// targetOf dials what the URL names, directly: proxies must not be asked.
func targetOf(base string) (conformance.Target, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" {
		return conformance.Target{}, fmt.Errorf("--url=%s is not usable: give http://<address>, with a port where it is not 80", base)
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	address := net.JoinHostPort(u.Hostname(), port)
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", address)
	}
	return conformance.Target{Caller: conformance.Caller{Dial: dial}, Host: u.Host}, nil
}
