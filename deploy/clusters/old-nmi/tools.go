//go:build tools

// Package oldnmi pins the NMI from which docs/migrating.md leads away: the last one that
// aad-pod-identity released.
package oldnmi

import _ "github.com/Azure/aad-pod-identity/cmd/nmi"
