# A newcomer needs only `make quickstart` and `make test`. Each target creates .venv first (once).
.PHONY: setup quickstart postgres test test-quick rehearsal faults lint format lock bench gpu-check example-smollm2 results reference recipes help
export HF_HUB_OFFLINE = 1
export DO_NOT_TRACK = 1
export VLLM_NO_USAGE_STATS = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false

help:             ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup:            ## Create .venv with the pinned packages (CUDA if nvidia-smi answers, else CPU)
	@bash requirements/install.sh

quickstart: setup ## Distil a small student from a small teacher, five domains, real vLLM; under 5 minutes on 2 cores
	@.venv/bin/ddk quickstart

postgres: setup   ## Start a PostgreSQL for Prefect's server in a folder of yours, without a service (FOLDER=…)
	@.venv/bin/python -m flows.operating.postgres start $(FOLDER)

# Three at a time on two cores: much of the time goes by with one process waiting for another. Files stay whole, as their
# tests share servers and runs; in their own order, as the longest come early in it. A test's training takes one core, and
# threads that wait for each other let others have theirs. Python keeps what it has compiled of ours, also where it is told
# not to: hundreds of processes that are started import it.
test: setup       ## Run every test, including the end-to-end run with the real engine
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-quick: setup ## Run the tests that need no engine, server or browser, for daily work
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not engine and not server and not browser"

rehearsal: setup  ## Kill a real server and two workers in capture and in training, and check the stores
	@.venv/bin/python tests/rehearsal.py

faults: setup     ## Inject thousands of faults into a root (TRIALS=2000 SEED=0); every one must be detected
	@.venv/bin/python tests/faults.py --trials $(or $(TRIALS),2000) --seed $(or $(SEED),0)

lint: setup       ## Run ruff, mypy (strict) and import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: setup     ## Format the code with ruff
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: setup       ## Regenerate requirements/{cpu,cuda}.txt from pyproject.toml (UPGRADE=--upgrade for newer versions)
	UPGRADE=$(UPGRADE) bash requirements/lock.sh

bench: bench-startup bench-quickstart bench-capture bench-training bench-methods ## Run every benchmark (bench-methods takes hours) but bench-laws (an hour), bench-context and bench-selection (half an hour each), bench-server (20 minutes) and bench-mixtures (a day); each writes a table and benchmarks/out/<name>.json

bench-%: setup    ## Run one benchmark, e.g. bench-quickstart
	.venv/bin/python benchmarks/bench_$*.py $(ARGS)

gpu-check: setup  ## Run what CI cannot, on this machine's GPUs, in ten minutes (ARGS="--cpu --short" tries the script)
	.venv/bin/python benchmarks/gpu_check.py $(ARGS)

example-smollm2: setup ## Distil a real pre-trained model (fetches 93 MB): SmolLM2-135M into 11 of its 30 layers; docs/smollm2.md
	.venv/bin/python benchmarks/example_smollm2.py $(ARGS)

results: setup    ## Write benchmarks/RESULTS.md from benchmarks/out/*.json
	.venv/bin/python benchmarks/write_results.py

reference: setup  ## Write docs/configuration.md from the docstrings of the configuration's fields
	.venv/bin/python -m flows.pages.reference

recipes: setup    ## Write the table of docs/recipes.md, with each preset's cost
	.venv/bin/python -m flows.pages.recipes
