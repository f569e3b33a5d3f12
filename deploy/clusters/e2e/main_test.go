//go:build cluster

package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"testing"
	"time"
)

var (
	imageFlag   = flag.String("image", "localhost/nmi:test", "the agent's image, which the nodes have")
	askerFlag   = flag.String("asker", "localhost/asker:test", "the image of the test pods, which the nodes have")
	resultsFlag = flag.String("results", "", "directory for <date>-<cluster>.md and .json; the table is printed in any case")
	nameFlag    = flag.String("cluster", "", "the cluster's name in the results; by default those of the script's directory, the network plugin and kube-proxy's mode")
)

// patience is for what has to happen: a machine may be busy with other things.
const patience = 2 * time.Minute

// world is the cluster that all scenarios share.
var world *cluster

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx := context.Background()
	var err error
	if world, err = connect(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := world.install(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	begin := time.Now()
	code := m.Run()
	if len(results.all) == 0 {
		fmt.Fprintln(os.Stderr, "-test.run matches no scenario")
		code = 1
	}
	report := newReport(ctx, begin)
	if err := world.uninstall(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	fmt.Print("\n", report.markdown())
	if *resultsFlag != "" {
		if err := report.write(*resultsFlag); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}
