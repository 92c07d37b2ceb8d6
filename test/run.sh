#!/bin/sh
# run.sh BUILD ANY TEST...: runs every test program, the golden cases, the checks of the three programs, and adds up
# what they report; ANY holds the programs for any x86-64, "" where there are none; what cannot be run here is named.
# The last line is "N passed, N failed"; exit status 1 if anything failed, crashed or reported nothing. PYTHON names a
# python that has torch.
#
# run.sh --plain BUILD TEST...: of programs without kernels/ (make PLAIN=1): what does not need them.
#
# run.sh --units BUILD TEST..., --threads BUILD TEST...: these programs, and with --units the golden cases.
#
# run.sh --cuda BUILD PROGRAMS TEST...: only what concerns CUDA, with the programs of that folder (built by nvcc, or the
# emulated ones).
cuda='' plain='' units='' any=''
case $1 in
--cuda) build=$2 cuda=$3 && shift 3 ;;
--plain) build=$2 plain=yes && shift 2 ;;
--units | --threads) units=$1 build=$2 && shift 2 ;;
*) build=$1 any=$2 && shift 2 ;;
esac
passed=0 failed=0
HOUSE=check # the house is in order
export IMAGEBART_DEVICE=cpu # where nothing else is said, also on a machine with a GPU and in programs that pretend to have one
export ASAN_OPTIONS=allocator_may_return_null=1 # the tests ask for more memory than there is

tally() { # tally NAME LOGFILE EXIT_STATUS
    grep -E '^(SKIP|skipped:)' "$2" | sed "s/^/$1: /"
    line=$(tail -n 1 "$2")
    case $line in skipped:*) return ;; esac
    p=$(expr "$line" : '\([0-9][0-9]*\) passed, [0-9][0-9]* failed$')
    f=$(expr "$line" : '[0-9][0-9]* passed, \([0-9][0-9]*\) failed$')
    if [ -z "$p" ] || [ -z "$f" ] || { [ "$3" -ne 0 ] && [ "$f" -eq 0 ]; } || [ "$p" -eq 0 ]; then
        p=${p:-0} f=$((${f:-0} + 1))
        echo "FAIL $1: exit status $3, last line: $line"
    fi
    [ "$f" -eq 0 ] || grep -E 'FAIL|^ERROR|runtime error|ERROR:|error text|^     ' "$2" | head -40
    printf '%-40s %6s passed, %s failed, %s s\n' "$1" "$p" "$f" "$(($(date +%s) - started))"
    passed=$((passed + p)) failed=$((failed + f))
}

check() { # check NAME COMMAND...
    name=$1
    shift
    started=$(date +%s)
    "$@" >"$build/$name.log" 2>&1
    tally "$name" "$build/$name.log" $?
}

uncounted() { # uncounted NAME COMMAND...: runs and is shown, but does not count yet
    before_passed=$passed before_failed=$failed
    check "$@"
    passed=$before_passed failed=$before_failed
    echo "$1: not counted"
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

for t in "$@"; do
    check "$(basename "$t")" "$t"
done
if [ -n "$units" ]; then
    [ "$units" = --threads ] || check golden "$build/golden" test/golden-cases
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
fi
if [ -n "$plain" ]; then
    check golden "$build/golden" test/golden-cases
    check golden-selftest "$build/golden" --selftest test/golden-cases
    check plain-programs test/test_plain.sh "$build"
    echo "skipped: what needs kernels/: products and convolutions made fast, weights in bf16 and int8, CUDA and its emulation"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
fi
if [ -n "$cuda" ]; then
    check golden-cuda "$cuda/golden" --device cuda test/golden-cases
    check cuda-programs test/test_cuda_programs.sh "$build" "$cuda"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
fi
check house-selftest test/house.sh --selftest
$HOUSE house test/house.sh "$build"
check golden-cuda "$build/emulated/golden" --device cuda test/golden-cases
check cuda-programs test/test_cuda_programs.sh "$build" "$build/emulated"
check golden "$build/golden" test/golden-cases
check golden-selftest "$build/golden" --selftest test/golden-cases
check programs test/test_programs.sh "$build"
check survive test/test_survive.sh "$build"
check guidance test/test_guidance.sh "$build"
check draw test/test_draw.sh "$build"
check serve test/test_serve.sh "$build"
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
check left-out test/test_left_out.sh
check docs test/test_docs.sh "$build"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
