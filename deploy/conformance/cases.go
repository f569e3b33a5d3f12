package conformance

import "slices"

// Cases is the table: all cases, by number.
func Cases() []Case {
	return slices.Concat(tokenCases, requestCases, identityCases, upstreamCases, errorCases, pathCases, otherPathCases, limitCases, clientCases)
}

// What cases are known from: pages of learn.microsoft.com by the ends of their
// addresses (…/managed-identities-azure-resources/how-to-use-vm-token,
// …/virtual-machines/instance-metadata-service), and what was captured.
const (
	tokenPage   = "how-to-use-vm-token"
	servicePage = "instance-metadata-service"
	capture     = "captured"
)

// The errors that SDKs know by heart, to the letter.
const (
	noHeader = `{"error":"invalid_request","error_description":"Required metadata header not specified"}`
	notFound = `{"error":"invalid_request","error_description":"Identity not found"}`
	several  = `{"error":"invalid_request","error_description":"Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"}`
	// noResource is what IMDS says to a request that names no resource.
	noResource = `{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`
)

// nobody is a well-formed client or object ID that no identity has.
const nobody = "00000000-dead-4000-8000-000000000000"
