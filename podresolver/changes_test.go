package podresolver

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// logged returns what was logged since the last call, without time and level.
func logged(out *bytes.Buffer) (lines []string) {
	for line := range strings.Lines(out.String()) {
		_, line, _ = strings.Cut(strings.TrimSpace(line), "level=")
		lines = append(lines, line)
	}
	out.Reset()
	return lines
}

func TestChangesAreLoggedOnce(t *testing.T) {
	var out bytes.Buffer
	h := newHarness(t, Config{Logger: slog.New(slog.NewTextHandler(&out, nil))})
	pod := func(labels map[string]string) *corev1.Pod {
		p := resolvertest.Pod("p", "10.0.0.1", "")
		p.Labels = labels
		return p
	}
	step := func(what string, want ...string) {
		t.Helper()
		h.update()
		h.update()
		assert.Equal(t, want, logged(&out), what)
	}
	cart, bound := resolvertest.Identity("cart", cartClient, ""), map[string]string{"aadpodidbinding": "cart"}
	h.put(pod(nil))
	step("a pod that nobody gives an identity")
	h.put(pod(bound))
	step("labelled", `INFO msg="decision changed" pod=shop/p gets=nothing before=nothing error="no identity for this pod: no AzureIdentityBinding in namespace \"shop\" has the selector \"cart\""`)
	h.put(resolvertest.Binding("cart", "cart", "cart"))
	step("bound", `INFO msg="decision changed" pod=shop/p gets=nothing before=nothing error="no identity for this pod: AzureIdentityBinding \"cart\" names AzureIdentity \"cart\", which does not exist in the binding's namespace"`)
	h.put(cart)
	step("complete", `INFO msg="decision changed" pod=shop/p gets=shop/cart before=nothing`)
	h.put(resolvertest.Identity("cart", cartClient, ""), pod(bound))
	step("the same again")
	h.put(pod(map[string]string{"aadpodidbinding": "cart", "app": "other"}))
	step("a label that changes nothing")
	h.put(pod(bound))
	step("and back")
	h.put(resolvertest.Exception("e", bound))
	step("excepted", `INFO msg="decision changed" pod=shop/p gets="the node's identities (exception e)" before=shop/cart`)
	h.drop(pod(bound))
	step("gone")
}

// In standard mode there is a decision before MIC's, and another one after it.
func TestChangesInStandardMode(t *testing.T) {
	var out bytes.Buffer
	cart, binding := resolvertest.Identity("cart", cartClient, ""), resolvertest.Binding("cart", "cart", "cart")
	h := newHarness(t, Config{Mode: Standard, IdentityWait: time.Second, Logger: slog.New(slog.NewTextHandler(&out, nil))}, cart, binding, resolvertest.Pod("p", "10.0.0.1", "cart"))
	step := func(what, want string) {
		t.Helper()
		h.update()
		assert.Equal(t, []string{`INFO msg="decision changed" pod=shop/p ` + want}, logged(&out), what)
	}
	step("bound", `gets="shop/cart (not assigned yet)"`)
	assigned := resolvertest.Assigned("a", "p", "Assigned", cart, binding)
	h.put(assigned)
	step("assigned", `gets=shop/cart before="shop/cart (not assigned yet)"`)
	h.drop(assigned)
	step("taken away", `gets="shop/cart (not assigned yet)" before=shop/cart`)
}

func TestChangesAreBounded(t *testing.T) {
	var out bytes.Buffer
	h := newHarness(t, Config{Logger: slog.New(slog.NewTextHandler(&out, nil))},
		resolvertest.Identity("cart", cartClient, ""), resolvertest.Binding("cart", "cart", "cart"))
	const pods = 1000
	for i := range pods {
		h.put(resolvertest.Pod(fmt.Sprint("p", i), fmt.Sprintf("10.0.%d.%d", i/250, i%250), "cart"))
	}
	h.update()
	assert.Less(t, len(logged(&out)), changesAtOnce+50)
	assert.Greater(t, h.changes.omitted, pods-changesAtOnce-50)
}
