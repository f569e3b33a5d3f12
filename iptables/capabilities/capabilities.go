// Package capabilities tells which capabilities(7) this process lacks.
package capabilities

import "golang.org/x/sys/unix"

// names are as in a container's securityContext.
var names = map[int]string{unix.CAP_BPF: "BPF", unix.CAP_NET_ADMIN: "NET_ADMIN", unix.CAP_NET_RAW: "NET_RAW"}

// Missing returns the names of those that this process needs and has not in effect; nil if the
// kernel does not say, because then the operations that it refuses will fail.
func Missing(needed ...int) (missing []string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // version 3 has two, for 64 capabilities
	if err := unix.Capget(&header, &data[0]); err != nil {
		return nil
	}
	for _, c := range needed {
		if data[c/32].Effective&(1<<(c%32)) == 0 {
			missing = append(missing, names[c])
		}
	}
	return missing
}
