package status

import "time"

// sample is the status of an agent of a node on which much has gone wrong: what the tests print, and
// the screenshots show.
func sample() Snapshot {
	now := time.Date(2026, 11, 27, 3, 4, 5, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	at := func(d time.Duration) *time.Time { t := now.Add(d); return &t }
	const cart, report = "5c0ca47e-1d00-4000-8000-000000000001", "4e904700-0000-4000-8000-000000000002"
	served := func(address, binding string) []Step {
		return []Step{
			{Name: "requests", State: OK, Texts: []string{"it is on the pod network, where requests to IMDS are redirected to the agent"}},
			{Name: "address", State: OK, Texts: []string{address + " is its own"}},
			{Name: "exception", State: OK, Texts: []string{"none applies"}},
			{Name: "binding", State: OK, Texts: []string{`AzureIdentityBinding "` + binding + `" has the selector "` + binding + `" and gives it AzureIdentity "` + binding + `"`}},
			{Name: "identity", State: OK, Texts: []string{"it has one, which a request that names none gets"}},
		}
	}
	identity := func(namespace, name, clientID string) []Identity {
		return []Identity{{Namespace: namespace, Name: name, ClientID: clientID, Binding: name, Chosen: true, Text: "AzureIdentity " + namespace + "/" + name + " (user-assigned managed identity, client ID " + clientID + ")"}}
	}
	const caseFix = `set the pod's label aadpodidbinding (in its controller's template) to "report", the selector of AzureIdentityBinding shop/report`
	return Snapshot{
		Time:  now,
		Agent: Agent{Version: "v0.1.0", Node: "aks-user-31415926-vmss000003", Mode: "standard", Started: ago(76*time.Hour + 12*time.Minute), Ready: true, Notes: []string{"no other agent can take over from this one: the directory /run/nmi is not the node's"}},
		Rules: Rules{
			Mode: "dnat", Backend: "nft", Reason: "interface azv7c1a2, which leads to pod address 10.244.0.11, has no IPv4 address",
			Parts: []Part{{"redirect", true}, {"guard", true}, {"routing", true}, {"input", true}, {"antispoof", false}},
		},
		Cluster:     Cluster{Synced: true, Watches: []Watch{{"pods", 12}, {"azureidentities.aadpodidentity.k8s.io", 41.3}}},
		Upstream:    Upstream{IMDS: Service{InFlight: 1, Waiting: 0}, ThrottledUntil: at(42 * time.Second), PerSecond: 18, AtOnce: 4},
		Tokens:      Tokens{Held: 4, Failing: 1},
		Connections: Connections{Open: 7, Busy: 1},
		Pods: []Pod{
			{
				Namespace: "shop", Name: "report-6d4b9c7f5d-x2x9p", Addresses: []string{"10.244.0.12"}, State: Failed,
				Answer: "400 invalid_request: Identity not found", Reason: "SelectorCaseDiffers", Fix: caseFix,
				Steps: append(served("10.244.0.12", "report")[:3:3], Step{
					Name: "binding", State: Failed, Fix: caseFix,
					Texts: []string{`no AzureIdentityBinding in namespace "shop" has the selector "Report"`, `AzureIdentityBinding shop/report does not match: its selector "report" differs in case`},
				}),
				Refusals: []Refusal{{Status: 400, Reason: "SelectorCaseDiffers", Count: 212, First: ago(time.Hour), Last: ago(3 * time.Second), Text: `pod shop/report-6d4b9c7f5d-x2x9p: no identity for this pod: no AzureIdentityBinding in namespace "shop" has the selector "Report"; near misses: AzureIdentityBinding shop/report does not match: its selector "report" differs in case`}},
			},
			{
				Namespace: "bank", Name: "ledger-0", Addresses: []string{"10.244.0.17"}, State: Failed, Reason: "IdentityUnknownToIMDS",
				Fix:        "assign the identity to the node's scale set or virtual machine (az vmss identity assign), or correct the IDs of the AzureIdentity",
				Identities: identity("bank", "ledger", report), Steps: served("10.244.0.17", "ledger"),
				Refusals: []Refusal{{Status: 400, Reason: "IdentityUnknownToIMDS", Count: 9, First: ago(2 * time.Minute), Last: ago(11 * time.Second), Text: "pod bank/ledger-0, identity bank/ledger: no token (refused, retry after 10s): IMDS answered 400 invalid_request: Identity not found (bound, but IMDS does not know this identity on this node: assign it to the scale set (VM) or correct the AzureIdentity)"}},
			},
			{
				Namespace: "shop", Name: "search-0", Addresses: []string{"10.244.0.13"}, State: Warning, Reason: "Throttled", Fix: "find the pod or program that requests too many tokens: docs/troubleshooting.md#why-does-my-pod-get-429",
				Identities: identity("shop", "cart", cart), Steps: served("10.244.0.13", "cart"), TokensHeld: 1,
				Tokens:   []Token{{Identity: cart, Resource: "https://search.azure.com", ExpiresOn: *at(22 * time.Hour), NextRefresh: at(10 * time.Hour)}},
				Refusals: []Refusal{{Status: 429, Reason: "Throttled", Count: 3, First: ago(time.Minute), Last: ago(50 * time.Second), Text: "pod shop/search-0, identity shop/cart: no token (throttled, retry after 42s): IMDS answered 429 invalid_request: Temporarily throttled, too many requests"}},
			},
			{
				Namespace: "shop", Name: "cart-7f8d4b6c9-4k2mz", Addresses: []string{"10.244.0.11"}, State: OK,
				Identities: identity("shop", "cart", cart), Steps: served("10.244.0.11", "cart"), TokensHeld: 3,
				Tokens: []Token{
					{Identity: cart, Resource: "https://vault.azure.net", ExpiresOn: *at(4*time.Hour + 31*time.Minute), NextRefresh: at(12 * time.Minute), FailedRefreshes: 2},
					{Identity: cart, Resource: "https://management.azure.com/", ExpiresOn: *at(23*time.Hour + 5*time.Minute), NextRefresh: at(11*time.Hour + 2*time.Minute)},
					{Identity: cart, Resource: "https://storage.azure.com/", ExpiresOn: *at(23*time.Hour + 50*time.Minute), NextRefresh: at(11*time.Hour + 40*time.Minute)},
				},
			},
			{
				Namespace: "kube-system", Name: "azure-policy-7c9d8f6b5-tq8wn", Addresses: []string{"10.244.0.4"}, State: OK, Exception: "aks-addon-exception",
				Steps: append(served("10.244.0.4", "")[:2:2], Step{Name: "exception", State: OK, Texts: []string{
					`it is excepted by "aks-addon-exception": its requests are passed through to IMDS, which gives it the identities of the node`,
					`AzurePodIdentityException "aks-addon-exception" lists its label kubernetes.azure.com/managedby=aks`,
				}}),
			},
			{Namespace: "kube-system", Name: "coredns-76f75df574-6xk5d", Addresses: []string{"10.244.0.2"}, State: None},
			{Namespace: "kube-system", Name: "kube-proxy-8m2vj", Addresses: []string{"10.0.0.4"}, State: None, HostNetwork: true},
			{Namespace: "shop", Name: "web-5b8c9d7f4-zzq6r", Addresses: []string{"10.244.0.19"}, State: None},
		},
		Others: []Other{{Address: "10.244.0.31", Refusals: []Refusal{{Status: 503, Reason: "PodUnknown", Count: 2, First: ago(31 * time.Second), Last: ago(20 * time.Second), Text: "no pod on this node has this address"}}}},
	}
}
