package ebpf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPodUID(t *testing.T) {
	const uid, hash = "0f4ab78c-91d2-4c3f-a4e5-1d7a5d1e2f3b", "0123456789abcdef0123456789abcdef"
	for name, want := range map[string]string{
		"pod" + uid:  uid,
		"pod" + hash: hash,
		"kubepods-pod0f4ab78c_91d2_4c3f_a4e5_1d7a5d1e2f3b.slice":                uid,
		"kubepods-burstable-pod0f4ab78c_91d2_4c3f_a4e5_1d7a5d1e2f3b.slice":      uid,
		"pod-kubepods-besteffort-pod0f4ab78c_91d2_4c3f_a4e5_1d7a5d1e2f3b.slice": uid,
		"kubepods-burstable-pod" + hash + ".slice":                              hash,
		"kubepods": "", "kubepods.slice": "", "kubepods-burstable.slice": "", "burstable": "", "besteffort": "",
		"pod": "", "kubepods-pod.slice": "", "pod../x": "", "pod a": "", "pod" + strings.Repeat("a", 65): "",
		"cri-containerd-" + hash + ".scope": "", "crio-pod" + uid + ".scope": "",
	} {
		got, ok := podUID(name)
		assert.Equal(t, want, got, name)
		assert.Equal(t, want != "", ok, name)
	}
}

// Whatever a cgroup is called, a UID is one that the kubelet would call so.
func FuzzPodUID(f *testing.F) {
	for _, name := range []string{"pod1", "kubepods-pod1_2.slice", "kubepods-burstable-pod1.slice", "a-pod_.slice", "pod-pod.slice", "pod", ".slice"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		uid, ok := podUID(name)
		if !ok {
			assert.Empty(t, uid)
			return
		}
		assert.NotEmpty(t, uid)
		assert.LessOrEqual(t, len(uid), 64)
		assert.NotContains(t, uid, "/")
		suffix := strings.ReplaceAll(uid, "-", "_") + ".slice"
		assert.True(t, name == "pod"+uid || strings.HasSuffix(strings.ReplaceAll(name, "-", "_"), suffix), name)
	})
}

// The index has pods' own cgroups only, and finding one costs no memory.
func TestPodsBelow(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"pod1/podx", "burstable/pod2/pody/podz", "besteffort/pod3", "besteffort/other", "system"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "podfile"), nil, 0o644))
	id := func(dir string) cgroupID {
		id, err := idOf(filepath.Join(root, dir))
		require.NoError(t, err)
		return id
	}
	want := map[cgroupID]string{id("pod1"): "1", id("burstable/pod2"): "2", id("besteffort/pod3"): "3"}
	got, err := podsBelow(root)
	require.NoError(t, err)
	assert.Equal(t, want, got)

	p := New(Config{})
	p.tree.Store(&root)
	lookup := func(outer, inner string) (string, error) { return p.podOf(id(outer), id(inner)) }
	uid, err := lookup("pod1", "pod1/podx")
	require.NoError(t, err)
	assert.Equal(t, "1", uid)
	_, err = lookup("system", "besteffort/other")
	require.ErrorIs(t, err, ErrNoPod)
	require.NoError(t, os.Mkdir(filepath.Join(root, "besteffort/pod4"), 0o755))
	uid, err = lookup("besteffort", "besteffort/pod4")
	require.NoError(t, err, "a new pod")
	assert.Equal(t, "4", uid)
	outer, inner := id("besteffort"), id("besteffort/pod3")
	assert.Zero(t, testing.AllocsPerRun(100, func() { _, _ = p.podOf(outer, inner) }))
}
