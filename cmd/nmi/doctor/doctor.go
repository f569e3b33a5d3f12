// Package doctor looks for what keeps an agent from serving its pods: in the agent itself, on
// its node, and in the cluster.
//
// The life of a report:
//
//  1. Run asks the agent over its probe socket for its settings; before an installation they
//     are those of the flags.
//  2. It goes through the checks, category by category. A check looks at one thing and changes
//     nothing. A check that fails is repeated until Config.Wait has passed.
//  3. A check succeeds, warns, fails or is skipped, with the reason. It is skipped where this
//     process cannot see the thing: it never takes that for success.
//  4. Each result is printed as soon as it is known, with an anchor of docs/doctor.md, which says
//     what the check means and what to do.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
)

// Config says what to check, and whom to ask.
type Config struct {
	Pre  bool          // before an installation: there is no agent yet
	Wait time.Duration // how long to repeat checks that fail
	// Ask returns a page of the agent. Not used with Pre.
	Ask func(ctx context.Context, page string) (status int, text string, err error)
	// Socket is where Ask finds the agent.
	Socket string
	// API is how to connect to the API server; nil if it cannot be found, with the reason.
	API    *rest.Config
	APIErr error
	// Settings are used if no agent answers.
	Settings Settings
}

// Settings are what the checks need to know of an agent's flags.
type Settings struct {
	Node           string // "" if it is not known
	Mode           podresolver.Mode
	Rules          iptables.Config
	AllowUnguarded bool // see links.Config
	Ports          []Port
	HandoverDir    string // "" for none
	StartupTaint   corev1.Taint
	Federation     Federation
}

// Port is a port that the agent listens on.
type Port struct {
	Flag string // that chooses it
	Addr netip.AddrPort
	Page string // that it serves; "" for the port of redirected connections
}

// Pages of the agent.
const (
	ConfigPage = "/config" // JSON, with AgentPage in it
	readyPage  = "/readyz"
	statusPage = "/statusz?format=json"
)

// AgentPage is what the agent's ConfigPage has for the doctor.
type AgentPage struct {
	Doctor Settings
}

// Results of a check.
const (
	Success = "success"
	Warning = "warning" // pods are served
	Error   = "error"   // pods of the node are not served, or not protected
	Skipped = "skipped" // with the reason; nothing is known
)

// Report is the outcome of all checks. Its JSON is that of nmi doctor -o json.
type Report struct {
	Success    bool       `json:"success"` // no check failed; some may have warned
	Categories []Category `json:"categories"`
}

// Category is checks of one kind.
type Category struct {
	Name   string   `json:"name"`
	Checks []Result `json:"checks"`
}

// Result is the outcome of one check.
type Result struct {
	Description string `json:"description"`     // what is right if it succeeds, and what was found
	Result      string `json:"result"`          // one of the constants
	Hint        string `json:"hint"`            // where the documentation says what to do; stable
	Error       string `json:"error,omitempty"` // why it does not succeed
}

// Count returns how many checks had a result.
func (r Report) Count(result string) (n int) {
	for _, category := range r.Categories {
		for _, check := range category.Checks {
			if check.Result == result {
				n++
			}
		}
	}
	return n
}

// Printer hears of results as soon as they are known.
type Printer interface {
	Category(name string)
	Result(Result)
}

const (
	hintPage = "docs/doctor.md#"
	// checkTimeout bounds one attempt of a check.
	checkTimeout = 20 * time.Second
	// retryInterval is the pause between two attempts.
	retryInterval = time.Second
)

// check is one line of the report.
type check struct {
	anchor      string // of docs/doctor.md
	description string
	// run returns what it found, and an error if that is not right: one of type warning or
	// skipped, or another one, which is fatal.
	run func(ctx context.Context) (found string, err error)
}

// warning is an error that does not keep pods from being served.
type warning struct{ error }

func warnf(format string, args ...any) error { return warning{fmt.Errorf(format, args...)} }

// skipped is the reason why a check cannot be made.
type skipped string

func (s skipped) Error() string { return string(s) }

func skipf(format string, args ...any) error { return skipped(fmt.Sprintf(format, args...)) }

// doctor is one run.
type doctor struct {
	cfg       Config
	settings  Settings
	agent     bool                // it answers
	chosen    string              // why mode auto is ebpf on this node; "" if it is not
	inspector *iptables.Inspector // nil until it is needed
	cluster   *cluster
}

// Run makes all checks, and returns their report when they are done or ctx ends.
func Run(ctx context.Context, cfg Config, to Printer) Report {
	d := &doctor{cfg: cfg, settings: cfg.Settings}
	d.cluster = &cluster{doctor: d}
	if cfg.Pre {
		d.chooseMode(ctx)
	}
	report := Report{Success: true}
	deadline := time.Now().Add(cfg.Wait)
	for _, category := range []struct {
		name   string
		checks func() []check // made when it is their turn: some depend on what the agent says
	}{
		{"agent", d.agentChecks},
		{"rules", d.ruleChecks},
		{"network", d.networkChecks},
		{"metadata service", d.metadataChecks},
		{"kubernetes", d.clusterChecks},
		{"node", d.nodeChecks},
	} {
		done := Category{Name: category.name}
		to.Category(category.name)
		for _, c := range category.checks() {
			result := c.repeat(ctx, deadline)
			report.Success = report.Success && result.Result != Error
			done.Checks = append(done.Checks, result)
			to.Result(result)
		}
		report.Categories = append(report.Categories, done)
	}
	return report
}

// repeat makes a check until it does not fail, or the deadline has passed.
func (c check) repeat(ctx context.Context, deadline time.Time) Result {
	for {
		result := c.once(ctx)
		if result.Result != Error || !time.Now().Add(retryInterval).Before(deadline) {
			return result
		}
		select {
		case <-time.After(retryInterval):
		case <-ctx.Done():
			return result
		}
	}
}

func (c check) once(ctx context.Context) Result {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	result := Result{Description: c.description, Result: Success, Hint: hintPage + c.anchor}
	found, err := c.run(ctx)
	if found != "" {
		result.Description += ": " + found
	}
	if err == nil {
		return result
	}
	result.Result, result.Error = Error, err.Error()
	if _, ok := errors.AsType[warning](err); ok {
		result.Result = Warning
	} else if _, ok := errors.AsType[skipped](err); ok {
		result.Result = Skipped
	}
	return result
}
