#!/usr/bin/env bash
# Remakes requirements/cpu.txt and requirements/cuda.txt from pyproject.toml: `make lock`. Versions that are locked stay
# as far as they can; `make lock UPGRADE=--upgrade` takes the newest that go together.
# No index address is written into them: each machine's pip configuration says where packages come from.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # lock EXTRA [OVERRIDES...]
    local extra=$1
    shift
    .venv/bin/uv pip compile pyproject.toml --extra "$extra" --extra dev --override requirements/overrides-common.txt "$@" \
        --universal --python-version 3.11 --no-annotate --no-emit-index-url --quiet ${UPGRADE:+--upgrade} \
        --custom-compile-command "make lock" --output-file "requirements/$extra.txt"
}
lock cpu --override requirements/overrides-cpu.txt
lock cuda
