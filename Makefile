# Two commands do everything on a fresh machine with Python 3.11 (or newer), pip and make:
#   make quickstart   set up, then teach a small reasoner by reinforcement learning on this CPU
#   make test         set up, then pass the tests that take minutes
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CHROMIUM = { command -v chromium && command -v chromedriver; } >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; }

.DEFAULT_GOAL := help
.PHONY: help setup lock latest quickstart test test-all test-slow engines test-engines test-cuda test-gpu test-report test-slurm pictures lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3

setup: $(STAMP)

# torch first and pinned: an unpinned one brings another build. The rest is locked, with hashes.
$(STAMP): setup.py pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# Resolve setup.py anew, within its bounds.
lock: setup
	$(BIN)/python tools/lock.py

# The quick tests with the newest packages that setup.py allows, in an environment beside the locked one. For a weekly job.
latest:
	test -x .latest/bin/python || $(PYTHON) -m venv .latest
	.latest/bin/pip install --quiet torch==2.13.0
	.latest/bin/pip install --quiet --upgrade --upgrade-strategy eager torch==2.13.0 --editable '.[dev]'
	.latest/bin/python -m pytest -m "not slow and $(ELSEWHERE)"

# An interrupted quick start goes on; a finished one shows its table again.
quickstart: setup
	$(BIN)/megarl train examples/quickstart/train.yaml --resume

ELSEWHERE := not engines and not slurm and not gpu and not cuda and not browser

# Under five minutes on two cores.
test: setup
	$(BIN)/python -m pytest -m "not slow and $(ELSEWHERE)"
	@echo "Left out: slow tests, the report in Chromium, a real Slurm, real SGLang and vLLM servers: make test-all."
	@echo "And everything on a GPU: make test-gpu."

# The rest. As root on Debian it installs Chromium and Slurm; the engines are about 6 GB.
test-all: test-slow test-cuda test-report test-slurm test-engines

test-slow: setup
	$(BIN)/python -m pytest -m "slow and $(ELSEWHERE)"

# The rollout engines' own environments: .engines/sglang and .engines/vllm, about 3 GB each, rebuilt when a pin changes.
engines: setup
	$(BIN)/python tools/engines/build.py sglang vllm

test-engines: engines
	$(BIN)/python -m pytest -m engines tests/engines

# What can be proven of the path of a GPU without one. Fetches wheels of 0.5 GB, unpacks them in .cache, installs none.
test-cuda: setup
	$(BIN)/python tools/cuda_wheels.py
	$(BIN)/python -m pytest -m cuda tests/nccl tests/signatures

# Needs one CUDA device and transformer-engine, in the environment of PYTHON: see tests/gpu/README.md.
# The parts of `megarl bench gpu`, judged: each in its own process, which imports while the part before it runs.
test-gpu:
	MEGARL_DEVICE=cuda MEGARL_GPU_RESULTS=docs/gpu_results.md $(PYTHON) -m pytest tests/gpu

# The report in headless Chromium, checked by axe-core: that wheel is taken for the one script that it holds.
test-report: setup
	$(CHROMIUM)
	$(BIN)/pip install --quiet --no-deps axe-playwright-python==0.1.8
	$(BIN)/python -m pytest -m browser tests/report

# A real Slurm of four nodes on this machine, as root on Debian: installed when absent, started, submitted to, taken down.
test-slurm: setup
	$(BIN)/python tests/support/cluster.py install
	$(BIN)/python -m pytest -m slurm tests/slurm

# The first page's pictures: the quick start's curve and its report. The drawings beside them are written by hand.
pictures: setup
	$(CHROMIUM)
	$(BIN)/megarl train examples/quickstart/train.yaml run=runs/pictures/quickstart evaluation.every=4 --resume
	$(BIN)/python tools/pictures.py runs/pictures/quickstart docs/pictures

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy megarl checkpoints_conv tools

clean:
	rm -rf $(VENV) .latest build *.egg-info
