// Package control is how a test talks to the fake metadata service of a cluster, which
// is a process of its own (deploy/clusters/imds): the types of the control socket, and a
// client of it.
package control

import (
	"time"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// Config says how the fakes behave. A new one replaces them: tokens and faults of the
// old ones are gone, what was counted stays.
type Config struct {
	IMDS  imdstest.Config
	Entra entratest.Config
}

// Call is one request to the metadata service.
type Call struct {
	Time time.Time
	imdstest.Call
}

// Counts is what came since the start or the last reset.
type Counts struct {
	Requests int
	Tokens   map[string]int // given, by subject: a client ID or imdstest.Node
	// Leaks are the requests from a pod's own address: they came past the agent. One that
	// the agent serves has the node's address here.
	Leaks  int
	Leaked []Call // the first 100 of them
	Calls  []Call // the last 4096 requests, leaks included
}

// Entra is where the fake of Microsoft Entra is, for the agent's --entra-authority.
type Entra struct {
	Authority   string // a URL
	Certificate string // PEM, signed by itself
	Tokens      int    // given since its last Config
}
