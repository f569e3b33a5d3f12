package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/go-autorest/autorest/adal"
	"github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
)

func managedIdentity(j job) (getToken, error) {
	options := &azidentity.ManagedIdentityCredentialOptions{}
	switch j.By {
	case "client":
		options.ID = azidentity.ClientID(j.ID)
	case "resource":
		options.ID = azidentity.ResourceID(j.ID)
	case "object":
		options.ID = azidentity.ObjectID(j.ID)
	}
	credential, err := azidentity.NewManagedIdentityCredential(options)
	return ofCredential(credential, j), err
}

// defaultCredential is told the identity as applications in pods are: by the
// environment.
func defaultCredential(j job) (getToken, error) {
	if j.By != "" && j.By != "client" {
		return nil, fmt.Errorf("DefaultAzureCredential cannot be told an identity by %s ID", j.By)
	}
	if j.By == "client" {
		if err := os.Setenv("AZURE_CLIENT_ID", j.ID); err != nil {
			return nil, err
		}
	}
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	return ofCredential(credential, j), err
}

func ofCredential(credential azcore.TokenCredential, j job) getToken {
	return func(ctx context.Context) (string, time.Time, error) {
		token, err := credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{j.Resource + "/.default"}})
		return token.Token, token.ExpiresOn, err
	}
}

func msal(j job) (getToken, error) {
	var id managedidentity.ID = managedidentity.SystemAssigned()
	switch j.By {
	case "client":
		id = managedidentity.UserAssignedClientID(j.ID)
	case "resource":
		id = managedidentity.UserAssignedResourceID(j.ID)
	case "object":
		id = managedidentity.UserAssignedObjectID(j.ID)
	}
	client, err := managedidentity.New(id)
	return func(ctx context.Context) (string, time.Time, error) {
		result, err := client.AcquireToken(ctx, j.Resource)
		return result.AccessToken, result.ExpiresOn, err
	}, err
}

func adalToken(j job) (getToken, error) {
	options := &adal.ManagedIdentityOptions{}
	switch j.By {
	case "client":
		options.ClientID = j.ID
	case "resource":
		options.IdentityResourceID = j.ID
	case "object":
		return nil, fmt.Errorf("adal cannot be told an identity by object ID")
	}
	var token *adal.ServicePrincipalToken
	return func(ctx context.Context) (string, time.Time, error) {
		if token == nil { // it probes
			var err error
			if token, err = adal.NewServicePrincipalTokenFromManagedIdentity(j.Resource, options); err != nil {
				return "", time.Time{}, err
			}
		}
		err := token.EnsureFreshWithContext(ctx)
		return token.OAuthToken(), token.Token().Expires(), err
	}, nil
}
