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
	write := func(suffix string, text []byte) error {
		return os.WriteFile(filepath.Join(dir, name+suffix), text, 0o644)
	}
	errs := []error{os.MkdirAll(dir, 0o755)}
	var plots []Plot
	for _, plot := range r.drawings() {
		files := Plot{Light: "-" + plot.name + "-light.svg", Dark: "-" + plot.name + "-dark.svg", Alt: plot.alt}
		text := plot.draw(plotted, light)
		if text == "" {
			continue
		}
		errs = append(errs, write(files.Light, []byte(text)), write(files.Dark, []byte(plot.draw(plotted, dark))))
		files.Light, files.Dark = name+files.Light, name+files.Dark
		plots = append(plots, files)
	}
	text, err := json.MarshalIndent(r, "", "  ")
	return errors.Join(append(errs, err, write(".json", append(text, '\n')), write(".md", []byte(r.Markdown(plots...))))...)
}

// drawing is a plot before it is drawn.
type drawing struct {
	name, alt string
	draw      func(servers []string, t theme) string
}

func (r *Report) drawings() []drawing {
	return []drawing{
		{"throughput", "Requests a second of each server under each load", r.throughput},
		{"latency", "Latency of each server by rate", r.latency},
	}
}
