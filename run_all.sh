#!/usr/bin/env bash
# Every run that the paper reports, one command a run, and the report on them (needs bash 4.4):
#
#   bash run_all.sh [--jobs J] [full|quick]    all runs, J at a time (1), then the report; quick is a small version
#   bash run_all.sh list [full|quick]          the commands, one a line
#   bash run_all.sh task N [full|quick]        line N of them, for schedulers
#   bash run_all.sh report [full|quick]        the report alone
#
# A finished run is left alone, one that was cut off goes on, one that fails does not stop the rest. Ctrl-C, or SIGTERM,
# lets the runs save their checkpoints. PYTHON is the interpreter (python), RUNS the runs' folder (runs; quick's are in
# RUNS/quick), ERDP_DATA a folder of stand-in data for quick; relative paths start at this file's folder.
set -u

die() { # MESSAGE: bad input
    echo "run_all.sh: $1" >&2
    exit 2
}

say() { printf '%(%F %T)T %s\n' -1 "$*"; }

# ---- the runs --------------------------------------------------------------------------------------------------------

names=() commands=() prefix=() # of each line: its name in the runs' folder, and its command, quoted for a shell

add() { # NAME WORD...
    local words
    printf -v words '%q ' "${@:2}"
    names+=("$1") commands+=("${words% }")
}

run() { # ENV ARM SEED [SETTING...]: erdp.py
    local name=$1__$2__$3
    add "$name" "${prefix[@]}" "$python" erdp.py --env "$1" --seed "$3" "${@:4}" --run-dir "$runs/$name"
}

bc=(--eta 0 --entropy-coef 0 --eval-candidates 1 --num-critics 1) # behaviour cloning
plain=(--num-critics 1 --no-max-q-backup --eval-candidates 1)     # one critic, no best of several in training or acting

toy_and_studies() {
    local seed study
    for seed in {0..4}; do # Figure 1
        run toy paper "$seed"
        run toy bc "$seed" "${bc[@]}"
        run toy q "$seed" --num-critics 1 --entropy-coef 0
        run toy entropy "$seed" --num-critics 1
        run toy ensemble "$seed" --entropy-coef 0
        run toy released "$seed" --variant released
    done
    for study in figure2 entropy likelihood; do
        add "$study" "$python" "results/$study.py"
    done
}

full() {
    local seed env M
    toy_and_studies
    for seed in {0..4}; do # Tables 1 and 2
        for env in {halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2 pen-{human,cloned}-v1 \
            kitchen-{complete,partial,mixed}-v0 antmaze-{umaze{,-diverse},{medium,large}-{play,diverse}}-v0; do
            run "$env" paper "$seed"
        done
    done
    for seed in {0..4}; do
        for env in antmaze-{medium,large}-{play,diverse}-v0; do
            for M in 1 4 16; do # Tables 3 and 5, Figures 3 (left) and 5; M = 64 is Table 2's run
                run "$env" "M$M" "$seed" --num-critics "$M"
            done
            run "$env" M1-nobackup "$seed" "${plain[@]}" # Figure 3 (right)
            run "$env" M1-nobackup-alpha0 "$seed" "${plain[@]}" --entropy-coef 0
            run "$env" diffusion-ql "$seed" --pessimism min --num-critics 2 --entropy-coef 0 # Figure 4
        done
    done
}

quick() {
    toy_and_studies
    if [[ -z ${ERDP_DATA:-} ]]; then
        echo "run_all.sh: quick leaves out its runs on stand-in data, as ERDP_DATA is not set" >&2
        return
    fi
    prefix=(env "MINARI_DATASETS_PATH=$ERDP_DATA/minari")
    recorded hopper-medium-expert-v2 "$ERDP_DATA/standin/d4rl/hopper-medium-expert-v2.hdf5" --loss noise --clip-denoised
    recorded antmaze-umaze-v0 standin/antmaze/umaze-v0
    recorded pen-human-v1 standin/pen/human-v0
}

recorded() { # ENV DATASET [SETTING...]: short runs on data that stands in for a row's own
    local small=(--num-steps 3000 --eval-every 1500 --eval-episodes 10)
    run "$1" bc 0 --dataset "${@:2}" "${small[@]}" "${bc[@]}"
    run "$1" paper 0 --dataset "${@:2}" "${small[@]}" --num-critics 4
}

# ---- running them ----------------------------------------------------------------------------------------------------

finished() { [[ -e $runs/$1/result.json || -e $runs/$1.done ]]; } # NAME; a study leaves a stamp

run_line() { # I: line I unless it is finished, with its output in a log file
    local name=${names[$1]} command=${commands[$1]} how=started status=0
    local folder=$runs/$name log=$runs/$name.log
    if finished "$name"; then
        say "$name is finished already"
        return 0
    fi
    { mkdir -p "$runs" && exec 9>>"$log"; } || return 1
    flock -n 9 2>/dev/null # kept by whatever has the log open; its status is 1 only where another process has the lock
    if (($? == 1)); then
        say "$name is being run by another process"
        return 1
    fi
    if [[ -e $folder/checkpoint.pt ]]; then
        how=resumed command+=" --resume"
    elif [[ -d $folder ]]; then # cut off before its first checkpoint: what that leaves is removed, and nothing else
        rm -f "$folder"/{config.json,events.out.tfevents.*,.part-*}
        rmdir "$folder" || return 1
    fi
    say "$name $how"
    echo "\$ $command" >&9
    trap : INT       # Ctrl-C is the command's business
    trap '' TERM HUP # also in the command: a scheduler sends them to every process, and `stop` turns them into Ctrl-C
    eval "$command" >&9 2>&1 </dev/null || status=$?
    case $status in
        0) say "$name finished$(sed -n 's/^final \(score [^;]*\);.*/: \1/p' "$log" | tail -n 1)" ;;
        130) say "$name stopped" ;;
        *) say "$name failed with status $status: see $log" ;;
    esac
    [[ $status != 0 || -d $folder ]] || : >"$runs/$name.done"
    return "$status"
}

stop() { # [SIGNAL]: ends the running lines, by what Ctrl-C sends
    local group
    stopped=yes
    for group in $(jobs -rp); do
        kill "-${1:-INT}" -- "-$group"
    done
}

run_lines() { # I...: $jobs lines at a time. Returns the status of the only one or, of several, any
    local i running=0 status=0
    stopped=""
    trap stop TERM HUP
    trap 'stop ${stopped:+KILL}' INT # a second Ctrl-C ends them at once
    for i; do
        set -m # job control: a background job is a process group of its own and does not ignore SIGINT
        run_line "$i" &
        set +m
        if ((++running >= jobs)); then
            wait -n
            status=$?
        fi
        [[ -z $stopped ]] || break
    done
    until wait; do :; done # a signal interrupts `wait`
    [[ -z $stopped ]] || exit 130
    trap - INT TERM HUP
    return "$status"
}

report() { # of the runs, and of the records that come with the project
    local folder folders=()
    for folder in "$runs" results/runs; do
        [[ ! -d $folder ]] || folders+=("$folder")
    done
    "$python" results/report.py "${folders[@]}"
}

all() {
    local name status=0
    run_lines "${!names[@]}"
    report || status=1
    for name in "${names[@]}"; do
        finished "$name" || { status=1 && say "$name is not finished: see $runs/$name.log"; }
    done
    return "$status"
}

task() { run_lines $((line - 1)); }

list() { printf '%s\n' "${commands[@]}"; }

# ---- the command line ------------------------------------------------------------------------------------------------

[[ $0 != */* ]] || CDPATH="" cd -- "${0%/*}" || exit 1
jobs=1 action=all line=1
if [[ ${1:-} == --jobs ]]; then
    jobs=${2:-} && shift $(($# > 1 ? 2 : 1))
fi
case ${1:-} in
    list | report) action=$1 && shift ;;
    task) action=task line=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
esac
size=${1:-full} number='^[1-9][0-9]{0,5}$'
[[ $# -le 1 && $size =~ ^(full|quick)$ ]] || die "'$*' is not understood: the first lines of this file have the usage"
[[ $jobs =~ $number ]] || die "--jobs '$jobs' must be a number from 1 on"
python=${PYTHON:-python} runs=${RUNS:-runs}
[[ $size == full ]] || runs+=/quick
"$size"
[[ $line =~ $number && $line -le ${#names[@]} ]] || die "task '$line' must be a number from 1 to ${#names[@]}"
if [[ $action != list ]]; then
    command -v "$python" >/dev/null || die "'$python' is not there: set PYTHON to a Python interpreter"
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
fi
"$action"
