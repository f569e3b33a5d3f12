#!/bin/bash
# Process 1 of the node: node-init.sh <disk> <programs>. It stands in for systemd: it mounts, runs
# the commands of the boot guard's unit, brings up the network, and restarts programs when they
# end. node.sh starts it in namespaces of its own.
set -eu # above all not to go on with the machine's own /etc and /var
disk=$1 programs=$2
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# The order matters: programs and disk may be below what is mounted over.
mount_disk() {
	mount --bind "$programs" /usr/local/bin
	mount --bind "$disk/etc" /etc
	mount --bind "$disk/var" /var
	mount -t tmpfs -o mode=755 tmpfs /run
	mkdir /run/lock
	mount --make-rshared / # as systemd does, for volumes with mount propagation
	hostname -F /etc/hostname
}

# The kubelet (setupKernelTunables) writes these where they differ, but they are the whole
# machine's. So files with the values that it wants hide them.
hide_sysctls() {
	local name value
	mkdir /run/sysctls
	while read -r name value; do
		echo "$value" >"/run/sysctls/${name//\//.}"
		mount --bind "/run/sysctls/${name//\//.}" "/proc/sys/$name"
	done <<-END
		vm/overcommit_memory 1
		vm/panic_on_oom 0
		kernel/panic 10
		kernel/panic_on_oops 1
		kernel/keys/root_maxkeys 1000000
		kernel/keys/root_maxbytes 25000000
	END
}

# play_boot_guard runs the commands of the boot guard's unit (docs/boot-guard.md) as systemd would,
# if the unit is enabled: one after the other, and "-" says that a failure does not matter.
play_boot_guard() {
	local unit=/etc/systemd/system/multi-user.target.wants/nmi-boot-guard.service line command
	[ -e "$unit" ] || return 0
	while read -r line; do
		case $line in ExecStart=*) command=${line#ExecStart=} ;; *) continue ;; esac
		echo "boot guard: ${command#-}"
		# shellcheck disable=SC2086 # systemd, too, splits it into words
		timeout 10 ${command#-} || [ "${command#-}" != "$command" ] || break
	done <"$unit"
}

# keep <name> <command>...: starts it again a second after it ended.
keep() {
	local name=$1 status
	shift
	while :; do
		"$@" </dev/null >>"/var/log/$name.log" 2>&1 &
		echo $! >"/run/$name.pid"
		status=0
		wait $! || status=$?
		echo "$name ended with $status"
		sleep 1
	done
}

echo "boot at $(date -u +%FT%T.%3NZ)"
mount_disk
hide_sysctls
play_boot_guard
# shellcheck source=/dev/null
. /etc/network.sh
keep containerd containerd &
for ((tries = 0; tries < 300; tries++)); do # so that the kubelet need not fail first
	[ ! -S /run/containerd/containerd.sock ] || break
	sleep 0.1
done
keep kubelet kubelet --config=/etc/kubernetes/kubelet.yaml --kubeconfig=/etc/kubernetes/kubelet.conf &
keep kube-proxy kube-proxy --config=/etc/kubernetes/kube-proxy.yaml &
wait
