# `make` lists what there is. Whatever needs Python first sees to it that .venv is there and up to date.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements/lock-py311.txt
LOG := $(VENV)/install.log
MM := $(VENV)/mm
ARGS ?=

# An editable install remembers where it was made, so a .venv that was moved or copied is stale: the
# stamps carry a checksum of the checkout's path.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
LOCKED := $(VENV)/locked-$(PLACE)
READY := $(VENV)/ready-$(PLACE)

# More threads than cores make small tensors many times slower.
export OMP_NUM_THREADS ?= 2
# Idle threads that spin, which is the default, take the cores from whoever has work: with the machine busy,
# a training step of the demo took 4 to 29 times as long (two readings for each of the two models).
export OMP_WAIT_POLICY ?= PASSIVE
export MPLBACKEND ?= Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Of pip's hundreds of lines, show the large downloads and the start of the unpacking; the rest is in the log.
PIP_INSTALL = pip_install() { \
  $(PY) -m pip install --progress-bar off "$$@" 2>&1 | tee -a $(LOG) | while IFS= read -r line; do \
    case $$line in \
      *Downloading*' MB)') echo "    $${line\#\#*Downloading }" ;; \
      'Installing collected'*) echo '    unpacking' ;; \
    esac; \
  done || { tail -n 30 $(LOG) >&2; echo 'make: pip failed, see above and $(LOG)' >&2; exit 1; }; }

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS goes to the tool:  make test ARGS="-k observers -x"    make demo ARGS="--model vit"'

.PHONY: demo
demo: $(READY)  ## train two small transformers on real digits, quantize them, print the table
	@$(PY) tools/demo.py $(ARGS)

# A process for each core, at most four: one alone took 27 minutes on two cores. Each has one thread, for more of them
# than cores make small tensors many times slower. Whole files go to a process, because what a file's tests share is
# made once in each, and in the order of their names: xdist would sort them by the number of tests, which puts the
# file with the longest of all last, to run alone. WORKERS=0 runs everything in one process, as a debugger needs.
# nproc takes OMP_NUM_THREADS for the number of cores, hence env.
WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
  echo $$((cores < 4 ? cores : 4)))

# A part of the tests cannot cover the package: with ARGS, coverage is shown but not judged.
.PHONY: test
test: $(READY)  ## all tests with at least 90 % coverage, then the linters
	@echo '==> pytest'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov=fqvit_plugin \
	  --cov-fail-under=$(if $(ARGS),0,90) $(ARGS)
	@$(MAKE) lint

# The two packages refuse the lock's mmcv-lite: an older one lies over it for this run only.
.PHONY: test-mm
test-mm: $(READY) $(MM)/ready  ## the tests of MMSegmentation and MMDetection projects, which `make test` skips
	@echo '==> pytest tests/test_mm_projects.py'
	@PYTHONPATH=$(abspath $(MM)) FQVIT_MM_PROJECTS=required $(PY) -m pytest tests/test_mm_projects.py $(ARGS)

$(MM)/ready: requirements/mm-py311.txt $(LOCKED)
	@rm -rf $(MM)
	@$(PIP_INSTALL); pip_install --no-deps --target $(MM) -r $<
	@touch $@

.PHONY: lint
lint: $(READY)  ## ruff and mypy
	@echo '==> ruff'
	@$(PY) -m ruff check .
	@echo '==> mypy'
	@$(PY) -m mypy

.PHONY: docs-check
docs-check: $(READY)  ## links between the documents, and the make targets and files they name
	@$(PY) tools/_docs_check.py

.PHONY: docs
docs: $(READY)  ## the site with all documents and the API, into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet $(ARGS)
	@echo 'open site/index.html'

.PHONY: package
package: $(READY)  ## wheel and sdist, into dist/
	@$(PY) -m build --no-isolation . 2>&1 | tail -n 1

.PHONY: env
env: $(READY)  ## only build .venv

.PHONY: clean
clean:  ## remove .venv and what tests, tools and the demo wrote
	rm -rf $(VENV) work_dirs site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov

# The lock is complete and for Python 3.11, so pip need not resolve anything (--no-deps). With another
# Python, pip chooses within the ranges of pyproject.toml. Some packages come as source: they are built
# with the setuptools installed here, not with the newest one (--no-build-isolation).
$(LOCKED): $(LOCK)
	@python=''; \
	for name in $(or $(PYTHON),python3.11 python3); do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	    2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'make: found no Python 3.10 to 3.13 that has venv; name one with make PYTHON=...' >&2; exit 1; \
	fi; \
	echo "==> $(VENV) from $$python ($$($$python -V)): a few minutes, several GB the first time"; \
	$$python -m venv --clear $(VENV)
	@$(PIP_INSTALL); \
	if $(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  pip_install $$(grep -oE '^(setuptools|wheel)==[^ ]+' $(LOCK)); \
	  pip_install --no-deps --no-build-isolation -r $(LOCK); \
	else \
	  echo '    not Python 3.11: versions from the ranges in pyproject.toml, not from the lock'; \
	  pip_install 'setuptools>=66.1,<82' wheel; \
	  pip_install --no-build-isolation -e '.[dev,docs]'; \
	fi
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@echo '==> fqvit_plugin into $(VENV)'
	@$(PIP_INSTALL); pip_install --no-deps --no-build-isolation -e .
	@touch $@
