package startuptaint

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]corev1.Taint{
		"example.com/not-ready:NoSchedule":     {Key: "example.com/not-ready", Effect: corev1.TaintEffectNoSchedule},
		"not-ready=true:NoExecute":             {Key: "not-ready", Value: "true", Effect: corev1.TaintEffectNoExecute},
		"example.com/not-ready=:NoSchedule":    {Key: "example.com/not-ready", Effect: corev1.TaintEffectNoSchedule},
		"example.com/not-ready=a.b:NoSchedule": {Key: "example.com/not-ready", Value: "a.b", Effect: corev1.TaintEffectNoSchedule},
	} {
		got, err := Parse(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, got, text)
	}
	for _, text := range []string{
		"", "not-ready", "not-ready:", ":NoSchedule", "=true:NoSchedule", "not-ready:PreferNoSchedule", "not-ready:noschedule",
		"a/b/c:NoSchedule", "not ready:NoSchedule", "not-ready=a=b:NoSchedule", "not-ready=a b:NoSchedule", "not-ready:NoSchedule:NoExecute", "not-ready:NoSchedule-",
	} {
		_, err := Parse(text)
		assert.Error(t, err, text)
	}
}

func TestDecide(t *testing.T) {
	broken, ok := errors.New("broken"), error(nil)
	start := time.Now()
	type step struct {
		at           time.Duration
		ready, rules error
		want         action
	}
	for name, steps := range map[string][]step{
		"an agent that starts": {
			{0, broken, broken, leave}, {rulesGrace - 1, broken, ok, leave}, {rulesGrace, ok, ok, remove},
		},
		"an agent that cannot write its rules": {
			{0, broken, broken, leave},
			{rulesGrace - 1, broken, broken, leave},
			{rulesGrace, broken, broken, set},
			{2 * rulesGrace, broken, broken, set},
			{2*rulesGrace + 1, broken, ok, leave},
			{2*rulesGrace + 2, ok, ok, remove},
		},
		"failures with a repair in between": {
			{0, ok, ok, remove},
			{1, broken, broken, leave},
			{rulesGrace, broken, ok, leave},
			{rulesGrace + 1, broken, broken, leave},
			{2 * rulesGrace, broken, broken, leave},
			{2*rulesGrace + 1, broken, broken, set},
		},
		"an agent that is not ready for another reason": {
			{0, ok, ok, remove}, {1, broken, ok, leave}, {10 * rulesGrace, broken, ok, leave},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var now step
			m := &Manager{cfg: Config{Ready: func() error { return now.ready }, Rules: func() error { return now.rules }}}
			for _, now = range steps {
				assert.Equal(t, now.want, m.decide(start.Add(now.at)), now.at)
			}
		})
	}
}

func TestMergePatch(t *testing.T) {
	taint := corev1.Taint{Key: "a", Effect: corev1.TaintEffectNoSchedule}
	patch, err := mergePatch("42", []corev1.Taint{taint})
	require.NoError(t, err)
	assert.JSONEq(t, `{"metadata":{"resourceVersion":"42"},"spec":{"taints":[{"key":"a","effect":"NoSchedule"}]}}`, string(patch))
	patch, err = mergePatch("42", []corev1.Taint{})
	require.NoError(t, err)
	assert.JSONEq(t, `{"metadata":{"resourceVersion":"42"},"spec":{"taints":null}}`, string(patch))
}
