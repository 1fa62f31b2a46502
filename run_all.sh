#!/usr/bin/env bash
#
# Every run that the paper reports, one command a run, and the report on them (needs bash 4.4):
#
#   bash run_all.sh [--jobs J] [SIZE]    all runs, J at a time (1), then the report
#   bash run_all.sh list [SIZE]          the commands, one a line
#   bash run_all.sh task N [SIZE]        line N of them in place of this script, for schedulers
#
# SIZE: full; quick, a small version; toy-sweep, Figure 1's policies at four shares of good steps; or a row of the
# paper's tables, which has five seeds. A run that was cut off goes on, a finished one is left alone, one that fails does
# not stop the rest. Ctrl-C or SIGTERM lets the runs save their checkpoints, a later second one ends them at once.
#
# PYTHON is the interpreter (python), RUNS the runs' folder (runs/all; quick's are in RUNS-quick), ERDP_DATA a folder of
# stand-in data for quick, OMP_NUM_THREADS the threads of a run (the cores, divided by J); relative paths start here.
# Keep runs that you start by hand out of RUNS: what is there is gone on with, or finished, with the settings it has.
set -u

declare -A arms=(
    [paper]="" [released]="--variant released" [debruijn]="--variant debruijn"
    [debruijn-0.1]="--variant debruijn --entropy-coef 0.1" [debruijn-0.3]="--variant debruijn --entropy-coef 0.3"
    [bc]="--eta 0 --entropy-coef 0 --eval-candidates 1 --num-critics 1" # behaviour cloning
    [q]="--num-critics 1 --entropy-coef 0" [entropy]="--num-critics 1" [ensemble]="--entropy-coef 0"
    [M1]="--num-critics 1" [M4]="--num-critics 4" [M16]="--num-critics 16"
    [M1-nobackup]="--num-critics 1 --no-max-q-backup --eval-candidates 1"
    [M1-nobackup-alpha0]="--num-critics 1 --no-max-q-backup --eval-candidates 1 --entropy-coef 0"
    [clipped-double-q]="--pessimism min --num-critics 2 --entropy-coef 0"
)
rows=({halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2 pen-{human,cloned}-v1
    kitchen-{complete,partial,mixed}-v0 antmaze-{umaze{,-diverse},{medium,large}-{play,diverse}}-v0)

run() { # ENV ARM SEED [SETTING...]: a line of the list, the run's name and its command; ENV toy-5: the toy's share
    local name=$1__$2__$3 arm
    read -ra arm <<<"${arms[$2]}"
    printf '%s\t' "$name"
    printf '%q ' ${data:+env "MINARI_DATASETS_PATH=$data/minari"} "$python" erdp.py --env "${1/#toy-*/toy}" --seed "$3" \
        "${@:4}" "${arm[@]}" --run-dir "$runs/$name"
    echo --resume
}

toy() {
    for seed in {0..4}; do for arm in paper bc q entropy ensemble released; do run toy "$arm" "$seed"; done; done
}

full() {
    toy
    for seed in {0..4}; do # Tables 1 and 2
        for env in "${rows[@]}"; do run "$env" paper "$seed"; done
    done
    for seed in {0..4}; do # Tables 3 and 5, Figures 3 and 5 (M = 64 is Table 2's run); Figure 4
        for env in antmaze-{medium,large}-{play,diverse}-v0; do
            for arm in M1 M4 M16 M1-nobackup M1-nobackup-alpha0 clipped-double-q; do run "$env" "$arm" "$seed"; done
        done
    done
}

quick() {
    toy
    local data=${ERDP_DATA:-} small=(--num-steps 3000 --eval-every 1500 --eval-episodes 10)
    [[ $data ]] || { echo "run_all.sh: quick has no runs on stand-in data, as ERDP_DATA is not set" >&2 && return; }
    for arm in bc M4; do
        run hopper-medium-expert-v2 "$arm" 0 --dataset "$data/standin/d4rl/hopper-medium-expert-v2.hdf5" \
            --loss noise --clip-denoised "${small[@]}"
        run antmaze-umaze-v0 "$arm" 0 --dataset standin/antmaze/umaze-v0 "${small[@]}"
        run pen-human-v1 "$arm" 0 --dataset standin/pen/human-v0 "${small[@]}"
    done
}

toy-sweep() {
    for seed in {0..9}; do
        for share in 20 10 5 2; do
            for arm in bc q ensemble paper debruijn; do run "toy-$share" "$arm" "$seed" --dataset "toy-$share"; done
        done
        ((seed < 5)) || continue
        for arm in released debruijn-0.1 debruijn-0.3; do run toy-5 "$arm" "$seed" --dataset toy-5; done
    done
}

commands() { # the lines of SIZE
    case $size in
        full) full ;;
        quick) quick ;;
        toy-sweep) toy-sweep ;;
        *) for seed in {0..4}; do run "$size" paper "$seed"; done ;;
    esac
}

die() { echo "run_all.sh: $1" >&2 && exit 2; }

CDPATH="" cd -- "$(dirname -- "$0")" || exit 1
jobs=1 action=all n=1 number='^[1-9][0-9]{0,5}$' data=""
[[ ${1:-} != --jobs ]] || { jobs=${2:-} && shift 2; }
[[ ${1:-} != task ]] || { action=task n=${2:-} && shift 2; }
[[ ${1:-} != list ]] || { action=list && shift; }
size=${1:-full}
[[ $# -le 1 && " full quick toy-sweep ${rows[*]} " == *" $size "* ]] || die "'$*' is not understood: see its first lines"
[[ $jobs =~ $number && $n =~ $number ]] || die "--jobs '$jobs' and task '$n' must be numbers from 1 on"
python=${PYTHON:-python} runs=${RUNS:-runs/all} # which no run has by default
[[ $size != quick ]] || runs+=-quick
mapfile -t lines < <(commands)
[[ $action != list ]] || { printf '%s\n' "${lines[@]#*$'\t'}" && exit; }
command -v "$python" >/dev/null || die "'$python' is not there: set PYTHON to a Python interpreter"
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
if [[ $action == task ]]; then
    [[ ${lines[n - 1]:-} ]] || die "there is no task $n"
    eval "exec ${lines[n - 1]#*$'\t'}"
fi

mkdir -p "$runs" || exit 1
stopped="" status=0
set -m # each run is a process group of its own, so that Ctrl-C reaches it once, by the trap
trap 'stopped=1; kill $(jobs -pr) 2>/dev/null' INT TERM HUP
for line in "${lines[@]}"; do
    while (($(jobs -pr | wc -l) >= jobs)); do wait -n; done
    [[ ! $stopped ]] || break
    name=${line%%$'\t'*}
    printf '%(%F %T)T %s\n' -1 "$name"
    eval "exec ${line#*$'\t'}" >>"$runs/$name.log" 2>&1 </dev/null &
done
while [[ $(jobs -pr) ]]; do wait; done # a signal ends `wait`
[[ ! $stopped ]] || exit 130
for line in "${lines[@]}"; do
    name=${line%%$'\t'*}
    [[ -e $runs/$name/result.json ]] || { status=1 && echo "$name failed: see $runs/$name.log"; }
done
"$python" results/report.py "$runs" || status=1
exit "$status"
