package sdk

import (
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Client is an SDK in a program of deploy/clients.
type Client struct {
	Name   string // as the program knows it
	js     bool
	module string // that is its version
}

// Clients are the SDKs that ask for tokens in ways of their own; the other names of
// deploy/clients send what one of these sends.
var Clients = []Client{
	{"azidentity", false, "github.com/Azure/azure-sdk-for-go/sdk/azidentity"},
	{"msal", false, "github.com/AzureAD/microsoft-authentication-library-for-go"},
	{"adal", false, "github.com/Azure/go-autorest/autorest/adal"},
	{"@azure/identity", true, "@azure/identity"},
	{"@azure/msal-node", true, "@azure/msal-node"},
}

// GetToken gets a token in a namespace, as a process that has just been started.
func (c Client) GetToken(ctx context.Context, ns *testbed.Namespace, resource string) error {
	programs, err := programs()
	if err != nil {
		return err
	}
	job, err := json.Marshal(map[string]any{"client": c.Name, "resource": resource, "times": 1})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "go"), string(job))
	if c.js {
		cmd = exec.CommandContext(ctx, "node", filepath.Join(programs, "js", "clients.mjs"), string(job))
	}
	var out, problems strings.Builder
	cmd.Env, cmd.Stdout, cmd.Stderr = []string{"HOME=/nonexistent"}, &out, &problems // nothing sends it elsewhere
	if err := ns.Start(cmd); err != nil {
		return fmt.Errorf("%w: run make sdks", err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, problems.String())
	}
	var results []struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(out.String()), &results); err != nil || len(results) != 1 {
		return fmt.Errorf("the program of deploy/clients printed %q", out.String())
	}
	if results[0].Error != "" {
		return errors.New(results[0].Error)
	}
	return nil
}

func (c Client) version() (string, error) {
	programs, err := programs()
	if err != nil {
		return "", err
	}
	if c.js {
		text, err := os.ReadFile(filepath.Join(programs, "js", "node_modules", c.module, "package.json"))
		if err != nil {
			return "", err
		}
		var manifest struct {
			Version string `json:"version"`
		}
		return manifest.Version, json.Unmarshal(text, &manifest)
	}
	info, err := buildinfo.ReadFile(filepath.Join(programs, "go"))
	if err != nil {
		return "", err
	}
	for _, module := range info.Deps {
		if module.Path == c.module {
			return module.Version, nil
		}
	}
	return "", fmt.Errorf("%s is not among the modules of deploy/clients/go", c.module)
}

func programs() (string, error) {
	root, err := testbed.Root()
	return filepath.Join(root, ".cache", "clients"), err
}
