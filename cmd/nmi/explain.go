package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/cmd/nmi/status"
	"github.com/podidentity/nmi/cmd/nmi/terminal"
	"github.com/podidentity/nmi/podresolver"
)

const explainTimeout = 30 * time.Second

// explainCommand says what a pod gets, and why. In an agent's pod it asks the agent that
// decides. For a pod of another node, or where no agent answers, it reads the cluster, and
// decides with the agent's flags.
func explainCommand(c *config) *cobra.Command {
	var resolving *pflag.FlagSet
	var q question
	var output string
	cmd := &cobra.Command{
		Use:   "explain <namespace>/<pod>",
		Short: "Say which identities a pod gets, and why",
		Long: `explain follows a pod's request for a token step by step: whether it comes to the
agent, whose its address is, which exception applies by which label, which bindings match
and which nearly do, and which identity it gets. It ends with what the pod is answered, and
with what to do if that is a refusal.

In the agent's pod it asks the agent, over --probe-socket, and needs no other flag. It
reads the cluster itself for a pod of another node, with that agent's flags; where no
agent answers; and with flags that are not the agent's. Where no agent answers, give it
the agent's flags: --operation-mode is required then.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || strings.Count(args[0], "/") != 1 || strings.HasPrefix(args[0], "/") || strings.HasSuffix(args[0], "/") {
				return errors.New("explain takes one argument: <namespace>/<pod>, such as shop/cart-0")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c.logger(cmd.ErrOrStderr())
			ctx, cancel := context.WithTimeout(cmd.Context(), explainTimeout)
			defer cancel()
			var given []string
			resolving.VisitAll(func(f *pflag.Flag) {
				if f.Changed {
					given = append(given, f.Name)
				}
			})
			q.pod = args[0]
			answer, err := explain(ctx, q, c.probeSocket, c.resolver, given, func(note string) { cmd.PrintErrln("note:", note) })
			if err != nil {
				return err
			}
			return answer.print(cmd.OutOrStdout(), output)
		},
	}
	cmd.Flags().StringVar(&q.clientID, "client-id", "", "client ID that the request names; by default it names no identity")
	addOutput(cmd.Flags(), &output)
	resolving = pflag.NewFlagSet("", pflag.ContinueOnError)
	c.addResolverFlags(resolving)
	// explain must not guess the mode: another one decides otherwise.
	mode := resolving.Lookup(flagOperationMode)
	mode.DefValue, mode.Usage = "", mode.Usage+"; required where no agent answers"
	cmd.Flags().AddFlagSet(resolving)
	c.addProbeSocket(cmd.Flags())
	c.addLogFlags(cmd.Flags())
	return cmd
}

// question is a request that a pod might send.
type question struct {
	pod      string // <namespace>/<name>
	clientID string // that it names; "" for none
}

// explanation answers a question. remark says where it is from, if not from the agent.
type explanation struct {
	status.Pod
	remark string
}

// print prints the explanation as a table or as JSON.
func (e *explanation) print(out io.Writer, output string) error {
	if output == outputJSON {
		return writeIndented(out, e.Pod)
	}
	status.Printer{Printer: terminal.New(out)}.Pod(&e.Pod, time.Now())
	if e.remark == "" {
		return nil
	}
	_, err := fmt.Fprintln(out, e.remark)
	return err
}

// explain asks the agent that listens on the socket, or reads the cluster. given are the
// names of the flags that cfg was made of; note is called with what to know of the answer.
func explain(ctx context.Context, q question, socket string, cfg podresolver.Config, given []string, note func(string)) (*explanation, error) {
	agentCfg, askErr := agentConfig(ctx, socket)
	switch {
	case askErr != nil && !slices.Contains(given, flagOperationMode):
		return nil, fmt.Errorf("%w. Run this in an agent's pod (kubectl -n kube-system exec daemonset/nmi -- nmi explain %s), or give --%s and the agents' other flags, to read the cluster from here", askErr, q.pod, flagOperationMode)
	case askErr != nil:
	case len(given) == 0 || reflect.DeepEqual(decisive(cfg), decisive(agentCfg)):
		pod, err := askAgent(ctx, socket, q)
		if !errors.Is(err, errNotHere) {
			return pod, err
		}
		cfg = agentCfg
	default:
		note(fmt.Sprintf("the agent of this pod runs with other flags than these (--%s); leave them out to see its decision", strings.Join(given, ", --")))
	}
	return readCluster(ctx, q, cfg)
}

// decisive is the part of a configuration that decides what a pod gets.
func decisive(cfg podresolver.Config) podresolver.Config {
	return podresolver.Config{
		Mode: cfg.Mode, Namespaced: cfg.Namespaced, MICNamespace: cfg.MICNamespace, StrictSelection: cfg.StrictSelection,
		ExceptionNamespaces: cfg.ExceptionNamespaces, Deny: cfg.Deny, Federation: cfg.Federation,
	}
}

// agentConfig asks the agent for its configuration.
func agentConfig(ctx context.Context, socket string) (cfg podresolver.Config, err error) {
	var page bytes.Buffer
	status, err := getPage(ctx, socket, configPage, &page)
	if err != nil {
		return podresolver.Config{}, err
	}
	if status != http.StatusOK {
		return podresolver.Config{}, fmt.Errorf("the agent that listens on %s is of another version: %s says %d", socket, configPage, status)
	}
	if err := json.Unmarshal(page.Bytes(), &cfg); err != nil {
		return podresolver.Config{}, fmt.Errorf("%s: %w", configPage, err)
	}
	return cfg, nil
}

// errNotHere means that a pod is not on the node of the agent that was asked.
var errNotHere = errors.New("the pod is not on this node")

func askAgent(ctx context.Context, socket string, q question) (*explanation, error) {
	query := url.Values{"pod": {q.pod}}
	if q.clientID != "" {
		query.Set("client_id", q.clientID)
	}
	var page bytes.Buffer
	switch status, err := getPage(ctx, socket, explainPage+"?"+query.Encode(), &page); {
	case err != nil:
		return nil, err
	case status == http.StatusNotFound:
		return nil, errNotHere
	case status != http.StatusOK:
		return nil, errors.New(strings.TrimSpace(page.String()))
	}
	answer := new(explanation)
	if err := json.Unmarshal(page.Bytes(), &answer.Pod); err != nil {
		return nil, fmt.Errorf("%s: %w", explainPage, err)
	}
	return answer, nil
}

// readCluster explains by the objects of the cluster as they are now.
func readCluster(ctx context.Context, q question, cfg podresolver.Config) (*explanation, error) {
	restConfig, err := apiServer("nmi/" + version)
	if err != nil {
		return nil, err
	}
	namespace, name, _ := strings.Cut(q.pod, "/")
	if cfg.Node, err = podresolver.NodeOf(ctx, restConfig, namespace, name); err != nil {
		return nil, err
	}
	from, err := podresolver.FromAPIServer(restConfig, cfg.Node)
	if err != nil {
		return nil, err
	}
	if !slog.Default().Enabled(ctx, slog.LevelDebug) {
		cfg.Logger = slog.New(slog.DiscardHandler) // what it would warn of is in the steps
		klog.SetSlogLogger(cfg.Logger)
	}
	resolver, err := podresolver.Read(ctx, from, cfg)
	if err != nil {
		return nil, fmt.Errorf("reading the cluster:\n%s", list(err))
	}
	pod, err := status.Parts{Pods: resolver}.Pod(namespace, name, podresolver.Selector{ClientID: q.clientID})
	if err != nil {
		return nil, err
	}
	return &explanation{pod, fmt.Sprintf("(by the objects of the cluster, in %s mode; what the agent of node %s knows besides, such as over which link the pod's requests come, it says itself)", cfg.Mode, cfg.Node)}, nil
}
