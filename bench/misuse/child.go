package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The bad pods are played by a process of their own, which runs when nothing else wants
// its core: what their clients compute must not be taken for the agent's doing. It gets
// the pods' namespaces as its first files, writes a line when it is at its worst, and
// ends, with a line on what came of it, when its input does.

const firstFile = 3 // os/exec.Cmd.ExtraFiles

// playBad is that process.
func playBad(ctx context.Context, number int) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var pods []*testbed.Namespace
	for i := range badPods {
		pods = append(pods, testbed.NamespaceOf(firstFile+i))
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	started := make(chan struct{})
	go func() {
		<-started
		fmt.Println("started")
	}()
	fmt.Println(misuses[number].do(ctx, pods, started))
	return nil
}

// bad is a running playBad.
type bad struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	output *bufio.Reader
}

// startBad returns when it is at its worst.
func startBad(ctx context.Context, number int, pods []*testbed.Pod) (*bad, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b := &bad{cmd: exec.CommandContext(ctx, "nice", "-n", "19", self, "-bad", strconv.Itoa(number))}
	b.cmd.Stderr = os.Stderr
	for _, pod := range pods {
		f, err := pod.File()
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // the child has a copy
		b.cmd.ExtraFiles = append(b.cmd.ExtraFiles, f)
	}
	if b.stdin, err = b.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := b.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	b.output = bufio.NewReader(out)
	if err := b.cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := b.output.ReadString('\n'); err != nil {
		return nil, fmt.Errorf("the bad pods did not start: %w", errors.Join(err, b.cmd.Wait()))
	}
	return b, nil
}

// stop ends it, and returns what came of it.
func (b *bad) stop() (string, error) {
	_ = b.stdin.Close()
	line, err := b.output.ReadString('\n')
	return line[:max(len(line)-1, 0)], errors.Join(err, b.cmd.Wait())
}
