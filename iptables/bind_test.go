package iptables

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/iptables/ebpf"
)

// As long as it is not known which host-network pods are bound, none is left alone that was redirected.
func TestBindUnknown(t *testing.T) {
	known := false
	r := &Reconciler{programs: ebpf.New(ebpf.Config{}), cfg: Config{
		HostNetworkPods: func() (_, _ []string, _ bool) { return nil, nil, known }, Logger: slog.New(slog.DiscardHandler),
	}}
	r.status.Store(&Status{InPlace: map[string]bool{partRedirect: true}})
	assert.Nil(t, r.bind())
	assert.Empty(t, r.lastBind)
	known = true
	r.bind()
	assert.NotEmpty(t, r.lastBind, "the programs were told, which are not in place here")
}
