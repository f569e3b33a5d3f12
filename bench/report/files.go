package report

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
)

// Write writes the report to dir: <date>-cached.json, .md, and two plots, each in a
// light and a dark version. plotted are the servers that the plots show.
func (r *Report) Write(dir string, plotted []string) error {
	name := r.Date + "-cached"
	var plots []string
	write := func(suffix string, text []byte) error {
		return os.WriteFile(filepath.Join(dir, name+suffix), text, 0o644)
	}
	errs := []error{os.MkdirAll(dir, 0o755)}
	for _, plot := range []struct {
		name string
		draw func([]string, theme) string
	}{{"throughput", r.throughput}, {"latency", r.latency}} {
		for _, t := range []theme{light, dark} {
			suffix := "-" + plot.name + "-" + t.name + ".svg"
			if text := plot.draw(plotted, t); text != "" {
				plots = append(plots, name+suffix)
				errs = append(errs, write(suffix, []byte(text)))
			}
		}
	}
	text, err := json.MarshalIndent(r, "", "  ")
	return errors.Join(append(errs, err, write(".json", append(text, '\n')), write(".md", []byte(r.Markdown(plots...))))...)
}
