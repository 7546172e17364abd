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

echo "Installing the pinned $accelerator set into .venv (once; a minute or two)."
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip "$@" --disable-pip-version-check; }

# uv installs the same lock file in a fraction of pip's time. It is taken from the PATH, or from the package index for
# the time of this script; where neither has it, or DDK_INSTALLER=pip says so, pip does everything.
uv_version=0.13.9
uv_folder=$(mktemp -d)
trap 'rm -rf "$uv_folder"' EXIT
find_uv() {
    [ "${DDK_INSTALLER:-uv}" = uv ] || return
    command -v uv && return
    pip install -qq --no-deps --target "$uv_folder" "uv==$uv_version" >/dev/null 2>&1 && echo "$uv_folder/bin/uv"
}

# uv does not read pip's configuration: where pip is told of an index, of folders or of a certificate, uv is told too.
# Such a place may hold a few of the packages only, so that a version is looked for in all places, as pip does.
as_pip_is_told() {
    local configured index extra links cert
    configured=$(pip config list 2>/dev/null || true) # from PIP_… and from files
    told() { # several lines as one
        sed -n "s/^\(global\|install\|:env:\)\.$1='\(.*\)'$/\2/p" <<<"$configured" | sed 's/\\n/ /g' | tr '\n' ' '
    }
    index=$(told index-url) extra=$(told extra-index-url) links=$(told find-links) cert=$(told cert)
    # Its user's own UV_… settings stand.
    [ -z "${index// /}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${index%% *}}"
    [ -z "${extra// /}" ] || export UV_INDEX="${UV_INDEX:-${extra% }}"
    [ -z "${links// /}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "$links" | xargs -n1 | sort -u | paste -sd,)}"
    [ -z "${cert// /}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-${cert%% *}}"
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
}

install() { # arguments as of `pip install`
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python .venv/bin/python --no-deps "$@"
    else
        pip install -qq --no-deps "$@"
    fi
}

torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$lock")
has_torch() {
    .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != sys.argv[1])' "$1" 2>/dev/null
}

install_all() {
    # Python compiles what it imports, once. Where it may not write that down, every start would compile anew (24 s
    # instead of 9 s for vLLM's imports): there it is done now, for a minute, as pip does anyway.
    local compiled=${uv:+${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}}
    # The default index holds the CUDA build of torch under this version (and gigabytes of libraries with it).
    # The CPU build is tried from wherever pip is configured to look, then from PyTorch's own index, which uv knows.
    if [ "$accelerator" = cpu ] && [ "$(uname -s)" = Linux ] && ! has_torch "$torch+cpu"; then
        install $compiled "torch==$torch+cpu" 2>/dev/null || {
            if [ -z "$uv" ]; then
                echo "The CPU build of torch ($torch+cpu) is at no index that pip knows: have uv on the PATH, which finds" \
                    "it by itself, or name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL." >&2
                return 1
            fi
            install $compiled --torch-backend cpu "torch==$torch+cpu" || return
        }
    fi
    install $compiled --requirement "$lock" &&
        install --no-build-isolation --editable .
}

uv=$(find_uv) || uv=
[ -z "$uv" ] || as_pip_is_told
if ! install_all; then
    [ -n "$uv" ] || exit 1
    echo "uv could not install the packages; pip tries." >&2
    uv=
    install_all
fi
echo "$accelerator $wanted" >$stamp
