package ebpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// The directories in Config.Pins. A map whose layout changes takes another name, so that both agents
// work while one takes over from the other; the rest they share, so that who is bound stays so.
const (
	linksDir = "links"
	mapsDir  = "maps-1"
)

// makePins makes the directories, for root alone.
func (p *Programs) makePins() error {
	if err := checkFileSystem(filepath.Dir(p.cfg.Pins)); err != nil {
		return err
	}
	for _, dir := range []string{p.cfg.Pins, filepath.Join(p.cfg.Pins, mapsDir), filepath.Join(p.cfg.Pins, linksDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return explainPins(p.cfg.Pins, err)
		}
	}
	return nil
}

// repin pins our maps again where somebody has removed that, with what is in them, and reports
// whether all that are pinned are ours. Another agent's are to be taken over.
func (p *Programs) repin(dir string) (ours bool, err error) {
	if err := p.makePins(); err != nil {
		return false, err
	}
	o := p.objects.kernelMaps
	for name, m := range map[string]*ebpf.Map{
		kernelMapBound: o.Bound, kernelMapClients: o.Clients, kernelMapConnecting: o.Connecting,
		kernelMapExempt: o.Exempt, kernelMapSockets: o.Sockets,
	} {
		pin := filepath.Join(dir, name)
		pinned, err := ebpf.LoadPinnedMap(pin, nil)
		if errors.Is(err, os.ErrNotExist) {
			unpinned, err := m.Clone() // m itself would be moved from where it was
			if err != nil {
				return false, err
			}
			err = unpinned.Pin(pin)
			_ = unpinned.Close()
			if err != nil {
				return false, fmt.Errorf("pinning the map %s: %w", name, explainPins(dir, err))
			}
			continue
		}
		if err != nil {
			return false, fmt.Errorf("pinned map %s: %w", pin, explain(err))
		}
		same, err := sameMap(pinned, m)
		_ = pinned.Close()
		if !same {
			return false, err
		}
	}
	return true, nil
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	first, err := a.Info()
	if err != nil {
		return false, err
	}
	second, err := b.Info()
	if err != nil {
		return false, err
	}
	id, _ := first.ID()
	other, _ := second.ID()
	return id == other, nil
}
