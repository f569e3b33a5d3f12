package podresolver

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// The IDs of an AzureIdentity are sent to IMDS: only valid ones are usable. deploy/admission
// warns the author by the same rules.
func TestIDsOfAzureIdentity(t *testing.T) {
	const (
		guid     = "11111111-2222-3333-4444-555555555555"
		resource = "/subscriptions/s/resourceGroups/G_(1)/providers/Microsoft.ManagedIdentity/userAssignedIdentities/Cart-1"
	)
	form := "is not the resource ID of a user-assigned identity, " + identityForm
	for name, tc := range map[string]struct {
		clientID, resourceID string
		why                  string // "" if it can be used
	}{
		"client ID":                         {guid, "", ""},
		"resource ID":                       {"", resource, ""},
		"both":                              {guid, resource, ""},
		"any case":                          {strings.ToUpper(guid), strings.ToUpper(resource), ""},
		"letters that are not ASCII":        {"", strings.Replace(resource, "G_", "Größe", 1), ""},
		"white space around":                {" " + guid + "\n", "\t" + resource + "\r\n ", ""},
		"nothing":                           {"", "", "has neither clientID nor resourceID"},
		"white space alone":                 {"\n", " ", "has neither clientID nor resourceID"},
		"a name":                            {"cart", "", `has client ID "cart", which is not a GUID`},
		"a name beside a resource ID":       {"cart", resource, `has client ID "cart", which is not a GUID`},
		"braces":                            {"{" + guid + "}", "", "which is not a GUID"},
		"no hyphens":                        {strings.ReplaceAll(guid, "-", ""), "", "which is not a GUID"},
		"an invisible character":            {guid + "\u200b", "", `\u200b", which is not a GUID`},
		"white space within":                {guid[:20] + " " + guid[21:], "", "which is not a GUID"},
		"without its leading slash":         {"", resource[1:], `has resource ID "` + strings.ToLower(resource[1:]) + `", which lacks the leading slash`},
		"beside a client ID":                {guid, resource[1:], "which lacks the leading slash"},
		"a slash at its end":                {"", resource + "/", form},
		"two slashes":                       {"", strings.Replace(resource, "/resource", "//resource", 1), form},
		"a dot segment":                     {"", strings.Replace(resource, "G_(1)", "..", 1), form},
		"percent-encoded":                   {"", strings.Replace(resource, "Cart", "%43art", 1), form},
		"a virtual machine":                 {"", "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/vm", form},
		"a resource of it":                  {"", resource + "/federatedIdentityCredentials/x", form},
		"a group":                           {"", "/subscriptions/s/resourceGroups/g", form},
		"a URL":                             {"", "https://management.azure.com" + resource, form},
		"a long s instead of an s (U+017F)": {"", strings.Replace(resource, "/subs", "/\u017fubs", 1), form},
		"a query":                           {"", resource + "?x", form},
		"white space within a resource ID":  {"", strings.Replace(resource, "Cart", "Ca rt", 1), form},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, Config{}, resolvertest.Identity("i", tc.clientID, tc.resourceID), resolvertest.Binding("b", "x", "i"), resolvertest.Pod("p", addr.String(), "x"))
			got, err := h.decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
			if tc.why == "" {
				require.NoError(t, err)
				assert.Equal(t, strings.ToLower(strings.TrimSpace(tc.clientID)), got.ClientID)
				assert.Equal(t, strings.ToLower(strings.TrimSpace(tc.resourceID)), got.ResourceID)
				return
			}
			require.ErrorIs(t, err, ErrNoIdentity)
			require.ErrorContains(t, err, `AzureIdentityBinding "b" names AzureIdentity "i", which `)
			require.ErrorContains(t, err, tc.why)
			assert.Contains(t, h.explain(t), tc.why)
		})
	}

	// A service principal's tokens do not depend on its resource ID.
	sp := principal(func(s *aadpodidentity.AzureIdentitySpec) { s.ResourceID = "anything" })
	_, err := newHarness(t, Config{}, sp, resolvertest.Binding("b", "x", "sp")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.NoError(t, err)
	sp = principal(func(s *aadpodidentity.AzureIdentitySpec) { s.ClientID = "cart" })
	_, err = newHarness(t, Config{}, sp, resolvertest.Binding("b", "x", "sp")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.ErrorContains(t, err, `has client ID "cart", which is not a GUID`)

	// The length of the error is bounded.
	_, err = newHarness(t, Config{}, resolvertest.Identity("i", strings.Repeat("c", 1e6), ""), resolvertest.Binding("b", "x", "i")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	assert.Less(t, len(err.Error()), 1000)
}
