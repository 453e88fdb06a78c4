# Sourced by demo.sh and test.sh. Makes a virtual environment in the clone and installs lgpt into it.
#
#     source launch/setup_env.sh
#     lgpt_setup_env PYTHON EXTRAS      # e.g. lgpt_setup_env "" demo,dev ; "" = a Python that fits
#
# Leaves the environment activated. The second call takes a second: a stamp in the environment holds
# the checksum of what was installed. PyTorch comes as a CPU build where there is no NVIDIA GPU; a torch
# that is already in the environment is kept, so one put there by hand is never replaced.

LGPT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
LGPT_TORCH=2.13.0          # the build that the tests ran with
LGPT_TORCH_PY39=2.6.0      # the users' cluster; the last series with Python 3.9 is 2.8
LGPT_TORCH_AARCH64=2.9.1   # PyPI's build for 64-bit ARM is a CPU build at this release

_lgpt_say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
_lgpt_fail() {
    printf '\nlgpt setup: %s\n' "$*" >&2
    exit 2
}

_lgpt_has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

_lgpt_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# The first Python between 3.9 and 3.14, the plain `python3` before others.
_lgpt_find_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10 python3.14 python3.9; do
        if _lgpt_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    _lgpt_fail "no Python between 3.9 and 3.14 on PATH. Install one, or name it: --python /path/to/python3"
}

# pip with its long output cut to what shows progress; the whole of it is in install.log.
_lgpt_pip() {
    local log="$VIRTUAL_ENV/install.log"
    printf '+ pip install %s\n' "$*" >>"$log"
    python -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a "$log" |
        grep --line-buffered -oE '^(Collecting|Building wheel|Installing|ERROR|error).{0,90}' >&2
    return "${PIPESTATUS[0]}"
}

_lgpt_install_torch() {
    local found
    if found=$(python -W ignore -c 'import torch; print(torch.__version__)' 2>/dev/null); then
        _lgpt_say "PyTorch is in the environment already: $found"
        return
    fi
    local version=$LGPT_TORCH is_cluster_python=false
    if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 9))'; then
        version=$LGPT_TORCH_PY39 is_cluster_python=true
    fi
    if _lgpt_has_gpu; then
        _lgpt_say "Installing PyTorch $version with CUDA (several GB), because nvidia-smi lists a GPU"
        _lgpt_pip "torch==$version" || _lgpt_fail "PyTorch $version could not be installed: see $VIRTUAL_ENV/install.log"
        python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
            _lgpt_say "WARNING: this PyTorch does not see the GPU (is the driver too old for it?). Install the one that fits into $VIRTUAL_ENV by hand and run this again; until then the CPU is used."
        return
    fi
    if [ "$(uname -s)" = Darwin ]; then
        _lgpt_say "Installing PyTorch $version (CPU build)"
        _lgpt_pip "torch==$version" || _lgpt_fail "PyTorch $version could not be installed: see $VIRTUAL_ENV/install.log"
        return
    fi
    _lgpt_install_cpu_torch_linux "$version" "$is_cluster_python"
}

# PyPI's torch for Linux on x86-64 brings CUDA, so the name of the CPU build is asked for exactly ("+cpu"): first
# where pip looks anyhow (a mirror, a wheel folder), then at PyTorch's own index.
_lgpt_install_cpu_torch_linux() {
    local version=$1 is_cluster_python=$2
    _lgpt_say "Installing PyTorch $version, CPU build"
    _lgpt_pip "torch==$version+cpu" >/dev/null 2>&1 && return
    _lgpt_pip --retries 1 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu \
        "torch==$version+cpu" 2>/dev/null && return
    if [ "$(uname -m)" = aarch64 ] && ! $is_cluster_python; then
        _lgpt_say "PyTorch's CPU index is out of reach; PyPI's $LGPT_TORCH_AARCH64 is a CPU build on this machine"
        _lgpt_pip "torch==$LGPT_TORCH_AARCH64" && return
    elif $is_cluster_python || [ "${LGPT_ALLOW_CUDA_TORCH:-0}" = 1 ]; then
        _lgpt_say "PyTorch's CPU index is out of reach. PyPI's $version brings the CUDA libraries: about 3 GB to download, 6 GB of disk"
        _lgpt_pip "torch==$version" && return
    fi
    _lgpt_fail "no CPU build of PyTorch $version was found: pip's own indexes have none and download.pytorch.org could not be used
(details: $VIRTUAL_ENV/install.log). One of these helps:
  - put any PyTorch >= 2.5 into the environment by hand, then run this again: $VIRTUAL_ENV/bin/pip install <wheel or index>
  - tell pip of a folder with the wheel: PIP_FIND_LINKS=/folder bash launch/demo.sh
  - accept PyPI's CUDA build (about 3 GB to download, 6 GB of disk): LGPT_ALLOW_CUDA_TORCH=1 bash launch/demo.sh"
}

_lgpt_checksum() { # of all that decides what gets installed
    local constraints=$1 extras=$2
    { cat "$LGPT_ROOT/setup.py" "$LGPT_ROOT/launch/setup_env.sh" "$constraints"; echo "$extras $LGPT_ROOT"; python -VV; } |
        cksum
}

lgpt_setup_env() {
    local python=${1:-} extras=$2
    local folder="$LGPT_ROOT/.venv"
    if [ -n "$python" ]; then
        folder="$LGPT_ROOT/.venv-$(basename "$python")"
        [ -x "$folder/bin/python" ] || _lgpt_fits "$python" ||
            _lgpt_fail "--python $python: this is not a Python between 3.9 and 3.14: $("$python" -V 2>&1 | head -n 1)"
    elif [ ! -x "$folder/bin/python" ]; then
        python=$(_lgpt_find_python) || exit 2
    fi
    if [ ! -x "$folder/bin/python" ]; then
        _lgpt_say "Making a virtual environment: $folder ($("$python" -V 2>&1))"
        "$python" -m venv "$folder" || {
            rm -rf "$folder"
            _lgpt_fail "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
        }
    fi
    # shellcheck disable=SC1091
    source "$folder/bin/activate"
    local constraints="$LGPT_ROOT/launch/constraints.txt"
    if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 9))'; then
        constraints="$LGPT_ROOT/launch/constraints-py39-torch26.txt"
    fi
    local checksum stamp="$folder/.lgpt-installed-$extras"
    checksum=$(_lgpt_checksum "$constraints" "$extras")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]; then
        _lgpt_install_torch
        _lgpt_say "Installing lgpt[$extras] and what it needs (log: $folder/install.log)"
        _lgpt_pip -c "$constraints" -e "$LGPT_ROOT[$extras]" ||
            _lgpt_fail "the installation failed: $(grep -iE '^ *error' "$folder/install.log" | tail -n 3)
The whole log: $folder/install.log"
        echo "$checksum" >"$stamp"
    fi
    command -v "${CXX:-g++}" >/dev/null 2>&1 ||
        _lgpt_say "NOTE: no C++ compiler (g++). Training on the CPU does without; DeepSpeed's fused GPU optimizers need one."
    if ! _lgpt_has_gpu; then
        # DeepSpeed would take a CUDA toolkit that is installed without a GPU for an accelerator.
        export DS_ACCELERATOR=cpu
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
