// +k8s:deepcopy-gen=package

// Package aadpodidentity holds the Go types of the four custom resources of
// aad-pod-identity: group aadpodidentity.k8s.io, version v1, all namespaced.
//
// The agent only reads them. Field names are those of the published CRDs, which are
// case-sensitive.
package aadpodidentity

//go:generate go run k8s.io/code-generator/cmd/deepcopy-gen@v0.37.2 --output-file=zz_generated.deepcopy.go --go-header-file=/dev/null .
