package main

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/cmd/nmi/migrate"
)

func TestCheckMigration(t *testing.T) {
	check := func(audience string, o migrate.Options, given bool) error {
		return (&config{federation: federationConfig{audience: audience}}).checkMigration(o, given)
	}
	assert.NoError(t, check(defaultAudience, migrate.Options{}, false))
	assert.NoError(t, check("api://AzureADTokenExchangeChina", migrate.Options{Issuer: "https://issuer/path"}, true))
	assert.NoError(t, check(defaultAudience, migrate.Options{IdentityBindings: true}, false))

	assert.ErrorContains(t, check("", migrate.Options{}, true), "--federation-audience is empty")
	assert.ErrorContains(t, check("api://x", migrate.Options{IdentityBindings: true}, true), "has no meaning with --identity-bindings")
	for _, issuer := range []string{"foo", "http://issuer", "https://"} {
		assert.ErrorContains(t, check(defaultAudience, migrate.Options{Issuer: issuer}, false), "want https://<host>", issuer)
	}
}
