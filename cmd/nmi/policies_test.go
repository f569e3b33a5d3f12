package main

import (
	"net/netip"
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

// destinations are what policies allow or redirect, as far as the samples name it.
type destinations struct {
	Spec struct {
		Egress []struct {
			To []struct {
				IPBlock struct {
					CIDR netip.Prefix `json:"cidr"`
				} `json:"ipBlock"`
			} `json:"to"`
			Ports []struct {
				Port uint16 `json:"port"`
			} `json:"ports"`
			// Cilium's.
			ToEntities []string       `json:"toEntities"`
			ToCIDR     []netip.Prefix `json:"toCIDR"`
			ToPorts    []ciliumPorts  `json:"toPorts"`
		} `json:"egress"`
		RedirectFrontend struct {
			AddressMatcher struct {
				IP      netip.Addr   `json:"ip"`
				ToPorts []ciliumPort `json:"toPorts"`
			} `json:"addressMatcher"`
		} `json:"redirectFrontend"`
		RedirectBackend struct {
			ToPorts []ciliumPort `json:"toPorts"`
		} `json:"redirectBackend"`
	} `json:"spec"`
}

type ciliumPort struct {
	Port string `json:"port"`
}

type ciliumPorts struct {
	Ports []ciliumPort `json:"ports"`
}

func readDestinations(t *testing.T, path string) (d destinations) {
	t.Helper()
	text, err := os.ReadFile("../../deploy/" + path)
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(text, &d), path)
	return d
}

// TestPolicySamples name the addresses and ports that the agent uses by default.
func TestPolicySamples(t *testing.T) {
	c := mustParse(t, "--node=n")
	host := func(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }
	port := func(port uint16) []ciliumPort { return []ciliumPort{{strconv.Itoa(int(port))}} }
	agent, metadata := c.front.addr.Port(), c.rules.Metadata

	egress := readDestinations(t, "network-policies/networkpolicy.yaml").Spec.Egress
	require.Len(t, egress, 2)
	assert.Equal(t, host(c.rules.Address), egress[0].To[0].IPBlock.CIDR)
	assert.Equal(t, agent, egress[0].Ports[0].Port)
	assert.Equal(t, host(metadata.Addr()), egress[1].To[0].IPBlock.CIDR)
	assert.Equal(t, metadata.Port(), egress[1].Ports[0].Port)

	egress = readDestinations(t, "network-policies/ciliumnetworkpolicy.yaml").Spec.Egress
	require.Len(t, egress, 2)
	assert.Equal(t, []string{"host"}, egress[0].ToEntities)
	assert.Equal(t, []ciliumPorts{{port(agent)}}, egress[0].ToPorts)
	assert.Equal(t, []netip.Prefix{host(metadata.Addr())}, egress[1].ToCIDR)
	assert.Equal(t, []ciliumPorts{{port(metadata.Port())}}, egress[1].ToPorts)

	redirect := readDestinations(t, "cilium/local-redirect-policy.yaml").Spec
	assert.Equal(t, metadata.Addr(), redirect.RedirectFrontend.AddressMatcher.IP)
	assert.Equal(t, port(metadata.Port()), redirect.RedirectFrontend.AddressMatcher.ToPorts)
	assert.Equal(t, port(agent), redirect.RedirectBackend.ToPorts)
}
