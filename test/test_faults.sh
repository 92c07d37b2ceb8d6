#!/bin/sh
# test_faults.sh BUILD [all]: whatever a machine fails at, and wherever a kill comes, a program ends with the bytes of an
# undisturbed run, or says why not; started again it ends with those bytes, and nothing half-written stays behind.
#
# One call for a file (inject.c) or one allocation (oom.c) of a short run fails, at another place each time: at some of
# them, or with `all` (make faults) at all. Programs: ./train --scale 1 and --vqgan, ./train --resume, ./sample -o and
# --convert, ./inpaint.
case $1 in *sanitize*) echo "skipped: the sanitizers have the system's calls and the memory to themselves" && exit ;; esac
build=$(cd "$1" && pwd)
all=$2
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. "$here/lib.sh"
export IMAGEBART_DEVICE=cpu IMAGEBART_TEST_PAUSE=0.01
cc=${CC:-$(command -v gcc || command -v clang)}
$cc -std=c11 -O1 -Wall -Wextra -Wshadow -Werror -o "$dir/inject" "$here/inject.c" || exit 1
$cc -std=c11 -O1 -Wall -Wextra -Wshadow -Werror -shared -fPIC -o "$dir/oom.so" "$here/oom.c" -ldl || exit 1
area=$dir/area
mkdir "$area"
"$dir/inject" "$area" change 1 EIO true
[ $? -ne 77 ] || { echo "skipped: this machine does not let a process trace another, or is no x86-64" && exit; }

# ---- the programs: prepare makes $area, the command writes there, results are what it must hold at the end ----
"$build/pictures" make "$dir/data" 24 20 || exit 1
options="--config $here/tiny.txt --threads 1 --save-every 2 --eval-every 3 --picture-every 4 --data $area/data --run $area/run"
train() { "$build/train" --config "$here/tiny.txt" --data "$dir/data" --threads 1 "$@" >/dev/null 2>"$dir/err" || { cat "$dir/err" && exit 1; }; }
train --run "$dir/model" --vqgan --steps 4
cp -r "$dir/model" "$dir/first"
for scale in 1 2 3; do train --run "$dir/model" --scale $scale --steps 2; done
"$build/sample" "$dir/model" -n 1 -o "$dir/picture.png" >/dev/null 2>&1 || exit 1
prepare() {
    rm -rf "$area" && mkdir "$area"
    case $program in
        vqgan) cp -r "$dir/data" "$area" ;;
        scale) cp -r "$dir/data" "$area" && mkdir "$area/run" && cp "$dir/first/vqgan.safetensors" "$area/run" ;;
        resume) cp -r "$dir/data" "$area" && cp -r "$dir/half" "$area/run" ;;
        *) cp -r "$dir/model" "$dir/picture.png" "$area" && mkdir "$area/out" ;;
    esac
}
choose() { # choose PROGRAM: what it does, how it is done again, what it leaves
    program=$1 again=
    case $program in
        vqgan) do="train $options --vqgan --steps 4" again=--resume results="run/vqgan.state.safetensors run/vqgan.safetensors run/vqgan.best.safetensors" ;;
        scale | resume)
            do="train $options --scale 1 --steps 5" again=--resume
            [ $program = scale ] || do="train $options --scale 1 --steps 8 --resume" again=
            results="run/scale1.state.safetensors run/scale1.safetensors run/scale1.best.safetensors run/train.tokens run/val.tokens run/vqgan.safetensors"
            ;;
        sample) do="sample $area/model -n 1 --seed 1 -o $area/out/o.png" results="out/o.png" ;;
        convert) do="sample $area/model --convert $area/out" results="out/vqgan.safetensors out/scale1.safetensors out/scale2.safetensors out/scale3.safetensors" ;;
        inpaint) do="inpaint $area/model $area/picture.png --half upper --seed 1 -o $area/out/o.png" results="out/o.png" ;;
    esac
}
steps_of() { cut -f 1-7,9- "$area/run/log.tsv"; } # without how fast they were
same() {
    for f in $results; do cmp "$area/$f" "$dir/$program-whole/$f" || return 1; done
    [ ! -d "$area/run" ] || steps_of | cmp - "$dir/$program-whole/steps"
}
tidy() { ! find "$area" -name '*.tmp*' -o -name '*.part' -o -name '*-new*' -o -name '*damaged*' -o -name lock | grep .; }
keep() { # the undisturbed run
    rm -rf "$dir/$program-whole" && cp -r "$area" "$dir/$program-whole"
    [ ! -d "$area/run" ] || steps_of >"$dir/$program-whole/steps"
}

wrong() {
    failed=$((failed + 1))
    echo "FAIL $program, $fault: $1"
    tail -n 3 "$dir/said"
}
goes_on() { # faults that no program may end by: interrupted and partial calls; a full disk while ./train writes
    case $fault in
        EINTR*write* | EINTR*fsync* | EINTR*flock* | EINTR*close* | SHORT*) return 0 ;;
        ENOSPC*write* | EDQUOT*write*) [ "${do%% *}" = train ] ;;
        *) return 1 ;;
    esac
}
# After a program that had a fault and ended with $status: is that right, and is it when it is started again?
judge() {
    what=
    if [ $status -eq 0 ]; then
        same >"$dir/out" 2>&1 || what="ends well, with other bytes: $(cat "$dir/out")"
        tidy >"$dir/out" 2>&1 || what="ends well, and leaves $(cat "$dir/out")"
    elif goes_on; then
        what="exit status $status, though that can be tried again"
    elif [ $status -eq 1 ]; then
        tail -n 1 "$dir/said" | grep -q '^\(train\|sample\|inpaint\): .' || what="says nothing"
    elif [ $status -ne 137 ] || [ "$fault" = "${fault#*KILL}" ]; then
        what="exit status $status"
    fi
    if [ -z "$what" ] && [ $status -ne 0 ]; then
        cp "$dir/said" "$dir/said.first"
        # shellcheck disable=SC2086
        "$build/"$do $again >/dev/null 2>"$dir/said" || what="exit status $? when it is started again, after: $(tail -n 1 "$dir/said.first")"
        [ -n "$what" ] || same >"$dir/out" 2>&1 || what="other bytes when it was started again: $(cat "$dir/out")"
        [ -n "$what" ] || tidy >"$dir/out" 2>&1 || what="leaves $(cat "$dir/out")"
    fi
    if [ -n "$what" ]; then wrong "$what"; else passed=$((passed + 1)); fi
}

inject() { # inject CALL N FAULT
    fault="$3 at $1 $2"
    prepare
    # shellcheck disable=SC2086
    timeout -s KILL 60 "$dir/inject" "$area" "$1" "$2" "$3" "$build/"$do >/dev/null 2>"$dir/said"
    status=$?
    judge
}
some() { # some CALL COUNT FAULT...: at COUNT of these calls, or at all of them, each with the next of the faults
    call=$1 count=$2 n=$(if [ "$1" = change ]; then grep -vc '^[0-9]* \(read\|mmap\|readdir\|stat\|close\) ' "$dir/calls"; else grep -c "^[0-9]* $1 " "$dir/calls"; fi)
    shift 2
    [ "$n" -gt 0 ] || return
    if [ -n "$all" ]; then
        for one in "$@"; do for at in $(seq 1 $((n / 400 + 1)) "$n"); do inject "$call" "$at" "$one"; done; done
        return
    fi
    [ "$count" -le "$n" ] || count=$n
    for i in $(seq 1 "$count"); do
        inject "$call" $(((i * n - n / 2) / count)) "$1"
        set -- "$@" "$1" && shift
    done
}
at() { # at FILE CALL FAULT...: at the first such call for that file, each of the faults
    file=$1 call=$2
    n=$(awk -v file="$area/$file" -v call="$call" '$2 == call { n++ } $2 == call && $3 == file { print n; exit }' "$dir/calls")
    [ -n "$n" ] || { fault="$call $file" && wrong "there is no such call" && return; }
    shift 2
    for one in "$@"; do inject "$call" "$n" "$one"; done
}
list() { # list PROGRAM: chooses it, runs it undisturbed, lists its calls
    choose "$1"
    prepare
    # shellcheck disable=SC2086
    "$dir/inject" "$area" list "$dir/calls" "$build/"$do >/dev/null 2>"$dir/said" || { cat "$dir/said" && exit 1; }
    keep
    fault=nothing status=0
    judge
}

no_memory() { # no_memory COUNT: at COUNT allocations, or at all of them, once and from there on in turn
    prepare
    # shellcheck disable=SC2086
    OOM_COUNT=$dir/number LD_PRELOAD=$dir/oom.so "$build/"$do >/dev/null 2>&1
    n=$(cat "$dir/number") count=${all:+$n}
    for i in $(seq 1 "${count:-$1}"); do
        at=$(((i * n - n / 2) / ${count:-$1}))
        fault="no memory at allocation $at"
        prepare
        unset OOM_ON
        [ $((i % 3)) -ne 0 ] || { export OOM_ON=1 && fault="$fault and later"; }
        # shellcheck disable=SC2086
        timeout -s KILL 60 env OOM_AT="$at" LD_PRELOAD="$dir/oom.so" "$build/"$do >/dev/null 2>"$dir/said"
        status=$?
        unset OOM_ON
        judge
    done
}

list scale
cp -r "$dir/scale-whole/run" "$dir/half"
some change 10 KILL
some write 10 EIO ENOSPC KILL SHORT EINTR EDQUOT
some fsync 4 EIO KILL EINTR
some rename 30 KILL
some rename 5 EIO ENOSPC EACCES
some open 8 EMFILE EIO ENOMEM ESTALE KILL
some read 5 EIO SHORT EINTR ESTALE
some readdir 3 EIO ESTALE
some stat 5 EIO ESTALE
some mmap 2 ENOMEM
some mkdir 2 ENOSPC EIO
some ftruncate 2 EIO KILL
some link 2 EPERM KILL
some unlink 3 EIO KILL
some flock 3 ENOLCK EINTR
some close 2 EIO EINTR
no_memory 12

# Of a run that has two more steps to go; the newest state must not be taken for damaged.
train --config "$here/tiny.txt" --data "$dir/scale-whole/data" --run "$dir/half" --scale 1 --resume --steps 6 --save-every 2
list resume
at run/scale1.state.safetensors open EMFILE EIO ENOMEM EACCES ESTALE
at run/scale1.state.safetensors stat EIO ESTALE
at run/scale1.state.safetensors mmap ENOMEM
some open 3 EMFILE EIO EACCES
some rename 4 KILL EIO
some write 3 KILL ENOSPC
no_memory 6

list vqgan
some change 4 KILL
some rename 4 KILL EIO
some read 3 EIO
no_memory 8

list sample
some change 3 KILL
for call in open read mmap write fsync rename stat; do some $call 1 EIO EINTR; done
no_memory 8
list convert
some change 3 KILL
for call in open mmap write fsync rename; do some $call 2 EIO ENOSPC; done
no_memory 5
list inpaint
some change 1 KILL
some write 1 ENOSPC
no_memory 6

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
