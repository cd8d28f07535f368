# Lariat. `make` alone lists what can be made.

SHELL       := /bin/sh
GO          ?= go
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
DESTDIR     ?=
PREFIX      ?= /usr/local
CNIDIR      ?= /opt/cni/bin
VOLUMEDIR   ?= /usr/libexec/kubernetes/kubelet-plugins/volume/exec
UNITDIR     ?= /etc/systemd/system
SHAREDIR    ?= $(PREFIX)/share/lariat
T           ?= 30s

# go.mod pins everything, so the vcs stamp is not needed and a tree without .git builds too.
export GOFLAGS := -buildvcs=false $(filter-out -buildvcs=false,$(GOFLAGS))

BUILD       := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)'

# Tests and bench find the executables by these two.
export LARIAT_BIN   := $(CURDIR)/bin
export LARIAT_PEERS := $(CURDIR)/bin/peers

# Every executable follows from the folders that exist: plugins/x -> lariat-x, ipam -> lariat-ipam,
# flexvolume/x -> x (kubelet calls a driver by that name), helpers/x -> lariat-x, helpers/lariat -> lariat.
CNI         := $(addprefix lariat-,$(patsubst plugins/%/main.go,%,$(wildcard plugins/*/main.go))) $(patsubst %/main.go,lariat-%,$(wildcard ipam/main.go))
VOLUME      := $(patsubst flexvolume/%/main.go,%,$(wildcard flexvolume/*/main.go))
HELPERS     := $(patsubst lariat-lariat,lariat,$(addprefix lariat-,$(patsubst helpers/%/main.go,%,$(wildcard helpers/*/main.go))))

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z\/-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  T=30s (fuzz, bench/soak)   DESTDIR= PREFIX=$(PREFIX) CNIDIR=$(CNIDIR) (install)   BENCH='-n 50 -rounds 3' (bench)   KEEP=1 (demo)   CMD='uname -r' (guest)"

.PHONY: all build
all: build
build: $(addprefix bin/,$(CNI) $(VOLUME) $(HELPERS)) ## every executable into bin/, static

# The go command knows better than make what is out of date.
.PHONY: FORCE
FORCE:
bin/lariat-ipam: FORCE
	@$(BUILD) -o $@ ./ipam
$(addprefix bin/,$(filter-out lariat-ipam,$(CNI))): bin/lariat-%: FORCE
	@$(BUILD) -o $@ ./plugins/$*
$(addprefix bin/,$(VOLUME)): bin/%: FORCE
	@$(BUILD) -o $@ ./flexvolume/$*
bin/lariat: FORCE
	@$(BUILD) -o $@ ./helpers/lariat
$(addprefix bin/,$(filter-out lariat,$(HELPERS))): bin/lariat-%: FORCE
	@$(BUILD) -o $@ ./helpers/$*

.PHONY: peers
peers: ## the reference CNI plugins that tests and bench compare with, into bin/peers
	@hack/peers bin/peers

.PHONY: check
check: ## lint and the tests that need no privileges, namespaces or network: under a minute, on every save
	@hack/check

.PHONY: test
test: deps build peers ## vet, unit tests (race detector), integration: what CI runs
	@hack/test

.PHONY: acceptance
acceptance: deps build ## a real kubelet and the volume drivers, docs/three-hosts.md on Debian 12 and 13; the first call builds and downloads: ten minutes
	@hack/acceptance

# CMD is the guest's shell's to expand, not make's.
override CMD := $(value CMD)
export CMD
.PHONY: guest guest-image
guest: build ## a shell in Debian's kernel under QEMU, or CMD='...' in it: ESP, kernel NFS, NVMe; KERNEL=trixie
	@mkdir -p .cache && $(GO) build -o .cache/guestlab ./hack/guest
	@.cache/guestlab $(if $(CMD),run,shell) -kernel "$(KERNEL)" $(if $(CMD),"$$CMD")
guest-image: ## its image, of the newest Debian packages; no root needed, nothing is installed
	@$(GO) run ./hack/guest prepare -refresh

.PHONY: bench
bench: build peers ## measure against bridge, ptp and host-local, and a VXLAN made by hand
	@mkdir -p .cache
	@$(GO) run ./test/bench -json .cache/bench.json $(BENCH)

.PHONY: bench/scale
bench/scale: build ## many hosts on one store: join, idle, propagation, herd, outage, a big view; BENCH='-n 25,100,200'
	@mkdir -p .cache
	@$(GO) run ./test/bench/scale -json .cache/scale.json $(BENCH)

.PHONY: bench/guest
bench/guest: ## in a guest: an encrypted network against the same tunnel made with swanctl, VXLAN and no tunnel
	@CGO_ENABLED=0 LARIAT_GUEST_KEEP=1 $(GO) test -run '^$$' -bench . -timeout 60m ./test/guest/bench $(BENCH)

.PHONY: bench/volumes
bench/volumes: ## Docker's calls against the bare driver; in a guest: the nfs driver against mount(8)
	@$(GO) test -run '^$$' -bench Lives ./pkg/volume/dockerapi $(BENCH)
	@CGO_ENABLED=0 $(GO) test -run '^$$' -bench . -benchtime 10x -timeout 60m ./test/guest/volumes $(BENCH)

.PHONY: bench/soak
bench/soak: build peers ## three hosts whose containers, helpers and store come and go for T; fails on a lost packet, a leak, leftovers
	@$(GO) run ./test/bench/soak -t $(T) $(BENCH)

.PHONY: demo
demo: build ## three hosts in namespaces, no privileges needed; KEEP=1 leaves them up
	@$(GO) run ./test/demo

.PHONY: lint
lint: ## golangci-lint; the first call builds it
	@hack/lint

.PHONY: fuzz
fuzz: ## every fuzz target in turn, T each
	@hack/fuzz $(T)

.PHONY: update/golden
update/golden: ## rewrite golden files from what the code does now; read the diff
	@hack/update-golden

.PHONY: deps
deps: ## what the tests call: installed on Debian as root, else only named
	@hack/deps

.PHONY: install
install: build ## executables, units and CNI lists below DESTDIR; Debian's runtimes look for plugins in CNIDIR=/usr/lib/cni
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(CNIDIR)
	$(if $(HELPERS),install -m 0755 $(addprefix bin/,$(HELPERS)) $(DESTDIR)$(PREFIX)/bin/)
	$(if $(CNI),install -m 0755 $(addprefix bin/,$(CNI)) $(DESTDIR)$(CNIDIR)/)
# kubelet looks at once at what changes there, except for names with a dot: a driver appears whole.
	for d in $(VOLUME); do to=$(DESTDIR)$(VOLUMEDIR)/lariat~$$d; install -D -m 0755 bin/$$d $$to/.$$d.new && mv -f $$to/.$$d.new $$to/$$d || exit 1; done
	for u in $(wildcard examples/systemd/*.service examples/*.service); do install -D -m 0644 $$u $(DESTDIR)$(UNITDIR)/$${u##*/}; done
	for l in $(wildcard examples/cni/*.conflist); do install -D -m 0644 $$l $(DESTDIR)$(SHAREDIR)/$${l##*/}; done

.PHONY: clean
clean: ## remove bin/ and .cache/
	rm -rf bin .cache
