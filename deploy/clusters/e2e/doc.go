// Package e2e is the suite of scenarios that only a real kubelet, network plugin,
// kube-proxy and scheduler can show. What one node's network namespaces can show is in
// deploy/e2e.
//
// It needs the build tag cluster, and runs against the cluster of KUBECONFIG:
//
//	go test -c -tags cluster -o .cache/clusters/e2e.test ./deploy/clusters/e2e
//	deploy/clusters/one-node/cluster.sh run .cache/clusters/e2e.test -test.v
//
// with -test.run for some of the scenarios, and -results for a directory of results. The
// current directory is anywhere within the project. What can do more than Kubernetes's
// API is in the environment, which "cluster.sh run" sets: NMI_CLUSTER is the script that
// runs commands on the node, reboots it and so on; NMI_IMDS is the control socket of the
// fake metadata service (deploy/clusters/imds), whose pods' requests are forwarded by the
// node. A scenario that needs what is not there is skipped, and says so.
//
// # The life of a scenario
//
//  1. begin makes a namespace, and has the metadata service forget what it counted.
//  2. The scenario binds identities, starts pods, and does to the cluster what it is about.
//     A pod's containers are askers (deploy/clusters/asker); each of their requests says
//     what its right answer is.
//  3. At the end the logs of all its pods are read, and every answer is judged: right;
//     failed; the token of another identity; the node's token. The metadata service says
//     which requests came from a pod's own address, past the agent: leaks. Only failures
//     can be allowed, by allowFailures.
//  4. What it changed is restored, and its namespace deleted.
//  5. The counts become a line of the table that the suite prints at its end.
//
// Scenarios run one after the other, so that a leak is known to be of one of them. The
// agent is installed with the chart before the first, and lives through all of them
// that do not replace it: a scenario asks for tokens of a resource of its own.
package e2e
