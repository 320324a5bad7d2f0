# Targets are documented by the text after "##"; `make help` prints them.
# CI calls `make ci` and nothing else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := bin
# What is downloaded or built beside the product, kept between runs.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/raceway
GO ?= go
TOOL := $(GO) tool -modfile=.ci/tools/go.mod
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)
# The image's name is what the chart asks for, unless told otherwise.
IMAGE ?= ghcr.io/raceway-mesh/raceway:$(shell sed -n 's/^appVersion: //p' daemonset/chart/Chart.yaml)
ARCH ?= $(shell $(GO) env GOARCH)
LDFLAGS := $(if $(VERSION),-X github.com/raceway-mesh/raceway/cmd/internal/version.linked=$(VERSION))

# The committed BPF object is made by the clang of Debian 12; another one's is as good and
# not the same byte for byte.
CLANG ?= $(or $(shell command -v clang-14),clang)
CLANG_MAJOR := 14

# Tests run anew each time (-count 1): those that build the programs and run them would be taken
# from the cache when only the programs have changed.

# Time for one package's tests. The root tests move gigabytes, under the race detector.
TEST_TIMEOUT ?= 40m
FUZZTIME ?= 5s

# Packages whose tests make whole clusters. They run one after the other: each of them is
# many processes already.
CLUSTERS := ./e2e/... ./perf/...

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/raceway, bin/raceway-agent, bin/raceway-ca and bin/raceway-cni
	@mkdir -p $(BIN)
	$(call go-build,$(BIN))

# All programs into a directory, linked statically: the image has no C library. gRPC's own
# pages of its calls, which nothing serves here, would be a seventh of the agent's program.
define go-build
CGO_ENABLED=0 $(GO) build -trimpath -tags grpcnotrace -ldflags '$(LDFLAGS)' -o $(1)/ ./cmd/raceway ./cmd/raceway-agent ./cmd/raceway-ca
CGO_ENABLED=0 $(GO) build -trimpath -tags grpcnotrace -ldflags '$(LDFLAGS)' -o $(1)/raceway-cni ./cni-plugin
endef

.PHONY: programs
programs: OUT ?= $(BIN)/linux-$(ARCH)
programs: export GOOS = linux
programs: export GOARCH = $(ARCH)
programs: ## build the programs of the image into OUT; ARCH=arm64
	@mkdir -p $(OUT)
	$(call go-build,$(OUT))

.PHONY: image
image: programs ## write the container image bin/raceway-image.tar, without a container engine; ARCH=arm64
	$(GO) run ./daemonset/image --bin $(BIN)/linux-$(ARCH) --arch $(ARCH) \
		--tag $(IMAGE) --version '$(VERSION)' --output $(BIN)/raceway-image.tar

.PHONY: manifests
manifests: ## render daemonset/raceway.yaml from the chart
	@.ci/render $(TOOL) helm >daemonset/raceway.yaml

.PHONY: generate
generate: manifests ## compile the BPF programs and generate all that is generated (needs clang, llvm and libbpf-dev)
	BPF2GO_CC=$(CLANG) $(GO) generate ./...

.PHONY: generate-check
generate-check: ## check that what is generated and committed is what the sources give
	@.ci/generate-check $(CLANG) $(CLANG_MAJOR)

# -short leaves out tests on Kubernetes that take minutes each.
SHORT ?=

# Tests of the kernel's side take longest and wait most, so that they begin first, beside the others.
.PHONY: test
test: ## run all tests with the race detector; as root, those in network namespaces too
	$(GO) test -race -count 1 -timeout $(TEST_TIMEOUT) $$($(GO) list ./dataplane/kernel ./... | grep -vE '/raceway/(e2e|perf)(/|$$)')
	$(GO) test -race -count 1 -timeout $(TEST_TIMEOUT) -p 1 $(SHORT) $(CLUSTERS)

.PHONY: test-root
test-root: ## run the tests that need root, and fail those that cannot run
	RACEWAY_REQUIRE_ROOT=1 $(GO) test -race -count 1 -timeout $(TEST_TIMEOUT) -p 1 \
		$$(git grep -lE 'netnstest"|labtest"|RACEWAY_REQUIRE_ROOT' -- '*_test.go' | xargs -n1 dirname | sort -u | sed 's,^,./,')

.PHONY: kubernetes
kubernetes: ## build or find what the tests' Kubernetes clusters are made of (some minutes, once)
	$(GO) run ./e2e/cluster/cmd/parts

.PHONY: e2e
e2e: kubernetes ## run the end-to-end tests alone, those on Kubernetes too (needs root)
	RACEWAY_REQUIRE_ROOT=1 RACEWAY_REQUIRE_PEERS=1 $(GO) test -race -count 1 -timeout $(TEST_TIMEOUT) -p 1 ./e2e/...

.PHONY: e2e-oldkernel
e2e-oldkernel: ## run the tests that need a kernel on Debian's 6.1, under QEMU (slow; apt-get install qemu-system-x86 cpio)
	$(GO) run ./e2e/oldkernel $(ARGS)

.PHONY: fuzz
fuzz: ## fuzz every parser for FUZZTIME (5s) each
	@.ci/fuzz $(FUZZTIME)

.PHONY: demo
demo: build ## show it all on this machine (needs root); ARGS=--ipv6, ARGS=--keep
	$(BIN)/raceway demo $(ARGS)

.PHONY: bench
bench: export RACEWAY_ENVOY ?= $(wildcard $(CACHE)/envoy/envoy/_bin/envoy)
bench: build ## measure what the mesh costs beside HAProxy and Envoy where they are, into perf/results (needs root); ARGS=--short
	$(BIN)/raceway perf run $(ARGS)

.PHONY: soak
soak: build ## put a mixed load with checksums on the mesh, and look for leaks (needs root); ARGS="--duration 1h"
	$(BIN)/raceway perf soak $(ARGS)

.PHONY: scale
scale: kubernetes ## measure discovery with 50,000 pods, into perf/results (needs root, half an hour); ARGS="-pods 5000"
	$(GO) run ./perf/scale $(ARGS)

.PHONY: lint
lint: ## check style and the rules of .golangci.yml, that go.mod is tidy, and the charts
	$(TOOL) golangci-lint run ./...
	$(GO) mod tidy -diff
	$(TOOL) helm lint --strict --quiet daemonset/chart daemonset/crds

.PHONY: fmt
fmt: ## format the Go sources
	$(TOOL) golangci-lint fmt ./...

.PHONY: clean
clean: ## remove what was built, and the clusters whose maker was killed
	rm -rf $(BIN)
	@if [ -d /run/raceway-lab ]; then $(GO) run ./e2e/lab/cmd/labclean; fi
	@if [ -d /var/tmp/raceway-cluster ]; then $(GO) run ./e2e/cluster/cmd/clusterclean; fi

# Peers that the interoperability tests talk to: missing ones fail in CI.
.PHONY: peers
peers: $(CACHE)/h2spec
	@hbone/interop/install-envoy.sh $(CACHE)/envoy >/dev/null

$(CACHE)/h2spec: .ci/tools/go.mod
	@mkdir -p $(CACHE)
	@$(GO) build -modfile=.ci/tools/go.mod -o $@ github.com/summerwind/h2spec/cmd/h2spec

.PHONY: ci
ci: export RACEWAY_REQUIRE_ROOT := 1
ci: export RACEWAY_REQUIRE_PEERS := 1
ci: export RACEWAY_ENVOY := $(CACHE)/envoy/envoy/_bin/envoy
ci: export RACEWAY_H2SPEC := $(CACHE)/h2spec
ci: ## everything that CI checks (needs root and apt-get; installs what is missing)
	@.ci/packages
	@.ci/step "peers" $(MAKE) peers
	@.ci/step "Kubernetes" $(MAKE) kubernetes
	@.ci/step "lint" $(MAKE) lint
	@.ci/step "generated code" $(MAKE) generate-check
	@.ci/step "build" $(MAKE) build
	@.ci/step "tests" $(MAKE) test SHORT=-short
	@.ci/step "fuzzing" $(MAKE) fuzz FUZZTIME=2s
	@.ci/step "demo on IPv4" $(MAKE) demo ARGS=--mariadb
	@.ci/step "demo on IPv6" $(MAKE) demo ARGS=--ipv6
	@.ci/step "soak" $(MAKE) soak ARGS="--duration 1m"
	@.ci/step "benchmarks" $(MAKE) bench ARGS=--short
