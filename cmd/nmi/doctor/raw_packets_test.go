package doctor

import (
	"testing"

	"github.com/stretchr/testify/assert"
	corev1 "k8s.io/api/core/v1"
)

func TestMayUseRawPackets(t *testing.T) {
	capabilities := func(add, drop []corev1.Capability) *corev1.SecurityContext {
		return &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: add, Drop: drop}}
	}
	all := capabilities(nil, []corev1.Capability{"ALL"})
	for name, tc := range map[string]struct {
		contexts []*corev1.SecurityContext
		may      bool
	}{
		"by default":         {[]*corev1.SecurityContext{nil}, true},
		"nothing said":       {[]*corev1.SecurityContext{{}}, true},
		"another dropped":    {[]*corev1.SecurityContext{capabilities(nil, []corev1.Capability{"CHOWN"})}, true},
		"all dropped":        {[]*corev1.SecurityContext{all}, false},
		"dropped":            {[]*corev1.SecurityContext{capabilities(nil, []corev1.Capability{"cap_net_raw"})}, false},
		"given back":         {[]*corev1.SecurityContext{capabilities([]corev1.Capability{"NET_RAW"}, []corev1.Capability{"all"})}, true},
		"by one of several":  {[]*corev1.SecurityContext{all, nil}, true},
		"privileged, so all": {[]*corev1.SecurityContext{{Privileged: new(true)}}, false},
	} {
		var pod corev1.PodSpec
		for _, sc := range tc.contexts {
			pod.Containers = append(pod.Containers, corev1.Container{SecurityContext: sc})
		}
		assert.Equal(t, tc.may, mayUseRawPackets(pod), name)
	}
	init := corev1.PodSpec{InitContainers: []corev1.Container{{}}, Containers: []corev1.Container{{SecurityContext: all}}}
	assert.True(t, mayUseRawPackets(init))
}
