package proxy

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

// What a request line may look like (RFC 9112, 2.2 and 3).
func TestOddRequestLines(t *testing.T) {
	const rest = "Host: h\r\nMetadata: true\r\n\r\n"
	line := func(line string) string { return line + "\r\n" + rest }
	open := told{"200 open", "GET " + versions}
	refusedMethod := told{answers: "405 open"}
	tryAll(t, map[string]odd{
		"an empty line before it":    {raw: "\r\n" + get(versions)},
		"a space before it":          {raw: " " + get(versions)},
		"HTTP/0.9":                   {raw: "GET " + versions + "\r\n"},
		"HTTP/1.0":                   {raw: "GET " + versions + " HTTP/1.0\r\n\r\n", bound: told{"200 closed", "GET " + versions}},
		"HTTP/1.0 kept alive":        {raw: "GET " + versions + " HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", bound: told{"200 closed", "GET " + versions}},
		"HTTP/1.2":                   {raw: line("GET " + versions + " HTTP/1.2"), bound: open},
		"HTTP/1.10":                  {raw: line("GET " + versions + " HTTP/1.10")},
		"HTTP/2.0":                   {raw: line("GET " + versions + " HTTP/2.0"), bound: told{answers: "505 closed"}},
		"HTTP/3.0":                   {raw: line("GET " + versions + " HTTP/3.0"), bound: told{answers: "505 closed"}},
		"http/1.1":                   {raw: line("GET " + versions + " http/1.1")},
		"two spaces":                 {raw: line("GET  " + versions + " HTTP/1.1")},
		"a space in the target":      {raw: line("GET " + versions + " x HTTP/1.1")},
		"a tab for a space":          {raw: line("GET\t" + versions + "\tHTTP/1.1")},
		"a space after it":           {raw: line("GET " + versions + " HTTP/1.1 ")},
		"a bare CR in it":            {raw: line("GET " + versions + "?\rx HTTP/1.1")},
		"a bare LF after it":         {raw: "GET " + versions + " HTTP/1.1\n" + rest, bound: open},
		"NUL in the target":          {raw: line("GET " + versions + "?\x00 HTTP/1.1")},
		"NUL in the method":          {raw: line("G\x00T " + versions + " HTTP/1.1")},
		"high bytes in the target":   {line("GET " + versions + "\xff HTTP/1.1"), told{answers: "404 open"}, told{"400 open", "GET " + versions + "%FF"}},
		"a fragment":                 {line("GET " + versions + "#x HTTP/1.1"), told{answers: "404 open"}, told{"400 open", "GET " + versions + "%23x"}},
		"a fragment before the path": {raw: line("GET http://h#" + versions + " HTTP/1.1")},
		"no slash before it":         {raw: line("GET metadata/versions HTTP/1.1")},
		"no path":                    {line("GET http://h?" + versions + " HTTP/1.1"), told{answers: "404 open"}, told{"400 open", "GET /?" + versions}},
		"another host":               {raw: line("GET http://example.com" + versions + " HTTP/1.1"), bound: open},
		"another host and user":      {raw: line("GET http://user:password@example.com:8080" + versions + " HTTP/1.1"), bound: open},
		"https":                      {raw: line("GET https://example.com" + versions + " HTTP/1.1"), bound: open},
		"HTTP":                       {raw: line("GET HTTP://EXAMPLE.COM" + versions + " HTTP/1.1"), bound: open},
		"another host, not on the list": {
			line("GET http://example.com" + nowhere + " HTTP/1.1"),
			told{answers: "404 open"},
			told{"404 open", "GET " + nowhere},
		},
		"a backslash after the host":  {raw: line(`GET http://h\metadata/versions HTTP/1.1`)},
		"ftp":                         {line("GET ftp://example.com" + nowhere + " HTTP/1.1"), told{answers: "404 open"}, told{"404 open", "GET " + nowhere}},
		"an authority":                {raw: line("GET 169.254.169.254:80 HTTP/1.1")},
		"CONNECT":                     {raw: line("CONNECT 169.254.169.254:80 HTTP/1.1"), bound: refusedMethod},
		"CONNECT and a hidden one":    {line("CONNECT h:80 HTTP/1.1") + hidden, told{answers: "405 404 open"}, told{"405 200 open", "GET " + info}},
		"CONNECT to a path":           {raw: line("CONNECT " + tokenURL + " HTTP/1.1"), bound: refusedMethod},
		"CONNECT to what is absolute": {raw: line("CONNECT http://h" + versions + " HTTP/1.1"), bound: refusedMethod},
		"OPTIONS *":                   {line("OPTIONS * HTTP/1.1"), told{answers: "404 open"}, told{"200 open", ""}},
		"GET *":                       {line("GET * HTTP/1.1"), told{answers: "404 open"}, told{"400 open", "GET *"}},
		"the preface of HTTP/2":       {raw: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", bound: told{answers: "405 closed"}},
		"a method in small letters":   {line("get " + versions + " HTTP/1.1"), told{answers: "405 open"}, told{"200 open", "get " + versions}},
		"an invented method":          {line("GIVE " + tokenURL + " HTTP/1.1"), told{answers: "405 open"}, told{"405 open", "GIVE " + tokenURL}},
		"nonsense after two requests": {get(versions) + get(nowhere) + "nonsense\r\n\r\n", told{"200 404 400 closed", "GET " + versions}, told{"200 404 400 closed", "GET " + versions + ", GET " + nowhere}},
		"TLS":                         {raw: "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n"},
	})
}

// What fields may look like (RFC 9112, 5), and those that are about the connection.
func TestOddHeaders(t *testing.T) {
	open := told{"200 open", "GET " + versions}
	token := told{answers: "200 open"}
	nodes := told{"200 open", "GET " + tokenURL}
	bare := func(headers ...string) string {
		return "GET " + tokenURL + " HTTP/1.1\r\nHost: h\r\n" + strings.Join(append(headers, "\r\n"), "\r\n")
	}
	noMetadata := told{answers: "400 open"}
	tryAll(t, map[string]odd{
		"no Host":                      {raw: "GET " + versions + " HTTP/1.1\r\n\r\n"},
		"an empty Host":                {raw: "GET " + versions + " HTTP/1.1\r\nHost:\r\n\r\n", bound: open},
		"two Hosts":                    {raw: get(versions, "Host: i")},
		"a Host that is none":          {raw: "GET " + versions + " HTTP/1.1\r\nHost: a b\r\n\r\n"},
		"a folded line":                {raw: get(versions, "X: a", "\tb"), bound: open},
		"a folded first line":          {raw: "GET " + versions + " HTTP/1.1\r\n Metadata: true\r\nHost: h\r\n\r\n"},
		"Metadata on a folded line":    {raw: bare("X: a", " Metadata: true"), bound: noMetadata},
		"Metadata's value folded":      {bare("Metadata:", " true"), token, nodes},
		"Metadata's value twice":       {raw: bare("Metadata: true, true"), bound: noMetadata},
		"Metadata twice":               {raw: bare("Metadata: true", "metadata: true"), bound: noMetadata},
		"Metadata and False":           {raw: bare("Metadata: true", "METADATA: False"), bound: noMetadata},
		"Metadata with an underscore":  {raw: bare("_Metadata: true", "Metadata_: true"), bound: noMetadata},
		"Metadata after a NUL":         {raw: bare("\x00Metadata: true")},
		"Metadata with a space":        {raw: bare("Metadata : true")},
		"Metadata with high bytes":     {raw: bare("Meta\xc2\xaddata: true")},
		"Metadata's value and a space": {bare("Metadata:  true\t"), token, nodes},
		"Metadata's value and a NBSP":  {raw: bare("Metadata: true\xc2\xa0"), bound: noMetadata},
		"Metadata's value and a VT":    {raw: bare("Metadata: true\v")},
		// A hop drops what Connection names (RFC 9110, 7.6.1). IMDS then refuses what has
		// lost its Metadata, and must see that X-Forwarded-For was there.
		"Metadata named by Connection":        {get(tokenURL, "Connection: Metadata"), token, told{"400 open", "GET " + tokenURL}},
		"X-Forwarded-For named by Connection": {get("/metadata/identity/../identity/oauth2/token?api-version=1&resource=r", "Connection: X-Forwarded-For", "X-Forwarded-For: 1.2.3.4"), told{answers: "404 open"}, told{"400 open", "GET /metadata/identity/../identity/oauth2/token?api-version=1&resource=r"}},
		"X-Forwarded-For named and close":     {raw: get(tokenURL, "Connection: close, X-Forwarded-For", "X-Forwarded-For: 1.2.3.4"), bound: told{answers: "400 closed"}},
		"x-forwarded-for":                     {raw: get(tokenURL, "x-forwarded-for: 1.2.3.4"), bound: noMetadata},
		"X-FORWARDED-FOR, empty":              {raw: get(tokenURL, "X-FORWARDED-FOR:"), bound: noMetadata},
		"X-Forwarded-For twice":               {raw: get(tokenURL, "X-Forwarded-For:", "X-Forwarded-For: 1.2.3.4"), bound: noMetadata},
		"X-Forwarded-For with a space":        {raw: get(tokenURL, "X-Forwarded-For : 1.2.3.4")},
		"no colon":                            {raw: get(versions, "X")},
		"no name":                             {raw: get(versions, ": x")},
		"a bare CR in a value":                {raw: get(versions, "X: a\rTransfer-Encoding: chunked")},
		"a bare LF after a value":             {raw: get(versions, "X: a\nY: b"), bound: open},
		"bare LFs at the end":                 {raw: "GET " + versions + " HTTP/1.1\nHost: h\n\n", bound: open},
		"NUL in a value":                      {raw: get(versions, "X: \x00")},
		"NUL in a name":                       {raw: get(versions, "X\x00: a")},
		"high bytes in a value":               {raw: get(versions, "X: \xff\xfe"), bound: open},
		"high bytes in a name":                {raw: get(versions, "X\xff: a")},
		"upgrade to h2c":                      {get(versions, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"), noMetadata, open},
		"upgrade to h2c on the token path":    {get(tokenURL, "Connection: Upgrade", "Upgrade: h2c"), token, nodes},
		"upgrade to a websocket":              {get(versions, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"), noMetadata, open},
		"upgrade and a hidden one":            {get(versions, "Connection: Upgrade", "Upgrade: h2c") + hidden, told{answers: "400 404 open"}, told{"200 200 open", "GET " + versions + ", GET " + info}},
		"an upgrade to nothing":               {get(versions, "Connection: Upgrade", "Upgrade:"), noMetadata, open},
	})
}

// What is too much: the header may have 8 KiB, its first line included.
func TestLargeRequests(t *testing.T) {
	tooLarge := told{answers: "431 closed"}
	passed := told{"200 open", "GET " + versions}
	full := get(versions, "X: "+strings.Repeat("x", 8<<10-len(get(versions, "X: "))))
	assert.Len(t, full, 8<<10)
	tryAll(t, map[string]odd{
		"a long line":                         {raw: get(versions + "?" + strings.Repeat("x", 9<<10)), bound: tooLarge},
		"an endless line":                     {raw: "GET /" + strings.Repeat("x", 64<<10), bound: tooLarge},
		"an endless space":                    {raw: strings.Repeat(" ", 64<<10), bound: tooLarge},
		"a header as large as may be":         {raw: full, bound: passed},
		"a header of 9 KiB":                   {raw: get(versions, "X: "+strings.Repeat("x", 9<<10)), bound: tooLarge},
		"a header of 9 KiB on the token path": {raw: get(tokenURL, "X: "+strings.Repeat("x", 9<<10)), bound: tooLarge},
		"as many lines as may be":             {raw: get(versions, strings.Repeat("X: y\r\n", maxHeadLines-5)+"X: y"), bound: passed},
		"one more":                            {raw: get(versions, strings.Repeat("X: y\r\n", maxHeadLines-4)+"X: y")},
		"a thousand headers":                  {raw: get(versions, strings.Repeat("X: y\r\n", 1000)+"X: y")},
		"two thousand":                        {raw: get(versions, strings.Repeat("X: y\r\n", 2000)+"X: y")},
		"a thousand cookies":                  {raw: get(versions, "Cookie: a=b"+strings.Repeat("; a=b", 1000)), bound: passed},
		"many expectations":                   {raw: get(versions, strings.Repeat("Te: y\r\n", 50)+"Expect: y"), bound: told{answers: "417 closed"}},
	})
}

// Whatever part of a request comes before its sender finishes, it is none.
func TestIncompleteRequest(t *testing.T) {
	w := newWorld(t, nil)
	whole := get(tokenURL+"&client_id="+one.ClientID, "Connection: close")
	for _, from := range []string{bound, excepted} {
		for n := range len(whole) {
			for _, status := range w.answers(t, from, whole[:n], "cut") {
				assert.Equal(t, "400", status, "%q", whole[:n])
			}
		}
	}
	assert.Zero(t, w.imds.Requests())
	assert.Equal(t, []string{"200"}, w.answers(t, bound, whole, "closed"))
}
