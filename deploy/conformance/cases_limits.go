package conformance

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// limitCases are about many requests, and about all of the above at once.
var limitCases = []Case{
	{
		Number: 47, Name: "one caller over the limits: 429 for it alone", Mark: Policy,
		Source: servicePage + ": 20 requests a second and 5 at a time, for all of a machine; so nobody may use them up",
		Sends:  "R without end on 32 connections, every second one for a new resource; from a second caller R now and then", Needs: []Need{SecondPod}, check: overTheLimits,
	},
	{
		Number: 48, Name: "the SDKs, end to end", Mark: Observed, Source: "azidentity, MSAL Go, adal, @azure/identity, @azure/msal-node",
		Sends: "what they send", Needs: []Need{RealClients},
		check: func(c *conversation) {
			if err := c.Stage.Clients(c.ctx); err != nil {
				c.wrong("%v", err)
			}
		},
	},
}

const (
	greed      = 32               // connections at once of the caller that asks too much
	floodTime  = 20 * time.Second // at most: until it is refused, and its neighbour has its tokens
	fairShares = 5                // tokens that its neighbour asks for meanwhile
)

func overTheLimits(c *conversation) {
	neighbour, err := c.Stage.Neighbour(c.ctx)
	if err != nil {
		c.wrong("no second caller: %v", err)
		return
	}
	ctx, stop := context.WithTimeout(c.ctx, floodTime)
	defer stop()
	refused := make(chan answer, 1) // the first
	var asking sync.WaitGroup
	var number atomic.Int64
	for range greed {
		asking.Go(func() {
			for ctx.Err() == nil {
				r := c.R()
				if n := number.Add(1); n%2 == 0 {
					r = c.forResource(c.Resource + "/" + time.Duration(n).String())
				}
				if a := c.send(c.Caller, r); a.status == 429 {
					select {
					case refused <- a:
					default:
					}
				}
			}
		})
	}
	for range fairShares {
		c.tokenOf(c.askFrom(neighbour, c.forNew()), neighbour.ClientID)
	}
	var first answer
	select {
	case first = <-refused:
	case <-ctx.Done():
	}
	stop()
	asking.Wait()
	if first.status == 0 {
		select {
		case first = <-refused: // just then
		default:
			c.wrong("R without end for %s: no 429", floodTime)
		}
	}
	if first.status != 0 {
		c.errors = append(c.errors, first)
		c.refusal(first, 429)
		c.comesBack(first)
	}
	c.own(c.insisting(c.Caller, c.R()))
}
