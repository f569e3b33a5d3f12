package upstream

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// microsoftAuthorities are the hosts of Entra in the clouds that Microsoft and its
// partners run: those of learn.microsoft.com, "Microsoft Entra authentication &
// national clouds", and the older or newer names of the same that Microsoft's
// authentication libraries trust. The cloud in Germany of before 2021
// (login.microsoftonline.de) is closed.
var microsoftAuthorities = []string{
	"login.microsoftonline.com", "login.microsoft.com", "login.windows.net", "sts.windows.net",
	"login.microsoftonline.us", "login-us.microsoftonline.com", "login.usgovcloudapi.net",
	"login.partner.microsoftonline.cn", "login.chinacloudapi.cn",
	"login.sovcloud-identity.fr", "login.sovcloud-identity.de", "login.sovcloud-identity.sg",
}

// ParseAuthority returns the host of an authority, with its port if that is not
// 443. It takes https://host[:port], with or without a slash at its end, or the
// host alone.
func ParseAuthority(text string) (host string, err error) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	switch {
	case err != nil: // its text is the URL again
		return "", fmt.Errorf("%.200q is not a URL", text)
	case !strings.EqualFold(u.Scheme, "https"):
		return "", fmt.Errorf("%.200q is not https", text)
	case u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		// A path would come before the tenant's, and so choose another tenant.
		return "", fmt.Errorf("%.200q: want https://<host>[:port], no path or query", text)
	}
	return strings.TrimSuffix(strings.ToLower(u.Host), ":443"), nil
}

// allowed returns the host of a service principal's authority, if secrets may be
// sent there. Who may write an AzureIdentity could else have the agent send it
// whatever secret the agent can read.
func (e *entra) allowed(authority string) (host string, err error) {
	host, err = ParseAuthority(authority)
	if err != nil {
		return "", fmt.Errorf("the identity's adEndpoint %w", err)
	}
	if !e.hosts[host] {
		return "", fmt.Errorf("the identity's adEndpoint %.200q is neither one of Microsoft's nor named by --entra-authority, so that nothing is sent there", authority)
	}
	return host, nil
}

// AllowedAuthority reports whether secrets may be sent to a host, as ParseAuthority returns it: one of
// Microsoft's or of others, see Config.Authorities.
func AllowedAuthority(host string, others []string) bool { return hostsOf(others)[host] }

// hostsOf is the set of hosts that secrets may be sent to.
func hostsOf(more []string) map[string]bool {
	hosts := make(map[string]bool)
	for _, host := range slices.Concat(microsoftAuthorities, more) {
		hosts[host] = true
	}
	return hosts
}
