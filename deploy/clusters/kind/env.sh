# Names and places, sourced by the scripts of this directory.
# shellcheck shell=bash disable=SC2034 # used where it is sourced
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
name=nmi-e2e              # of the cluster, for kind
node=$name-control-plane  # of its only node, and of the container that is that node
pods=10.244.0.0/16        # addresses of pods

# What is built or runs is below .cache, which may be a symlink.
mkdir -p "$root/.cache/clusters"
cache=$(cd -P "$root/.cache/clusters" && pwd)
bin=$cache/bin        # programs
images=$cache/images  # image archives for the node
state=$cache/kind     # kubeconfig, logs, and the like of the cluster that runs

# is_program <pid> <program>: whether a process runs that program. A number that was noted down
# may be another process's by now.
is_program() { [[ $(readlink "/proc/$1/exe" 2>/dev/null) == "$2"* ]]; } # " (deleted)" follows, if it was built again

# end_process <pid> asks a process to end, and kills it if it has not in half a minute.
end_process() {
	local deadline=$((SECONDS + 30))
	kill "$1" 2>/dev/null || return 0
	while kill -0 "$1" 2>/dev/null; do
		[ $SECONDS -lt $deadline ] || kill -KILL "$1" 2>/dev/null || true
		sleep 0.1
	done
}
