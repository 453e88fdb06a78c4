#!/usr/bin/env bash
# Sets up, then runs the whole test suite.
#
#     bash launch/test.sh [--python python3.9] [pytest arguments ...]
#
# Two processes run the test files side by side; -n 4 makes it four, -n 0 none (for -s and --pdb).
# --python P makes and uses its own environment, .venv-P. With Python 3.9 the versions of the users'
# cluster are installed (launch/constraints-py39-torch26.txt; PyTorch's CUDA build needs 6 GB of disk).
set -euo pipefail

python=""
needs() { echo "test.sh: $1 needs $2 after it" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python=${2-}; [ -n "$python" ] || needs "--python" "a name or path"; shift 2 ;;
        --python=*) python=${1#--python=}; shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) break ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
lgpt_setup_env "$python" demo,dev
cd "$LGPT_ROOT"
exec python -m pytest -n 2 --no-loadscope-reorder "$@"
