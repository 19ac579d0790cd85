# `make` lists the targets. Works with GNU make from 3.81 (macOS) on.

WORKDIR = runs
EXTRAS = base
MARKERS = not slow
ARGS =

VENV_PYTHON = .venv/bin/python
# Both arms read the same tokens.
TRAIN = $(VENV_PYTHON) -m emo_jax.train --config=configs/$(1).py --workdir='$(WORKDIR)/$(1)' \
  --config.data.cache_dir='$(WORKDIR)/tokens' $(ARGS)
COMPARE = $(VENV_PYTHON) -m emo_jax.evaluate --model='$(WORKDIR)/emo_tiny,$(WORKDIR)/stdmoe_tiny' \
  --keep=32,16,8,4 --matrix_keep=8 --out='$(WORKDIR)/demo'

# Ahead-of-time compiles for TPU ask no metadata server, and two test processes may load libtpu at once.
# Not for `demo`: on a TPU machine the metadata server knows the topology.
AHEAD_OF_TIME = TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check bench notebooks docs links vendor clean

help:
	@echo 'make demo    train a small EMO and a standard mixture, and cut both up; run it again to resume'
	@echo '               WORKDIR=$(WORKDIR)  ARGS="--config.train.steps=50"  EXTRAS=tpu or cuda13'
	@echo 'make test    run the tests'
	@echo '               ARGS="-k routing -x"  MARKERS=slow'
	@echo 'make check   formatting, lint and types, as CI checks them'
	@echo 'make bench   run every benchmark in benchmarks/'
	@echo 'make notebooks  execute the notebooks again, and save what they show'
	@echo 'make docs    build the documentation in docs/_build/html, strictly, and check its links'
	@echo 'make links   check the addresses that it names elsewhere; needs the network'
	@echo 'make vendor  rebuild the chart library of the explorer page from its lock file; needs npm'
	@echo 'make clean   remove .venv, caches and build output; keeps runs/'
	@echo 'Each makes .venv when it needs to, with a Python >= 3.12 that it finds or that you name: PYTHON=...'

# The stamp appears only after a complete install and is renewed when the dependencies change.
.venv/.installed-%: setup.py
	@sh .ci/install.sh '$*'
	@touch .venv/.installed-base '$@'

# With the base packages JAX knows only CPUs; said outright, it does not look for the TPU that `make test`'s libtpu serves.
DEVICE = $(if $(filter base,$(EXTRAS)),export JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}";)

# exec: on Ctrl-C only the program answers, and make waits for it to save.
define shown
@printf '\n== %s\n' '$(subst ','\'',$(1))'
@$(DEVICE) exec $(1)
endef

demo: .venv/.installed-$(EXTRAS)
	$(call shown,$(call TRAIN,emo_tiny))
	$(call shown,$(call TRAIN,stdmoe_tiny))
	$(call shown,$(COMPARE))

test: .venv/.installed-dev
	$(AHEAD_OF_TIME) $(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m '$(MARKERS)' $(ARGS)

check: .venv/.installed-dev
	@status=0; \
	for command in 'ruff format --check .' 'ruff check .' 'mypy emo_jax'; do \
	  echo "== $$command"; \
	  $(VENV_PYTHON) -m $$command || status=1; \
	done; \
	exit $$status

bench: .venv/.installed-dev
	@failed=; found=; \
	for file in benchmarks/[!_]*.py; do \
	  [ -f "$$file" ] || continue; \
	  found=yes; echo "== $$file"; \
	  $(VENV_PYTHON) "$$file" $(ARGS) || failed="$$failed $$file"; \
	done; \
	[ -n "$$found" ] || echo 'There are no benchmarks in benchmarks/ yet.'; \
	[ -z "$$failed" ] || { echo "Failed:$$failed" >&2; exit 1; }

notebooks: .venv/.installed-notebooks
	JAX_PLATFORMS=cpu $(VENV_PYTHON) notebooks/execute.py $(ARGS)

# From nothing: Sphinx warns only of pages that it reads anew.
docs: .venv/.installed-docs
	rm -rf docs/_build
	JAX_PLATFORMS=cpu $(VENV_PYTHON) -m sphinx -W --keep-going -q -j auto docs docs/_build/html $(ARGS)
	$(VENV_PYTHON) docs/check_links.py docs/_build/html
	@echo 'Open docs/_build/html/index.html'

links: .venv/.installed-docs
	JAX_PLATFORMS=cpu $(VENV_PYTHON) -m sphinx -b linkcheck -q docs docs/_build/links $(ARGS)

vendor:
	cd emo_jax/analysis/assets/vendor && npm ci --ignore-scripts --no-audit --no-fund && node build.mjs
	rm -rf emo_jax/analysis/assets/vendor/node_modules

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/_build docs/notebooks
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
