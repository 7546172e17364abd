#!/usr/bin/env bash
# Remakes requirements/cpu.txt and requirements/cuda.txt from pyproject.toml: `make lock`.
# No index address is written into them: each machine's pip configuration says where packages come from.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # lock EXTRA [OVERRIDES...]
    local extra=$1
    shift
    .venv/bin/uv pip compile pyproject.toml --extra "$extra" --extra dev --override requirements/overrides-common.txt "$@" \
        --universal --python-version 3.11 --no-annotate --no-emit-index-url --quiet --upgrade \
        --custom-compile-command "make lock" --output-file "requirements/$extra.txt"
}
lock cpu --override requirements/overrides-cpu.txt
lock cuda
