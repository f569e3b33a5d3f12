// Command imds is the metadata service of a test cluster: proxy/imdstest and
// proxy/entratest as a process.
//
//	imds -pods 10.244.0.0/16 -control <socket>
//
// It runs behind the node, in a network namespace that has 169.254.169.254, so that a
// pod's packets to it are forwarded by the node. A request from an address of -pods has
// bypassed the agent, and is counted and logged as a leak. Where the network masquerades,
// -pods must name the address that pods' packets then have, and the node must use another.
//
// Tests read the counts and change what it does over the control socket (package
// control), whatever network namespace they are in. It ends with SIGTERM or SIGINT.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// readTimeout bounds how long a client may take for a request's head.
const readTimeout = 5 * time.Second

func main() {
	var o options
	pods := flag.String("pods", "10.244.0.0/16", "prefixes of the cluster's pods' addresses, separated by commas")
	flag.StringVar(&o.control, "control", "", "Unix socket for tests (required)")
	flag.StringVar(&o.imds, "listen", "169.254.169.254:80", "where the metadata service listens")
	flag.StringVar(&o.entra, "entra", "169.254.169.254:443", `where the stand-in for Microsoft Entra listens, over TLS; "" for nowhere`)
	flag.Parse()
	log.SetFlags(log.LstdFlags | log.Lmicroseconds | log.LUTC)
	for text := range strings.SplitSeq(*pods, ",") {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			log.Fatalf("-pods: %v", err)
		}
		o.pods = append(o.pods, prefix.Masked())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		log.Fatal(err)
	}
}

type options struct {
	pods                 []netip.Prefix
	control, imds, entra string
}

// run serves until ctx ends.
func run(ctx context.Context, o options) error {
	if o.control == "" {
		return fmt.Errorf("-control is required: the socket over which tests talk to this program")
	}
	s, err := newService(o)
	if err != nil {
		return err
	}
	defer s.close()
	_ = os.Remove(o.control) // of a run that was killed
	control, err := net.Listen("unix", o.control)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: s.controlHandler(), ReadHeaderTimeout: readTimeout}
	defer func() { _ = srv.Close() }() // and with it the socket
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(control) }()
	log.Printf("serving on %s, pods are %v", o.imds, o.pods)
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}
