# make quickstart   set up once (own virtual environment), then run suites/quickstart.yaml
# make test         set up once, then run the tests
# make setup        only set up
# make browser      install the browser that the report's tests drive (Debian and Ubuntu, as root); without one they skip

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# each takes a core and about 3 GB; a file's tests stay together, since they share models
TEST_PROCESSES ?= 2

.PHONY: quickstart test lint setup browser clean

quickstart: setup
	$(BIN)/python -m harness run suites/quickstart.yaml

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or later is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: no virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (about 6 GB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[test]'
	@touch $(STAMP)

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

clean:
	rm -rf $(VENV) build *.egg-info
