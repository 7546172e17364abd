#!/usr/bin/env bash
# Makes or completes .venv from the lock file of this machine's kind. `make setup` calls it; a second call is a no-op.
#
#   cuda where `nvidia-smi` answers, cpu elsewhere (DDK_ACCELERATOR=cpu|cuda decides otherwise).
#
# Everything is installed with --no-deps: the lock files are complete, and vLLM's declared torchvision,
# torchaudio and torchcodec are left out on purpose (requirements/overrides-common.txt says why).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    echo "ddk needs Python 3.11, 3.12 or 3.13, and '$python' is $("$python" --version 2>&1 || true)." \
        "Name another one: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi

accelerator=${DDK_ACCELERATOR:-}
if [ -z "$accelerator" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then accelerator=cuda; else accelerator=cpu; fi
fi
lock=requirements/$accelerator.txt
[ -f "$lock" ] || { echo "DDK_ACCELERATOR is '$accelerator'; it must be cpu or cuda." >&2; exit 2; }

# The stamp holds what was installed: a changed lock file or project file installs again, nothing else does.
wanted=$(cat "$lock" pyproject.toml "$0" | cksum)
stamp=.venv/.ddk-installed
[ "$(cat $stamp 2>/dev/null)" = "$accelerator $wanted" ] && exit 0

echo "Installing the pinned $accelerator set into .venv (once; a few minutes)."
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip "$@" --disable-pip-version-check; }

torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$lock")
if [ "$accelerator" = cpu ] && [ "$(uname -s)" = Linux ]; then
    # The default index holds the CUDA build of torch under this version (and gigabytes of libraries with it).
    # The CPU build is tried from wherever pip is configured to look, then from PyTorch's own index.
    if ! .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != sys.argv[1])' \
        "$torch+cpu" 2>/dev/null; then
        pip install -qq --no-deps "torch==$torch+cpu" 2>/dev/null ||
            PIP_INDEX_URL=https://download.pytorch.org/whl/cpu pip install -qq --no-deps "torch==$torch+cpu"
    fi
fi
pip install -qq --no-deps --requirement "$lock"
pip install -qq --no-deps --no-build-isolation --editable .
echo "$accelerator $wanted" >$stamp
