#!/usr/bin/env bash
# shellcheck disable=SC2317
#
# Every run that the paper reports, one command a run, and the report on them (needs bash 4.4):
#
#   bash run_all.sh [--jobs J] [SIZE]    all runs, J at a time (1), then the report
#   bash run_all.sh list [SIZE]          the commands, one a line
#   bash run_all.sh task N [SIZE]        line N of them, for schedulers
#
# SIZE: full; quick, a small version; toy-sweep, Figure 1's policies at four shares of good steps. A finished run is left
# alone, one that was cut off goes on, one that fails or is killed does not stop the rest. Ctrl-C or SIGTERM lets the
# runs save their checkpoints, a second Ctrl-C ends them at once. PYTHON is the interpreter (python), RUNS the runs'
# folder (runs; quick's are in RUNS/quick), ERDP_DATA a folder of stand-in data for quick; relative paths start here.
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
prefix=()

line() { # NAME WORD...: a line of the list, the name and its command, quoted for a shell
    printf '%s\t%q' "$1" "$2" && printf ' %q' "${@:3}" && echo
}

run() { # ENV ARM SEED [SETTING...]; for ENV toy-5 the toy with that share
    local name=$1__$2__$3
    # shellcheck disable=SC2086
    line "$name" "${prefix[@]}" "$python" erdp.py --env "${1/#toy-*/toy}" --seed "$3" "${@:4}" ${arms[$2]} \
        --run-dir "$runs/$name" --resume
}

toy_and_studies() {
    for seed in {0..4}; do for arm in paper bc q entropy ensemble released; do run toy "$arm" "$seed"; done; done
    for study in figure2 entropy likelihood; do line "$study" "$python" "results/$study.py"; done
}

full() {
    toy_and_studies
    for seed in {0..4}; do # Tables 1 and 2
        for env in {halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2 pen-{human,cloned}-v1 \
            kitchen-{complete,partial,mixed}-v0 antmaze-{umaze{,-diverse},{medium,large}-{play,diverse}}-v0; do
            run "$env" paper "$seed"
        done
    done
    for seed in {0..4}; do # Tables 3 and 5, Figures 3 and 5 (M = 64 is Table 2's run); Figure 4
        for env in antmaze-{medium,large}-{play,diverse}-v0; do
            for arm in M1 M4 M16 M1-nobackup M1-nobackup-alpha0 clipped-double-q; do run "$env" "$arm" "$seed"; done
        done
    done
}

quick() {
    toy_and_studies
    local data=${ERDP_DATA:-} small=(--num-steps 3000 --eval-every 1500 --eval-episodes 10)
    [[ $data ]] || { echo "run_all.sh: quick has no runs on stand-in data, as ERDP_DATA is not set" >&2 && return; }
    prefix=(env "MINARI_DATASETS_PATH=$data/minari")
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

die() { echo "run_all.sh: $1" >&2 && exit 2; }
finished() { [[ -e $runs/$1/result.json || -e $runs/$1.done ]]; } # NAME; a study leaves a stamp

run_line() { # LINE: with its output in a log file. Always succeeds, as xargs would end if it did not
    local name=${1%%$'\t'*} command=${1#*$'\t'} status=0
    [[ ! -e $stop_file ]] || return 0
    finished "$name" && echo "$name is finished already" && return
    printf '%(%F %T)T %s starts\n' -1 "$name"
    echo "\$ $command" >>"$runs/$name.log"
    eval "$command" >>"$runs/$name.log" 2>&1 </dev/null || status=$?
    case $status in
        0) status="is finished" && { [[ -d $runs/$name ]] || : >"$runs/$name.done"; } ;;
        129 | 130 | 143) status=stopped ;;
        *) status="failed with status $status: see $runs/$name.log" ;;
    esac
    printf '%(%F %T)T %s %s\n' -1 "$name" "$status"
}

stop() { # [SIGNAL]: until all have ended, as a run that is still starting hears it later
    : >"$stop_file"
    while [[ $group ]] && kill -0 "$group" 2>/dev/null; do kill "-${1:-TERM}" -- "-$group"; sleep 0.2; done
}

[[ $0 != */* ]] || CDPATH="" cd -- "${0%/*}" || exit 1
jobs=1 action=all n=1 number='^[1-9][0-9]{0,5}$' group=""
[[ ${1:-} != --jobs ]] || { jobs=${2:-} && shift 2; }
[[ ${1:-} != task ]] || { action=task n=${2:-} && shift 2; }
[[ ${1:-} != list ]] || { action=list && shift; }
size=${1:-full}
[[ $# -le 1 && $size =~ ^(full|quick|toy-sweep)$ ]] || die "'$*' is not understood: this file begins with the usage"
[[ $jobs =~ $number && $n =~ $number ]] || die "--jobs '$jobs' and task '$n' must be numbers from 1 on"
python=${PYTHON:-python} runs=${RUNS:-runs}
[[ $size != quick ]] || runs+=/quick
mapfile -t lines < <("$size")
[[ $action != list ]] || { printf '%s\n' "${lines[@]#*$'\t'}" && exit; }
[[ $action != task ]] || lines=("${lines[@]:n - 1:1}")
[[ ${lines[*]} ]] || die "there is no task $n"
command -v "$python" >/dev/null || die "'$python' is not there: set PYTHON to a Python interpreter"
mkdir -p "$runs" || exit 1
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))} runs stop_file="$runs/.stop-$$"
export -f finished run_line
trap stop TERM HUP
trap 'stop "$([[ ! -e $stop_file ]] || echo KILL)"' INT
set -m # job control: the background job is a process group of its own
(trap "" INT TERM HUP && printf '%s\0' "${lines[@]}" | xargs -0 -n 1 -P "$jobs" bash -c "run_line \"\$0\"") &
group=$!
while kill -0 "$group" 2>/dev/null; do wait "$group"; done # a signal interrupts `wait`
[[ ! -e $stop_file ]] || { rm "$stop_file" && exit 130; }
trap - INT TERM HUP
status=0
for line in "${lines[@]}"; do
    name=${line%%$'\t'*}
    finished "$name" || { status=1 && echo "$name is not finished: see $runs/$name.log"; }
done
[[ $action == task ]] || "$python" results/report.py "$runs" || status=1
exit "$status"
