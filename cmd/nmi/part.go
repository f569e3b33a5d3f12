package main

import "context"

// part is something that the agent does until it is stopped, and that can be
// started again. It is for one goroutine at a time to start and stop.
type part struct {
	run  func(context.Context)
	stop func() // nil while it does not run; returns when run has
}

// begin starts the part; it ends with ctx, or when end is called.
func (p *part) begin(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.run(ctx)
	}()
	p.stop = func() { cancel(); <-done }
}

// end stops the part, if it runs, and returns when it has.
func (p *part) end() {
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}
