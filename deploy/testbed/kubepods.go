package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Kubepods is what agents in mode ebpf need of a node: a cgroup that all pods are in, as the
// kubelet makes it, and a BPF file system that outlives them. It is a part of the machine's
// cgroup hierarchy, and the file system is in a mount namespace of its own: nothing else of the
// machine is touched.
type Kubepods struct {
	CgroupRoot string // where cgroup v2 is mounted
	tree       string // in it
	mounts     *Program
	agents     int
}

// NewKubepods makes a tree without pods. Close it when done, after all that runs in it.
func NewKubepods() (k *Kubepods, err error) {
	k = &Kubepods{}
	if k.CgroupRoot, err = cgroup2Root(); err != nil {
		return nil, err
	}
	k.tree = filepath.Join(k.CgroupRoot, "nmi-testbed-"+strconv.Itoa(os.Getpid()))
	if err := os.MkdirAll(filepath.Join(k.tree, "kubepods"), 0o755); err != nil {
		return nil, err
	}
	k.mounts, err = StartProgram("unshare", nil, "--mount", "--propagation=private", "sh", "-c", "mount -t bpf bpf /sys/fs/bpf && echo mounted && exec sleep infinity")
	for err == nil && k.mounts.Log() == "" {
		select {
		case <-k.mounts.Done():
			err = errors.New("mounting a BPF file system failed")
		case <-time.After(time.Millisecond):
		}
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

func cgroup2Root() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// Inside is a command that starts the one after it where the agents' programs are pinned.
func (k *Kubepods) Inside() []string {
	return []string{"nsenter", "--mount", "--target", strconv.Itoa(k.mounts.PID())}
}

// Agent is Inside for an agent: in the container of a new pod, with the capabilities of the manifest
// for mode ebpf. With rules it has what the default manifest gives, which lacks the BPF file system.
func (k *Kubepods) Agent(rules bool) (launcher []string, err error) {
	k.agents++
	dir := filepath.Join(k.tree, fmt.Sprintf("kubepods/burstable/podagent%d/nmi", k.agents))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	capabilities := "-all,+net_admin,+net_raw"
	if !rules {
		launcher, capabilities = k.Inside(), capabilities+",+bpf"
	}
	return append(launcher, "sh", "-c", "echo 0 > "+dir+`/cgroup.procs && exec setpriv --bounding-set=`+capabilities+` "$@"`, "sh"), nil
}

// Cleanup runs nmi cleanup, with the flags that it is given.
func (k *Kubepods) Cleanup(flags ...string) error {
	binary, err := AgentBinary()
	if err != nil {
		return err
	}
	command := append(append(k.Inside(), binary, "cleanup"), flags...)
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("nmi cleanup: %w: %s", err, out)
	}
	return nil
}

// Close removes the cgroups and what was pinned.
func (k *Kubepods) Close() error {
	var err error
	if k.mounts != nil {
		err = k.mounts.Kill()
	}
	return errors.Join(err, removeCgroups(k.tree))
}

// removeCgroups removes a cgroup with all below it, the innermost first.
func removeCgroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() {
			errs = append(errs, removeCgroups(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}
