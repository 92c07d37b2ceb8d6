#!/bin/sh
# run.sh BUILD ANY TEST...: runs every test program, the golden cases, the checks of the three programs, as many at a time
# as there are processors, at most 4 (JOBS), and adds up what they report; ANY holds the programs for any x86-64, "" where there are
# none; what cannot be run here is named. The last line is "N passed, N failed"; exit status 1 if anything failed, crashed
# or reported nothing. PYTHON names a python that has torch.
#
# run.sh --plain BUILD TEST...: of programs without kernels/ (make PLAIN=1): what does not need them.
#
# run.sh --units BUILD TEST..., --threads BUILD TEST...: these programs, and with --units the golden cases.
#
# run.sh --cuda BUILD PROGRAMS TEST...: only what concerns CUDA, with the programs of that folder (built by nvcc, or the
# emulated ones).
#
# run.sh --one BUILD NAME COMMAND...: one check, whose sums go to BUILD/NAME.sums
export IMAGEBART_DEVICE=cpu # where nothing else is said, also on a machine with a GPU and in programs that pretend to have one
export ASAN_OPTIONS=allocator_may_return_null=1 # the tests ask for more memory than there is

tally() { # tally NAME LOGFILE EXIT_STATUS SECONDS SUMS
    grep -E '^(SKIP|skipped:)' "$2" | sed "s/^/$1: /"
    line=$(tail -n 1 "$2")
    case $line in skipped:*) echo 0 0 >"$5" && return ;; esac
    p=$(expr "$line" : '\([0-9][0-9]*\) passed, [0-9][0-9]* failed$')
    f=$(expr "$line" : '[0-9][0-9]* passed, \([0-9][0-9]*\) failed$')
    if [ -z "$p" ] || [ -z "$f" ] || { [ "$3" -ne 0 ] && [ "$f" -eq 0 ]; } || [ "$p" -eq 0 ]; then
        p=${p:-0} f=$((${f:-0} + 1))
        echo "FAIL $1: exit status $3, last line: $line"
    fi
    [ "$f" -eq 0 ] || grep -E 'FAIL|^ERROR|runtime error|ERROR:|error text|^     ' "$2" | head -40
    printf '%-40s %6s passed, %s failed, %s s\n' "$1" "$p" "$f" "$4"
    echo "$p $f" >"$5"
}

if [ "$1" = --one ]; then
    log=$2/$3.log said=$2/$3.said sums=$2/$3.sums name=$3
    shift 3
    started=$(date +%s)
    "$@" >"$log" 2>&1
    tally "$name" "$log" $? $(($(date +%s) - started)) "$sums" >"$said"
    cat "$said" # at once, so that lines of two checks do not mix
    exit 0
fi

cuda='' plain='' units='' any='' later=''
case $1 in
--cuda) build=$2 cuda=$3 && shift 3 ;;
--plain) build=$2 plain=yes && shift 2 ;;
--units | --threads) units=$1 build=$2 && shift 2 ;;
*) build=$1 any=$2 && shift 2 ;;
esac
queue=$build/checks
: >"$queue"

check() { # check NAME COMMAND...: to be run; no word holds a blank or a quote
    echo "$@" >>"$queue"
}

python_check() { # python_check NAME MODULES SCRIPT: with the python that has these modules, or if none has, any
    python=${PYTHON:-python3}
    for p in "$python" python3 /usr/bin/python3; do
        if "$p" -c "import $2" 2>/dev/null; then
            python=$p
            break
        fi
    done
    if command -v "$python" >/dev/null; then
        check "$1" "$python" "$3" "$build"
    else
        echo "$1: skipped: no python3"
    fi
}

run_all() { # the queue; the sums of checks that left none count as failed
    names=$(cut -d ' ' -f 1 "$queue") passed=0 failed=0
    for name in $names; do rm -f "$build/$name.sums"; done
    jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    xargs -P "${JOBS:-$((jobs < 4 ? jobs : 4))}" -L 1 test/run.sh --one "$build" <"$queue"
    for name in $names; do
        if read -r p f <"$build/$name.sums"; then
            passed=$((passed + p)) failed=$((failed + f))
        else
            echo "FAIL $name: it left no sums"
            failed=$((failed + 1))
        fi
    done 2>/dev/null
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}

# What takes longest comes first: the checks of the programs, gradients in double, all other test programs.
if [ -z "$units$plain$cuda" ]; then
    check programs test/test_programs.sh "$build"
    check survive test/test_survive.sh "$build"
    check cuda-programs test/test_cuda_programs.sh "$build" "$build/emulated"
    check left-out test/test_left_out.sh
fi
for t in "$@"; do
    case $t in
    *_double) check "$(basename "$t")" "$t" ;;
    *) later="$later $t" ;;
    esac
done
for t in $later; do
    case $t in
    */emulated/*) check "emulated-$(basename "$t")" "$t" ;;
    *) check "$(basename "$t")" "$t" ;;
    esac
done
if [ "$units" != --threads ] && [ -z "$cuda" ]; then
    check golden "$build/golden" test/golden-cases
    check golden-bf16x3 "$build/golden" --precision bf16x3 test/golden-cases
    check golden-bf16 "$build/golden" --precision bf16 test/golden-cases
fi
[ -z "$units" ] || run_all
if [ -n "$cuda" ]; then
    check golden-cuda "$cuda/golden" --device cuda test/golden-cases
    check cuda-programs test/test_cuda_programs.sh "$build" "$cuda"
    run_all
fi
check golden-selftest "$build/golden" --selftest test/golden-cases
check golden-bf16-selftest "$build/golden" --precision bf16 --selftest test/golden-cases
if [ -n "$plain" ]; then
    check plain-programs test/test_plain.sh "$build"
    echo "skipped: what needs kernels/: products and convolutions made fast, weights in bf16 and int8, CUDA and its emulation"
    run_all
fi
check house-selftest test/house.sh --selftest
check house test/house.sh "$build"
check planted test/planted.sh --check
check refused test/test_refused.sh "$build"
check golden-cuda "$build/emulated/golden" --device cuda test/golden-cases
check faults test/test_faults.sh "$build"
check precision test/test_precision.sh "$build"
check guidance test/test_guidance.sh "$build"
check draw test/test_draw.sh "$build"
check recipes test/test_recipes.sh "$build"
check install test/test_install.sh "$build"
check docker test/test_docker.sh "$build"
if [ -f "$build/libimagebart.so" ]; then
    python_check library numpy test/test_library.py
else
    echo "library: skipped: make lib has not made it"
fi
check serve test/test_serve.sh "$build"
if [ -x "$build/serve" ]; then
    check load "$build/load" "$build/serve" 4
else
    echo "load: skipped: ./serve, which needs libmicrohttpd and libcjson"
fi
check page test/test_page.sh "$build"
python_check events tensorboard test/test_events.py
if [ -n "$any" ]; then
    check levels test/test_levels.sh "$any" "$build"
else
    echo "levels: skipped: these programs are for one kind of processor"
fi
check mpi test/test_mpi.sh "$build"
check fetch test/test_fetch.sh
python_check torch torch test/test_torch.py
python_check validation torch test/test_validation.py
python_check lpips torch test/test_lpips.py
python_check lsun "lmdb, PIL" test/test_lsun.py
check docs test/test_docs.sh "$build"
run_all
