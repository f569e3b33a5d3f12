package status

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	screenshots = flag.String("screenshots", "", "directory to keep the screenshots in")
	update      = flag.Bool("update", false, "write docs/images/status.png")
)

// TestInABrowser shows the page in headless Chromium, in two themes and on two widths: nothing is
// wider than the screen, each theme has its own background, no script of a pod's name runs, and
// the page loads nothing else.
func TestInABrowser(t *testing.T) {
	chromium := browser(t)
	var asked []string
	s := sample()
	if *screenshots == "" { // nobody looks
		s.Pods[0].Name, s.Pods[0].Fix = strings.Repeat("long", 60), `<script>document.body.style.background = "red"</script><style>body { background: red }</style>`
		s.Pods[3].Tokens[0].Resource, s.Agent.Node = strings.Repeat("x", maxResource), strings.Repeat("node", 20)
		s.Pods[5].Name = strings.Repeat("quiet", 50)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RequestURI())
		Handler(func() Snapshot { return s }, http.NotFoundHandler()).ServeHTTP(w, r)
	}))
	defer server.Close()
	dir := *screenshots
	if dir == "" {
		dir = t.TempDir()
	}
	for _, width := range []int{375, 1280} {
		for _, theme := range []string{"light", "dark"} {
			t.Run(fmt.Sprintf("%d px, %s", width, theme), func(t *testing.T) {
				file := filepath.Join(dir, fmt.Sprintf("status-%d-%s.png", width, theme))
				take(t, chromium, server.URL+Page+"?refresh=off", file, width, theme)
				shot := open(t, file)
				assert.Equal(t, width, shot.Bounds().Dx())
				background := color.GrayModel.Convert(shot.At(1, 1)).(color.Gray).Y
				assert.Equal(t, theme == "dark", background < 64, "the background is %d", background)
				// The margins are empty from top to bottom: nothing runs out of the screen.
				for y := range shot.Bounds().Dy() {
					for _, x := range []int{1, width - 2} {
						require.Equal(t, shot.At(1, 1), shot.At(x, y), "at %d, %d", x, y)
					}
				}
			})
		}
	}
	if *update {
		s = sample()
		file := filepath.Join(dir, "status.png")
		take(t, chromium, server.URL+Page+"?refresh=off", file, 1280, "light")
		writePalette(t, "../../../docs/images/status.png", open(t, file), 1205)
	}
	for _, uri := range asked {
		assert.Contains(t, []string{Page + "?refresh=off", "/favicon.ico"}, uri)
	}
}

// browser returns Chromium's command. A machine without may skip the test; CI must not.
func browser(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil && os.Getenv("CI") == "" && !errors.Is(err, fs.ErrPermission) {
		t.Skip("chromium is not installed: run deploy/packages.sh chromium to test the status page in a browser")
	}
	require.NoError(t, err, "run deploy/packages.sh chromium, as make unit does")
	return path
}

// take takes a screenshot of a page.
func take(t *testing.T, chromium, url, file string, width int, theme string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	args := []string{
		"--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions", "--disable-background-networking", "--no-proxy-server",
		"--user-data-dir=" + t.TempDir(), fmt.Sprintf("--window-size=%d,%d", width, map[int]int{375: 2900, 1280: 1750}[width]), "--screenshot=" + file, "--virtual-time-budget=2000",
	}
	if theme == "dark" {
		args = append(args, "--blink-settings=preferredColorScheme=0")
	} else {
		args = append(args, "--blink-settings=preferredColorScheme=1")
	}
	out, err := exec.CommandContext(ctx, chromium, append(args, url)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func open(t *testing.T, file string) image.Image {
	t.Helper()
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	shot, err := png.Decode(f)
	require.NoError(t, err)
	return shot
}

// writePalette writes the upper part of a screenshot with its most frequent colors alone: a third
// of the bytes.
func writePalette(t *testing.T, file string, shot image.Image, height int) {
	t.Helper()
	count := make(map[color.Color]int)
	bounds := image.Rect(0, 0, shot.Bounds().Dx(), height)
	for y := range height {
		for x := range bounds.Dx() {
			count[shot.At(x, y)]++
		}
	}
	colors := slices.SortedFunc(maps.Keys(count), func(a, b color.Color) int { return count[b] - count[a] })
	small := image.NewPaletted(bounds, colors[:min(len(colors), 64)])
	for y := range height {
		for x := range bounds.Dx() {
			small.Set(x, y, shot.At(x, y))
		}
	}
	var b bytes.Buffer
	require.NoError(t, (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, small))
	require.Less(t, b.Len(), 120<<10)
	require.NoError(t, os.WriteFile(file, b.Bytes(), 0o644)) //nolint:gosec // a page for everybody
}
