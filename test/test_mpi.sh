#!/bin/sh
# test_mpi.sh BUILD: ./train in two processes beside one with the same batches: the same losses, weights that differ by
# rounding only, the same bits from run to run; lost, interrupted and failing processes; what cannot work says why.
build=$(cd "$1" && pwd)
case $build in *-nompi*) echo "skipped: made without MPI" && exit ;; esac
command -v mpirun >/dev/null || { echo "skipped: no mpirun (Debian: openmpi-bin)" && exit; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export ASAN_OPTIONS=detect_leaks=0 # MPI keeps memory to the end

refused() { # refused WORD COMMAND...: exit status 1 to 123 (124: it hung), and a single line of ours, which holds WORD
    word=$1
    shift
    "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    ok "refused with status $got: $* ($(grep '^train' "$dir/err"))" test $got -gt 0 -a $got -lt 124 -a \
        "$(grep -c '^train[-a-z]*: ' "$dir/err") $(grep -c "^train[-a-z]*: .*$word" "$dir/err")" = "1 1"
}

options="--config test/tiny.txt --data $dir/data --save-every 5 --eval-every 10 --picture-every 20 --steps 20"
# shellcheck disable=SC2086
one() { run=$1 && shift && "$build/train" $options --run "$dir/$run" "$@"; }
# shellcheck disable=SC2086
mpi() { n=$1 run=$2 && shift 2 && timeout 60 mpirun -np "$n" --oversubscribe --bind-to none "$build/train" $options --run "$dir/$run" "$@"; }

near() { # near RUN STAGE COLUMN...: in 20 lines of the log these columns are within 1e-4 of those of the run `one`
    run=$1 stage=$2
    shift 2
    awk -v stage="$stage" -v columns="$*" 'BEGIN { m = split(columns, column, " ") }
        function off(a, b) { d = a - b; return d * d > 1e-8 * b * b }
        $1 != stage { next }
        NR == FNR { for (i = 1; i <= m; i++) want[$2, column[i]] = $column[i]; next }
        { n++
          for (i = 1; i <= m; i++) { k = column[i]
              if (off($k, want[$2, k]) || !($k == $k + 0 || $k == "")) { print "step " $2 ", column " k ": " $k ", expected " want[$2, k] >"/dev/stderr"; bad = 1 } } }
        END { exit bad || n != 20 }' FS='\t' "$dir/one/log.tsv" "$dir/$run/log.tsv"
}

"$build/pictures" make "$dir/data" 40 20 || exit 1
one one --vqgan --batch 6 >/dev/null 2>&1 || exit 1

# ---- the same training ----
ok "the VQGAN in two processes" mpi 2 two --vqgan --batch 3
ok "which say so" grep -q '^2 processes, each takes 3 of the 6 pictures of a micro batch, with [0-9]* threads' "$dir/err"
ok "vqgan: the same losses" near two vqgan 3 4 5 6 7
ok "vqgan: close weights" "$build/pictures" weights "$dir/one/vqgan.safetensors" "$dir/two/vqgan.safetensors" 1e-2
ok "a look at other weights" sh -c "! '$build/pictures' weights '$dir/one/vqgan.state.safetensors' '$dir/two/vqgan.safetensors' 1e-2"
cp "$dir/two/vqgan.safetensors" "$dir/vqgan.two"
cp "$dir/one/vqgan.safetensors" "$dir/two"
for stage in scale1 scale2 scale3 joint; do # scale2: examples balanced over classes; scale3: decoder only
    case $stage in scale*) arguments="--scale ${stage#scale}" ;; *) arguments=--joint ;; esac
    # shellcheck disable=SC2086
    one one $arguments --batch 4 >/dev/null 2>&1
    # shellcheck disable=SC2086
    ok "$stage in two processes" mpi 2 two $arguments --batch 2
    ok "$stage: the same losses" near two $stage 3 4 5 6 7 9 10 11 12
    ok "$stage: close weights" "$build/pictures" weights "$dir/one/$stage.safetensors" "$dir/two/$stage.safetensors" 1e-2
done
ok "every step once in the log" awk '$1 == "joint" { n[$2]++ } END { for (i = 1; i <= 20; i++) if (n[i] != 1) exit 1 }' "$dir/two/log.tsv"
mkdir "$dir/again" "$dir/single" && cp "$dir/one/vqgan.safetensors" "$dir/again" && cp "$dir/one/vqgan.safetensors" "$dir/single"
ok "two processes again" mpi 2 again --scale 1 --batch 2 --threads 1
ok "the same bits" cmp "$dir/two/scale1.state.safetensors" "$dir/again/scale1.state.safetensors"
ok "mpirun with one process" mpi 1 single --scale 1 --batch 4
ok "the same bits as without" cmp "$dir/one/scale1.state.safetensors" "$dir/single/scale1.state.safetensors"

# ---- processes that end early ----
begin() { # begin RUN COMMAND...: in the background, mpirun's process in $pid, its processes in RUN.pid0 and RUN.pid1
    run=$1
    shift
    rm -f "$dir/$run".pid?
    # shellcheck disable=SC2086,SC2016
    PIDS="$dir/$run.pid" timeout 60 mpirun -np 2 --oversubscribe --bind-to none \
        sh -c 'echo $$ >"$PIDS$OMPI_COMM_WORLD_RANK" && exec "$@"' sh "$build/train" $options --run "$dir/$run" "$@" \
        >"$dir/out" 2>"$dir/$run.err" &
    pid=$!
    stage=$(echo "$*" | sed -n 's/.*--scale \([0-9]\).*/scale\1/p')
    while [ ! -f "$dir/$run/${stage:-vqgan}.state.safetensors" ] && kill -0 $pid 2>/dev/null; do sleep 0.02; done
}
ends() { # ends WHAT: mpirun ends by itself, with failure if WHAT is `badly`
    wait $pid
    status=$?
    [ $status -ne 124 ] && { [ "$1" = badly ] && [ $status -ne 0 ] || [ "$1 $status" = "well 0" ]; }
}
for victim in 0 1; do
    rm -rf "$dir/lost" && mkdir "$dir/lost" && cp "$dir/one/vqgan.safetensors" "$dir/lost"
    begin lost --scale 1 --batch 2 --steps 100000
    kill -9 "$(cat "$dir/lost.pid$victim")"
    ok "process $victim killed: the job ends" ends badly
    ok "the other one says what it waits for" grep -q 'waiting for another process; .* --resume continues from it' "$dir/lost.err"
done
export OMPI_MCA_odls_base_sigkill_timeout=2 # seconds that mpirun grants after handing TERM on, and waits; the default is 1
for stop in TERM:1 USR1:mpirun TERM:mpirun; do
    rm -rf "$dir/told" && mkdir "$dir/told" && cp "$dir/one/vqgan.safetensors" "$dir/told"
    begin told --scale 1 --batch 2 --steps 100000
    case $stop in
        *:mpirun) kill "-${stop%:*}" "$(cat "/proc/$pid/task/$pid/children")" ;; # timeout's child
        *) kill "-${stop%:*}" "$(cat "$dir/told.pid${stop#*:}")" ;;
    esac
    ok "$stop: all stop" ends $([ $stop = TERM:mpirun ] && echo badly || echo well) # so mpirun calls it
    ok "and save" grep -q 'stopped after step [0-9]*, everything is saved; --resume continues' "$dir/told.err"
done
unset OMPI_MCA_odls_base_sigkill_timeout

# ---- a run that was killed again and again is the run that was not ----
rm -rf "$dir/killed"
for what in "--vqgan --batch 3" "--scale 1 --batch 2"; do
    # shellcheck disable=SC2086
    begin killed $what
    kill -9 "$(cat "$dir/killed.pid1")" 2>/dev/null
    ends badly
    # shellcheck disable=SC2086
    ok "$what killed and resumed" mpi 2 killed ${what% --batch *} --resume
    [ "$stage" = vqgan ] && ok "the same bits" cmp "$dir/vqgan.two" "$dir/killed/vqgan.safetensors"
    cp "$dir/one/vqgan.safetensors" "$dir/killed"
done
ok "the same bits" cmp "$dir/two/scale1.state.safetensors" "$dir/killed/scale1.state.safetensors"

loss=vqgan.model.params.lossconfig.params
{ cat test/tiny.txt && printf "$loss.%s\n" "disc_num_layers 2" "disc_ndf 8" "disc_start 8" && echo "vqgan.train.disc_warm_up 4"; } >"$dir/gan.txt"
ok "a discriminator in two processes" mpi 2 gan --vqgan --batch 3 --config "$dir/gan.txt"
ok "is said once" test "$(grep -c '^discriminator: ' "$dir/err")" = 1
begin gan2 --vqgan --batch 3 --config "$dir/gan.txt"
kill -9 "$(cat "$dir/gan2.pid1")" 2>/dev/null
ends badly
ok "killed and resumed" mpi 2 gan2 --vqgan --config "$dir/gan.txt" --resume
ok "the same bits" cmp "$dir/gan/vqgan.state.safetensors" "$dir/gan2/vqgan.state.safetensors"

cp -r "$dir/data" "$dir/worn"
for i in 001 003 005 007 009; do head -c 90 "$dir/data/bar/$i.png" >"$dir/worn/bar/$i.png"; done
ok "damaged pictures, one process" one worn --vqgan --batch 4 --data "$dir/worn"
ok "damaged pictures, two processes" mpi 2 worn2 --vqgan --batch 2 --data "$dir/worn"
ok "are counted" grep -q "^damaged pictures skipped: 5; " "$dir/err"
ok "and listed by both" cmp "$dir/worn/skipped.txt" "$dir/worn2/skipped.txt"

# ---- a run may go on in another number of processes ----
rm "$dir/single/scale1.state.safetensors"
begin single --scale 1 --batch 2
kill -9 "$(cat "$dir/single.pid0")" 2>/dev/null
ends badly
ok "begun by two processes, ended by one" one single --scale 1 --resume
ok "which takes as many pictures" sh -c "grep -q 'batch 4 x 2' '$dir/err' && ! grep 'from here on' '$dir/err'"
ok "to the same losses" near single scale1 3 4 5 6 7
ok "another batch" mpi 2 single --scale 1 --resume --steps 21 --batch 3
ok "is said" grep -q '^scale1: a step took 8 pictures, from here on it takes 12' "$dir/err"

# ---- a bad batch: all go back ----
for run in bad1 bad2; do mkdir "$dir/$run" && cp "$dir/one/vqgan.safetensors" "$dir/$run"; done
export IMAGEBART_TEST_NAN=scale1:15
ok "a bad batch, one process" one bad1 --scale 1 --batch 4
ok "a bad batch, two processes" mpi 2 bad2 --scale 1 --batch 2
unset IMAGEBART_TEST_NAN
ok "the same steps are left out" sh -c "cut -f 1-3 '$dir/bad1/skipped_batches.tsv' >'$dir/bad1/left' && cut -f 1-3 '$dir/bad2/skipped_batches.tsv' | cmp - '$dir/bad1/left'"
ok "close weights" "$build/pictures" weights "$dir/bad1/scale1.safetensors" "$dir/bad2/scale1.safetensors" 1e-2
ok "one process goes on" one bad2 --scale 1 --resume --steps 22
ok "with as many pictures a step" sh -c "grep -q 'batch 4 x 2' '$dir/err' && ! grep 'from here on' '$dir/err'"

ok "every stage in one command" mpi 2 all --all --steps 2 --batch 2
ok "and samples" test -s "$dir/all/samples.png"

# ---- what cannot work ----
export OMPI_MCA_odls_base_sigkill_timeout=0 # the first to exit may be the last that is heard of
# shellcheck disable=SC2086
unlike() { rm -rf "$dir/unlike"; timeout 60 mpirun --oversubscribe -np 1 "$build/train" $options --run "$dir/unlike" --vqgan $1 : -np 1 "$build/train" $options --run "$dir/unlike" --vqgan $2; }
mkdir -p "$dir/bad" "$dir/nolog/log.tsv"
for i in 1 2 3 4; do head -c 90 "$dir/data/bar/001.png" >"$dir/bad/$i.png"; done
refused "process 1 on .*none of the . pictures can be read" unlike "" "--data $dir/bad" # in the midst of a step
refused "log.tsv" mpi 2 nolog --vqgan # on the first only
refused "process 1 on .*nowhere" unlike "" "--data $dir/nowhere"
refused "different weights to start from" unlike "--seed 1" "--seed 2"
refused "different weights after a step" unlike "--lr 1e-3" "--lr 2e-3"
command -v nvidia-smi >/dev/null || refused "device cuda" mpi 2 gpu --vqgan --device cuda
refused "missing" mpi 2 missing --vqgan --data "$dir/missing"
refused "exists: --resume" mpi 2 two --scale 1
refused "cannot be shared evenly by 3 processes" mpi 3 two --scale 1 --resume --steps 30
alone() { "$build/train-alone" --config test/tiny.txt --data "$dir/data" --run "$dir/alone" --vqgan --steps 1 --batch 1; }
ok "made without MPI: one process" alone
export OMPI_COMM_WORLD_SIZE=2
refused "built without MPI.*libopenmpi-dev" alone
unset OMPI_COMM_WORLD_SIZE
export PMI_SIZE=2
refused "PMI_SIZE says 2 processes, MPI finds 1" "$build/train" --vqgan --data "$dir/data" --run "$dir/alone"
unset PMI_SIZE
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
