package main

import "context"

// component is something that the agent does until it is stopped, and can start again.
// One goroutine at a time may start and stop it.
type component struct {
	run  func(context.Context)
	stop func() // nil while it does not run; returns when run has
}

// Start runs the component until ctx ends or Stop is called. One that runs goes on.
func (c *component) Start(ctx context.Context) {
	if c.stop != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.run(ctx)
	}()
	c.stop = func() { cancel(); <-done }
}

// Stop ends the component, if it runs, and returns when it has ended.
func (c *component) Stop() {
	if c.stop != nil {
		c.stop()
		c.stop = nil
	}
}
