//go:build cluster

package e2e

import (
	"testing"
)

func TestBoundUnboundExcepted(t *testing.T) {
	s := begin(t, "A bound pod gets its identity's token, an unbound one none, an excepted one the node's.", theIMDS)
	s.bind("cart", cart)
	s.except("monitoring", "app", "monitoring")
	s.start(
		pod{name: "bound", binding: "cart", askers: []asker{asks(s.token(cart), s.refused(400, "client_id="+report.ClientID))}},
		pod{name: "unbound", askers: []asker{asks(s.refused(400), s.refused(400, "client_id="+cart.ClientID))}},
		pod{name: "excepted", labels: map[string]string{"app": "monitoring"}, askers: []asker{asks(s.nodeToken())}},
	)
	s.finish()
}
