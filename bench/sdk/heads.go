// Package sdk has Azure's SDKs as clients: the request heads that they send, recorded,
// for load generators to repeat; and the SDKs themselves, in the programs of
// deploy/clients.
package sdk

import (
	"embed"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

//go:embed heads/*.txt
var files embed.FS

// ID stands in a head for the value of the header x-ms-client-request-id or
// X-Ms-Client-Request-Id, which is another UUID in each request.
const ID = "{uuid}"

// Head is the request head of an SDK.
type Head struct {
	Name    string // of the SDK, as deploy/clients knows it
	Version string // of the module or package that sent it
	Text    string // with CRLF and the empty line; ID where the SDK puts a new one
}

// Heads returns the recorded heads, sorted by file name.
func Heads() ([]Head, error) {
	entries, err := files.ReadDir("heads")
	if err != nil {
		return nil, err
	}
	var heads []Head
	for _, entry := range entries {
		text, err := files.ReadFile("heads/" + entry.Name())
		if err != nil {
			return nil, err
		}
		head, err := parseHead(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", entry.Name(), err)
		}
		heads = append(heads, head)
	}
	return heads, nil
}

// Find returns the recorded head of an SDK.
func Find(name string) (Head, error) {
	heads, err := Heads()
	if err != nil {
		return Head{}, err
	}
	i := slices.IndexFunc(heads, func(h Head) bool { return h.Name == name })
	if i < 0 {
		return Head{}, fmt.Errorf("no recorded head of %q", name)
	}
	return heads[i], nil
}

// A file is a comment line, "# <name> <version>", and the head with plain line ends.
func parseHead(text string) (Head, error) {
	comment, rest, _ := strings.Cut(text, "\n")
	title, ok := strings.CutPrefix(comment, "# ")
	i := strings.LastIndexByte(title, ' ')
	if !ok || i < 0 {
		return Head{}, fmt.Errorf("first line %q: want # <name> <version>", comment)
	}
	if !strings.HasPrefix(rest, "GET ") || !strings.HasSuffix(rest, "\n\n") || strings.Contains(rest, "\r") {
		return Head{}, fmt.Errorf("want a GET request that ends with an empty line")
	}
	return Head{Name: title[:i], Version: title[i+1:], Text: strings.ReplaceAll(rest, "\n", "\r\n")}, nil
}

func (h Head) format() string {
	return "# " + h.Name + " " + h.Version + "\n" + strings.ReplaceAll(h.Text, "\r\n", "\n")
}

var requestID = regexp.MustCompile(`(?i)(\r\nx-ms-client-request-id: *)[0-9a-f-]{36}\r\n`)

// kernelSuffix is what a builder of kernels appends to the version in a User-Agent.
var kernelSuffix = regexp.MustCompile(`(\bLinux[- ][0-9.]+)-[^;)]*`)

// generalize puts ID in the place of a head's request ID, and removes what is of the
// machine that recorded it.
func generalize(head string) string {
	head = requestID.ReplaceAllString(head, "${1}"+ID+"\r\n")
	return kernelSuffix.ReplaceAllString(head, "$1")
}
