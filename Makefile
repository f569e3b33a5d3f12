# The commands of this project; README.md says which to try first.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
CLIENTS := .cache/clients
LINT    := go tool -modfile=.ci/tools/go.mod golangci-lint
KUBE    := .cache/bin
# Without the programs that it would run where they are installed: lint is the same everywhere.
ACTIONLINT := go tool -modfile=.ci/actionlint/go.mod actionlint -shellcheck= -pyflakes=

.DEFAULT_GOAL := build
.PHONY: help build demo test lint generate vuln unit promtool e2e docs manifests image image-test conformance sdks clients kube definitions e2e-node node-cluster node-parts e2e-kind kind-cluster kind-node-image kind-parts kernels bench bench-heads bench-scale bench-soak bench-misuse bench-micro packages root clean

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

build: ## bin/nmi, static
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/nmi ./cmd/nmi

demo: root ## the main job on this machine alone
	@deploy/packages.sh iptables
	@echo "compiling the agent and the demo; the first time this takes some minutes"
	@mkdir -p .cache && go build -o .cache/demo ./deploy/demo
	@exec .cache/demo

test: root packages lint unit e2e ## everything

lint: ## golangci-lint, actionlint on .github/workflows, and whether make generate changes anything
	$(LINT) run ./...
	$(ACTIONLINT)
	@.ci/generated.sh

generate: ## the programs of iptables/ebpf, compiled; Debian 12's clang makes the same bytes again
	@deploy/packages.sh clang llvm-strip=llvm /usr/include/bpf/bpf_helpers.h=libbpf-dev
	go generate ./iptables/ebpf

# Not part of test: its database is not in the module proxy. govulncheck exits with 3 when
# it has found something.
vuln: ## known vulnerabilities of what the agent is built from, by https://vuln.go.dev
	@go tool -modfile=.ci/tools/go.mod govulncheck ./cmd/nmi || { status=$$?; \
		[ $$status = 3 ] || echo "Nothing was checked: govulncheck needs https://vuln.go.dev." >&2; exit $$status; }

# The tests of iptables run in namespaces of their own, hence root. The model test
# tries fewer seeds with -race, hence again.
unit: root packages promtool ## unit tests, those on the real kernel included
	@deploy/packages.sh chromium # shows the status page
	@go tool -modfile=.ci/helm/go.mod -n helm >/dev/null # builds it, so that no test's time limit has to cover that
	go test -race ./...
	cd deploy/monitoring && go test ./...
	go test -run '^TestModel$$' ./tokencache

# To install the package would start a server.
promtool:
	@command -v promtool >/dev/null || [ -x .cache/bin/promtool ] || { echo "taking promtool from Debian's package of Prometheus"; \
		dir=$$(mktemp -d) && chown _apt $$dir && cd $$dir && apt-get update -qq && apt-get download -qq prometheus && dpkg-deb --extract prometheus_*.deb . && \
		install -D usr/bin/promtool $(CURDIR)/.cache/bin/promtool && rm -r $$dir; } || { echo "Install promtool, which is part of Prometheus, then run this again." >&2; exit 1; }

e2e: root packages build kube definitions sdks ## the real binary against a real API server
	go test -tags e2e -count=1 -timeout 40m ./deploy/e2e

docs: ## the tables of docs/flags.md, from the program's flags
	go test -count=1 -run '^TestFlagsDoc$$' ./cmd/nmi -update

manifests: ## deploy/manifests and what else is made from deploy/chart
	go test -count=1 ./deploy/chart -update

# IMAGE is its name, ARCH amd64 or arm64, GO_IMAGE and DEBIAN_IMAGE other base images,
# IMAGE_TOOL=docker another tool. LOCAL=1 does without a registry, with a base from
# Debian's mirror and this machine's Go: deploy/image/build.sh.
IMAGE ?= ghcr.io/podidentity/nmi:$(VERSION)
export IMAGE VERSION
image: ## the container image, with buildah
	@deploy/image/build.sh

image-test: root packages kube ## run the image with the DaemonSet's capabilities
	@deploy/image/test.sh

conformance: root packages build kube sdks ## the cases of docs/conformance.md, which it writes
	@go test -c -tags e2e -o .cache/e2e.test ./deploy/e2e
	@cd deploy/e2e && exec ../../.cache/e2e.test -test.run '^TestConformance$$' -test.timeout 10m -write

clients: root packages build kube sdks ## Azure's SDKs in pods, and how long they take
	@go test -c -tags e2e -o .cache/e2e.test ./deploy/e2e
	@cd deploy/e2e && exec ../../.cache/e2e.test -test.run '^TestClients$$' -test.timeout 10m -write

# Programs that get tokens through Azure's SDKs, with the SDKs.
sdks: $(CLIENTS)/go $(CLIENTS)/js/clients.mjs ## deploy/clients, with Azure's SDKs

$(CLIENTS)/go: $(wildcard deploy/clients/go/*)
	cd deploy/clients/go && CGO_ENABLED=0 go build -trimpath -o ../../../$@ .
	@touch $@

$(CLIENTS)/js/clients.mjs: $(wildcard deploy/clients/js/*)
	@deploy/packages.sh node=nodejs npm
	@mkdir -p $(@D) && cp deploy/clients/js/package*.json $(@D)
	cd $(@D) && npm ci --engine-strict --ignore-scripts --no-audit --no-fund --loglevel=error
	@cp deploy/clients/js/clients.mjs $@

kube: $(KUBE)/kube-apiserver $(KUBE)/kubectl $(KUBE)/etcd ## what e2e runs of Kubernetes, from its modules

# Some minutes the first time, then never again until the version changes.
$(KUBE)/kube-apiserver: deploy/testbed/kube/go.mod
	@echo "building kube-apiserver from its module; this takes some minutes, once"
	cd deploy/testbed/kube && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../../$@ k8s.io/kubernetes/cmd/kube-apiserver
	@touch $@

$(KUBE)/kubectl: deploy/testbed/kube/go.mod
	cd deploy/testbed/kube && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../../$@ k8s.io/kubernetes/cmd/kubectl
	@touch $@

$(KUBE)/etcd: deploy/testbed/kube/go.mod
	cd deploy/testbed/kube && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../../$@ go.etcd.io/etcd/server/v3
	@touch $@

# The kinds of others that the chart has objects of, for TestForeignKinds: <module>@<version>//<path>.
DEFINITIONS := \
	github.com/prometheus-operator/prometheus-operator@v0.85.0//example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml \
	github.com/prometheus-operator/prometheus-operator@v0.85.0//example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml \
	github.com/cilium/cilium@v1.20.2//pkg/k8s/apis/cilium.io/client/crds/v2/ciliumlocalredirectpolicies.yaml \
	github.com/cilium/cilium@v1.20.2//pkg/k8s/apis/cilium.io/client/crds/v2/ciliumnetworkpolicies.yaml \
	github.com/openshift/api@v0.0.0-20251015095338-264e80a2b6e7//security/v1/zz_generated.crd-manifests/0000_03_config-operator_01_securitycontextconstraints.crd.yaml

definitions: .cache/definitions ## custom resource definitions of others, for e2e, from their modules

.cache/definitions: Makefile
	@rm -rf $@ && mkdir -p $@
	@set -e; for definition in $(DEFINITIONS); do \
		module=$${definition%%//*}; \
		go mod download "$$module"; \
		install -m 644 "$$(go list -mod=mod -m -f '{{.Dir}}' "$$module")/$${definition#*//}" $@/; \
	done
	@touch $@

# The clusters of deploy/clusters, whose README says more. RUN=<regexp> runs some scenarios only,
# KEEP=1 leaves the cluster running, CNI and KUBE_PROXY choose its network.
e2e-node: node-parts ## the agent on a node with a real kubelet, containerd and kube-proxy; twice, with ptp and bridge
	@exec deploy/clusters/e2e.sh one-node

node-cluster: node-parts ## the cluster of e2e-node, left running
	@deploy/clusters/one-node/cluster.sh up

node-parts: root $(KUBE)/etcd
	@deploy/packages.sh ip=iproute2 iptables nft=nftables conntrack containerd runc /usr/lib/cni/ptp=containernetworking-plugins openssl buildah mmdebstrap
	@deploy/clusters/kube/build.sh kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl
	@go build -o .cache/clusters/bin/imds ./deploy/clusters/imds
	@deploy/clusters/images.sh
	@deploy/clusters/old-nmi/build.sh

# The same in kind, by docker and with kind's own node image, or with KIND_NODE_IMAGE=<image>. One of
# kind-node-image's needs neither docker nor a registry.
e2e-kind: kind-parts ## the same suite on a node of kind, with systemd
	@exec deploy/clusters/e2e.sh kind

kind-cluster: kind-parts ## the cluster of e2e-kind, left running
	@deploy/clusters/kind/cluster.sh up

kind-node-image: root $(KUBE)/etcd ## a node image for e2e-kind, from Debian's packages and Go modules; some minutes
	@deploy/clusters/kind/local/node-image.sh

kind-parts: root
	@deploy/packages.sh ip=iproute2 buildah mmdebstrap
	@deploy/clusters/kube/build.sh kubectl
	@go build -o .cache/clusters/bin/imds ./deploy/clusters/imds
	@go tool -modfile=.ci/kind/go.mod -n kind >/dev/null # builds it
	@deploy/clusters/images.sh
	@deploy/clusters/old-nmi/build.sh

# KERNELS="bookworm noble" takes some only, RUN=<regexp> some tests: deploy/kernels/run.sh. Without
# /dev/kvm it takes ten minutes a kernel and more. Not part of test.
kernels: root ## the tests of iptables/ebpf on kernels of Debian's and Ubuntu's, in qemu
	@deploy/packages.sh qemu-system-x86_64=qemu-system-x86 busybox cpio depmod=kmod iptables-nft=iptables xz=xz-utils zstd \
		dpkg-deb=dpkg /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
	@exec deploy/kernels/run.sh

# BENCHFLAGS are those of bench/main.go. RESULTS=bench/results keeps the report there.
# BENCH_PEER=<binary> measures another agent, too.
bench: root packages build kube sdks ## cached tokens/s and latency through the redirect, beside nginx and net/http; half an hour
	@deploy/packages.sh wrk nginx=nginx-light
	@go build -o .cache/bench ./bench
	@exec .cache/bench $(if $(RESULTS),-out $(RESULTS)) $(BENCHFLAGS)

bench-heads: root sdks ## record the request heads of Azure's SDKs for bench
	@go build -o .cache/bench ./bench
	@exec .cache/bench -record-heads bench/sdk/heads

# FLAGS=-short in CI: it shows that all still works, in less than a minute.
bench-scale: root packages build kube ## what grows with a cluster of 10,000 identities and a node of 250 pods; 12 minutes
	@go build -o .cache/bench-scale ./bench/scale
	@exec .cache/bench-scale $(FLAGS)

# FLAGS="-length 15s" in CI.
bench-soak: root packages build kube ## half an hour of everything that changes on a node; each answer is checked
	@go build -o .cache/bench-soak ./bench/soak
	@exec .cache/bench-soak $(FLAGS)

bench-misuse: root packages build kube ## what pods that misbehave cost the others, under the memory limit; 4 minutes
	@go build -o .cache/bench-misuse ./bench/misuse
	@exec taskset -c 1 .cache/bench-misuse

bench-micro: ## the steps of a request, one by one
	go test -run '^$$' -bench . -benchmem -benchtime $(or $(BENCHTIME),1s) ./tokencache/... ./podresolver ./proxy ./iptables/...

packages:
	@deploy/packages.sh iptables ipset nft=nftables systemd-analyze=systemd

root:
	@command -v go >/dev/null || { echo "go is not on the PATH; with sudo, keep yours: sudo env \"PATH=\$$PATH\" make ..." >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo "This makes network namespaces, and needs root for that: run it with sudo." >&2; exit 1; }

clean: ## remove what was built, kube-apiserver included
	rm -rf bin .cache
