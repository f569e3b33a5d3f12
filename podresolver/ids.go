package podresolver

import (
	"fmt"
	"strings"
	"unicode"
)

// identityForm is the form of the resource ID of a user-assigned identity.
const identityForm = "/subscriptions/<ID>/resourceGroups/<group>/providers/Microsoft.ManagedIdentity/userAssignedIdentities/<name>"

// checkClientID is why the client ID of an AzureIdentity is invalid, "" if it is valid. Only
// GUIDs with hyphens are accepted, because other spellings of the same GUID would bypass a
// DenyList: .NET's Guid.Parse accepts braces and missing hyphens.
func checkClientID(id string) string {
	if id == "" || isGUID(id) {
		return ""
	}
	return fmt.Sprintf("has client ID %.100q, which is not a GUID such as 11111111-2222-3333-4444-555555555555", id)
}

// checkResourceID is checkClientID for the resource ID of a managed identity. deploy/admission
// warns the author of an AzureIdentity by the same rules.
func checkResourceID(id string) string {
	switch {
	case id == "" || isIdentityPath(id):
		return ""
	case isIdentityPath("/" + id):
		return fmt.Sprintf("has resource ID %.300q, which lacks the leading slash", id)
	}
	return fmt.Sprintf("has resource ID %.300q, which is not the resource ID of a user-assigned identity, %s", id, identityForm)
}

// isGUID reports whether an ID is a GUID with hyphens, 8-4-4-4-12.
func isGUID(id string) bool {
	if len(id) != 36 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}

// isIdentityPath reports whether an ID is the resource ID of a user-assigned identity, in
// any case.
func isIdentityPath(id string) bool {
	form := strings.Split(identityForm, "/")
	parts := strings.Split(id, "/")
	if len(parts) != len(form) || parts[0] != "" {
		return false
	}
	for i, part := range parts[1:] {
		want := form[i+1]
		ok := len(part) == len(want) && strings.EqualFold(part, want) // of one length: U+017F folds to s
		if want[0] == '<' {
			ok = isResourceName(part)
		}
		if !ok {
			return false
		}
	}
	return true
}

// isResourceName reports whether a name consists of letters, digits and "-_.()", without a
// period at the end (Microsoft, "Naming rules and restrictions for Azure resources",
// resourceGroups; other resources have narrower rules). So it is not empty, a dot segment or
// percent-encoded: CVE-2022-23551 was about the spelling of a path.
func isResourceName(name string) bool {
	invalid := func(c rune) bool {
		return !unicode.IsLetter(c) && !unicode.IsDigit(c) && !strings.ContainsRune("-_.()", c)
	}
	return name != "" && !strings.HasSuffix(name, ".") && !strings.ContainsFunc(name, invalid)
}
