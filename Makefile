# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo check test test-cluster cluster-up cluster-down chart load test-long gates bench bench-scale fuzz docs

help:
	@echo 'make demo               relay, device and service as processes here, over TLS, with numbers'
	@echo 'make check              format, spelling, scripts, dependencies, licences, lints, documentation'
	@echo 'make test               every test; installs what it lacks, and says what'
	@echo 'make test-cluster       the chart in a real Kubernetes cluster on this machine, without Docker; as root'
	@echo '                        make cluster-up leaves such a cluster for you, make cluster-down takes it away'
	@echo 'make chart              every switch of the Helm chart, rendered and checked'
	@echo 'make load               k6 against a relay on this machine; ARGS=... is for scripts/load'
	@echo 'make test-long          the soak of ten minutes, 9,000 idle streams, 1,000 stalled readers, a fleet'
	@echo 'make gates              instructions, system calls and memory of the data path, against their bounds'
	@echo 'make bench              the data path beside other relays, in about 15 minutes; ARGS=--quick is rough'
	@echo '                        ARGS=--peers also installs other tunnels, and compares them from end to end'
	@echo 'make bench-scale        what device links, handshakes and further edges cost, in about 5 minutes'
	@echo 'make fuzz TARGET=name   one fuzz target, for MINUTES=5; needs a nightly compiler'
	@echo 'make docs               the tables in docs/, and the crates under target/doc'

# ARGS='--break key' and ARGS='--break byte' show that the demonstration can fail.
demo:
	@scripts/demo $(ARGS)

check:
	@scripts/check

test:
	@scripts/test

# SCENARIOS='install changes' tries only these.
test-cluster:
	@scripts/test-cluster test $(SCENARIOS)

cluster-up:
	@scripts/test-cluster up

cluster-down:
	@scripts/test-cluster down

chart:
	@scripts/chart

load:
	@scripts/load $(ARGS)

test-long:
	@scripts/test-long

gates:
	@scripts/gates

bench:
	@scripts/bench $(ARGS)

bench-scale:
	@scripts/bench-scale $(ARGS)

fuzz:
	@scripts/fuzz '$(TARGET)' '$(or $(MINUTES),5)'

docs:
	UPDATE_DOCS=1 cargo test --package midspan-tests --test it --locked -- docs::the_table --test-threads=1
	cargo doc --workspace --no-deps --locked
