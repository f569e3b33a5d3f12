package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

const cgroupRoot = "/sys/fs/cgroup"

// MemoryLimit is a cgroup of version 1 or 2, whichever has this machine's memory
// controller. The programs that are started inside it, and those that they start,
// are killed by the kernel when together they use more than the limit, as a
// container's are.
//
// Kernel memory (page tables, sockets, descriptors) counts in both versions.
// Socket buffers of TCP count towards the limit in version 2 only; version 1
// accounts for them apart, and Peak adds them.
type MemoryLimit struct {
	dir     string
	version int
}

// limits counts those that were made, for their names.
var limits atomic.Int64

// NewMemoryLimit makes a cgroup with a limit in bytes, and without swap, as on a
// node. It needs root. Close it when its programs have ended.
func NewMemoryLimit(bytes int64) (*MemoryLimit, error) {
	m, err := memoryController()
	if err != nil {
		return nil, err
	}
	m.dir = filepath.Join(m.dir, fmt.Sprintf("nmi-testbed-%d-%d", os.Getpid(), limits.Add(1)))
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		return nil, fmt.Errorf("making a cgroup: %w", err)
	}
	for _, setting := range m.settings(bytes) {
		err := os.WriteFile(filepath.Join(m.dir, setting.file), []byte(strconv.FormatInt(setting.value, 10)), 0o644)
		if err != nil && (!setting.optional || !errors.Is(err, fs.ErrNotExist)) {
			return nil, errors.Join(fmt.Errorf("limiting the memory of a cgroup: %w", err), m.Close())
		}
	}
	return m, nil
}

type cgroupSetting struct {
	file     string
	value    int64
	optional bool // the kernel may be built or started without it
}

// settings are in the order in which the kernel takes them: of version 1, memory
// and swap together must not be less than memory alone.
func (m *MemoryLimit) settings(bytes int64) []cgroupSetting {
	if m.version == 2 {
		return []cgroupSetting{{"memory.max", bytes, false}, {"memory.swap.max", 0, true}}
	}
	return []cgroupSetting{
		{"memory.limit_in_bytes", bytes, false},
		{"memory.memsw.limit_in_bytes", bytes, true},
		{"memory.kmem.tcp.limit_in_bytes", bytes, true}, // TCP's buffers are not counted without a limit
	}
}

// memoryController finds the top of the hierarchy that has the memory controller.
func memoryController() (*MemoryLimit, error) {
	if controllers, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil && hasWord(controllers, "memory") {
		enabled, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"))
		if err == nil && !hasWord(enabled, "memory") {
			err = os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+memory"), 0o644)
		}
		if err != nil {
			return nil, fmt.Errorf("enabling the memory controller for new cgroups (inside a container its root must hold no process): %w", err)
		}
		return &MemoryLimit{dir: cgroupRoot, version: 2}, nil
	}
	dir := filepath.Join(cgroupRoot, "memory")
	if _, err := os.Stat(filepath.Join(dir, "memory.limit_in_bytes")); err != nil {
		return nil, fmt.Errorf("no cgroup memory controller, of version 2 in %s or of version 1 in %s: %w", cgroupRoot, dir, err)
	}
	return &MemoryLimit{dir: dir, version: 1}, nil
}

// NewManifestMemoryLimit makes a cgroup with the limit that the DaemonSet's
// manifest sets, and returns the container's GOMEMLIMIT, as "GOMEMLIMIT=110MiB",
// for the agent's environment.
func NewManifestMemoryLimit() (m *MemoryLimit, env []string, err error) {
	container, err := manifestContainer()
	if err != nil {
		return nil, nil, err
	}
	for _, variable := range container.Env {
		if variable.Name == "GOMEMLIMIT" {
			env = append(env, variable.Name+"="+variable.Value)
		}
	}
	limit := container.Resources.Limits.Memory().Value()
	if limit == 0 {
		return nil, nil, errors.New("the DaemonSet's manifest sets no memory limit")
	}
	m, err = NewMemoryLimit(limit)
	return m, env, err
}

// manifestContainer is the agent's container in the DaemonSet's manifest.
func manifestContainer() (corev1.Container, error) {
	root, err := Root()
	if err != nil {
		return corev1.Container{}, err
	}
	objects, err := ReadManifests(os.DirFS(filepath.Join(root, "deploy")), "manifests/daemonset.yaml")
	if err != nil {
		return corev1.Container{}, err
	}
	for _, object := range objects {
		containers, found, err := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
		if err != nil || !found || len(containers) != 1 {
			continue
		}
		var container corev1.Container
		fields, ok := containers[0].(map[string]any)
		if !ok {
			continue
		}
		err = runtime.DefaultUnstructuredConverter.FromUnstructured(fields, &container)
		return container, err
	}
	return corev1.Container{}, errors.New("deploy/manifests/daemonset.yaml has no DaemonSet of one container")
}

// launcher is a command that starts the command after it inside the cgroup, with
// the same process ID.
func (m *MemoryLimit) launcher() []string {
	return []string{"/bin/sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(m.dir, "cgroup.procs")}
}

// Peak is the most memory that the programs inside have used at once, in bytes.
// In version 1 it is the sum of two peaks, which may have been at different times.
func (m *MemoryLimit) Peak() (int64, error) {
	if m.version == 2 {
		return m.read("memory.peak") // since Linux 5.19
	}
	peak, err := m.read("memory.max_usage_in_bytes")
	if err != nil {
		return 0, err
	}
	tcp, err := m.read("memory.kmem.tcp.max_usage_in_bytes")
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return peak + tcp, err
}

// OOMKills is how many processes inside the kernel has killed because of the
// limit.
func (m *MemoryLimit) OOMKills() (int64, error) {
	name := "memory.events"
	if m.version == 1 {
		name = "memory.oom_control"
	}
	text, err := os.ReadFile(filepath.Join(m.dir, name))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseInt(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s does not count oom_kill", name)
}

// Close removes the cgroup. Its programs must have ended.
func (m *MemoryLimit) Close() error {
	if err := os.Remove(m.dir); err != nil {
		return fmt.Errorf("removing a cgroup, which must be empty: %w", err)
	}
	return nil
}

func (m *MemoryLimit) read(name string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(m.dir, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}

func hasWord(text []byte, word string) bool {
	for field := range strings.FieldsSeq(string(text)) {
		if field == word {
			return true
		}
	}
	return false
}
