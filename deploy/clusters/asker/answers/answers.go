// Package answers is what an asker (deploy/clusters/asker) writes to its log: one JSON
// object a line.
package answers

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Answer is what came of one request, all of its tries together.
type Answer struct {
	Time   time.Time // of the first try
	Ask    int       // which of the asker's URLs, from 0
	Status int       // HTTP status of the last try; 0 when there was no answer
	// Subject says whose token it is: a client ID, or imdstest.Node. "" for no token.
	Subject    string  `json:",omitempty"`
	RetryAfter string  `json:",omitempty"` // header
	Error      string  `json:",omitempty"` // why there is no answer, or the beginning of one that is not a token
	Millis     float64 // from the first try to the end of the last answer
	Tries      int
	// Failures are those of the tries before the last one.
	Failures []string `json:",omitempty"`
}

// Summary stands for the answers that an asker with -summary does not write: tokens of
// the identity that it wants, from the first try. It counts from the asker's start.
type Summary struct {
	Right       int
	WorstMillis float64
}

// Line is a line of the log.
type Line struct {
	Answer  *Answer  `json:",omitempty"`
	Summary *Summary `json:",omitempty"`
}

// Read reads a log: the answers, and the last summary.
func Read(log io.Reader) (all []Answer, last Summary, err error) {
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var line Line
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return nil, Summary{}, fmt.Errorf("not a line of an asker's: %q: %w", lines.Text(), err)
		}
		if line.Answer != nil {
			all = append(all, *line.Answer)
		}
		if line.Summary != nil {
			last = *line.Summary
		}
	}
	return all, last, lines.Err()
}
