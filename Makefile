# Everything a newcomer needs: `make quickstart` and `make test`. Each makes .venv first (once).
.PHONY: setup quickstart test test-quick rehearsal faults lint format lock bench results reference recipes help
export HF_HUB_OFFLINE = 1
export DO_NOT_TRACK = 1
export VLLM_NO_USAGE_STATS = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false

help:             ## What can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup:            ## .venv with the pinned set of this machine's kind (CUDA where nvidia-smi answers)
	@bash requirements/install.sh

quickstart: setup ## Distil a small student from a small teacher, five domains, real vLLM; under 5 minutes on 2 cores
	@.venv/bin/ddk quickstart

# Two at a time: much of the time goes by with one process waiting for another. Files stay whole, as their tests share
# servers and runs; in their own order, as the longest come early in it. A test's training takes one core, and threads
# that wait for each other let others have theirs.
test: setup       ## Every test, the end-to-end run with the real engine among them
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-quick: setup ## Those that need no engine, server or browser: for the working day
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not engine and not server and not browser"

rehearsal: setup  ## A real server and two workers, killed in capture and in training; asserted from the stores
	@.venv/bin/python tests/rehearsal.py

faults: setup     ## Thousands of faults in a root (TRIALS=2000 SEED=0): what finds them; nothing may pass in silence
	@.venv/bin/python tests/faults.py --trials $(or $(TRIALS),2000) --seed $(or $(SEED),0)

lint: setup       ## ruff, mypy (strict), import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: setup     ## Let ruff put the code in form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: setup       ## Remake requirements/{cpu,cuda}.txt from pyproject.toml (UPGRADE=--upgrade for newer versions)
	UPGRADE=$(UPGRADE) bash requirements/lock.sh

bench: bench-startup bench-quickstart bench-capture bench-training bench-methods ## Every benchmark (bench-methods takes hours): a table each, and benchmarks/out/<name>.json

bench-%: setup    ## One of them, e.g. bench-quickstart
	.venv/bin/python benchmarks/bench_$*.py

results: setup    ## benchmarks/RESULTS.md from benchmarks/out/*.json
	.venv/bin/python benchmarks/write_results.py

reference: setup  ## docs/configuration.md from the docstrings of the configuration's fields
	.venv/bin/python -m flows.pages.reference

recipes: setup    ## The table of docs/recipes.md, what each preset will take
	.venv/bin/python -m flows.pages.recipes
