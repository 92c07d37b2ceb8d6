#!/bin/sh
# planted.sh --check: does every fault of test/planted.txt still have its place in the code? Its last line is "N passed, N
# failed"; part of make test, for code moves.
#
# planted.sh BUILD [FAULT...]: plants one fault after the other in a copy of the CUDA code, all of them or those named,
# compiles the test that concerns it and demands that it goes red where the table says so: a check fails, the program
# crashes or hangs, or the interpreter finds something. Before that the same tests must be green without a fault. make planted
# PTXSIM=DIR runs it and says by what to compile and with what to link: EMULATION and, where there is nvcc and an interpreter,
# PTX and PTX_LIBRARIES; OBJECTS, LIBRARIES. Two at a time (JOBS). Without PTX only the emulation is tried, and faults that it
# does not see are skipped, which is said.
#
# planted.sh --unknown FAULT...: those that test/planted.txt does not have
#
# planted.sh --one BUILD FAULT: one of them, or without,TEST,SECTION...; its sums go to BUILD/planted/FAULT.sums
TABLE=test/planted.txt
export IMAGEBART_DEVICE=cpu

faults() { sed -n 's/^fault: *//p' $TABLE; }

field() { # field FAULT KEY: one line of its entry
    awk -v fault="$1" -v key="$2:" '$1 == "fault:" { on = $2 == fault } on && $1 == key { sub(/^[a-z]+: */, ""); print; exit }' $TABLE
}

# plant FAULT FILE: FILE, which the entry is about, with the fault in it; or exit status 1 and why that cannot be
plant() {
    awk -v fault="$1" '
        function lost(what) { print "FAIL " fault ": " file " has no line with: " what >"/dev/stderr"; bad = 1; exit 1 }
        FNR == NR {
            key = $1
            text = $0
            sub(/^[a-z]+: */, "", text)
            if (key == "fault:") on = text == fault
            if (!on) next
            if (key == "after:") after[++marks] = text
            if (key == "old:") old[++pieces] = text
            if (key == "new:") new[pieces] = text
            next
        }
        { line[++n] = $0; file = FILENAME }
        END {
            if (bad) exit 1
            if (!pieces) lost("an entry of " fault)
            for (m = 1; m <= marks; m++) {
                for (at++; at <= n && !index(line[at], after[m]); at++);
                if (at > n) lost(after[m])
            }
            for (end = at + 1; end < n && line[end] !~ /^}/; end++);
            for (p = 1; p <= pieces; p++) {
                for (i = at; i <= end && !index(line[i], old[p]); i++);
                if (i > end) lost(old[p])
                k = index(line[i], old[p])
                line[i] = substr(line[i], 1, k - 1) new[p] substr(line[i], k + length(old[p]))
            }
            for (i = 1; i <= n; i++) print line[i]
        }' $TABLE "$2"
}

unknown() { # unknown FAULT...
    for fault in "$@"; do
        [ -n "$(field "$fault" in)" ] || echo "$fault"
    done
}

if [ "$1" = --unknown ]; then
    shift
    unknown "$@"
    exit
fi

if [ "$1" = --check ]; then
    passed=0 failed=0
    for fault in $(faults); do
        file=$(field "$fault" in)
        case "$(field "$fault" emulation) $(field "$fault" ptx)" in
        'red red' | 'red green' | 'green red') ;;
        *) failed=$((failed + 1)) && echo "FAIL $fault: neither emulation is said to go red" ;;
        esac
        if plant "$fault" "$file" | cmp -s - "$file"; then
            failed=$((failed + 1)) && echo "FAIL $fault: nothing changed in $file"
        elif plant "$fault" "$file" >/dev/null; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
        fi
    done
    [ "$passed" -ge 20 ] || { failed=$((failed + 1)) && echo "FAIL $passed faults, expected 20 or more"; }
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
fi

# try WHERE COMPILER LIBRARIES: prints red and why, or green, or that it does not compile
try() {
    program=$tree/$1
    # shellcheck disable=SC2086
    if ! { (cd "$tree" && $2 $floatX -c -o "$1.o" "test/test_${test%_*}.cu") && g++ -o "$program" "$program.o" $OBJECTS $3; } >"$program.log" 2>&1; then
        echo "not compiled: $(grep -m 1 'error\|undefined' "$program.log")"
        return
    fi
    # The first that it says of a fault is enough: the rest would take hours.
    rm -f "$program.said" && mkfifo "$program.said"
    # shellcheck disable=SC2086
    PTXSIM="plain sms=16" timeout "${LIMIT:-900}" stdbuf -oL "$program" $sections >"$program.said" 2>&1 &
    said=$(grep -m 1 -E '^FAIL|^PTXSIM [^:]*:|^PTXSIM: [^0]|block \(' "$program.said")
    [ -z "$said" ] || kill $! 2>/dev/null
    wait $! 2>/dev/null
    status=$?
    if [ -n "$said" ]; then
        echo "red: $(echo "$said" | cut -c 1-200)"
    elif [ $status -ne 0 ]; then
        echo "red: exit status $status"
    else
        echo green
    fi
}

if [ "$1" = --one ]; then
    build=$2 fault=$3 passed=0 failed=0 tree=$2/planted/$3
    rm -rf "$tree" && mkdir -p "$tree"
    cp -r transformer.cu imagebart.h kernels base files sampling training test "$tree"
    case $fault in
    without,*) tests=$(echo "${fault#without,}" | tr , ' ') ;;
    *)
        tests=$(field "$fault" test)
        plant "$fault" "$(field "$fault" in)" >"$tree/$(field "$fault" in)" || exit 1
        ;;
    esac
    test=${tests%% *} sections=${tests#"$test"}
    case $test in *bf16) floatX=-DFLOATX_BF16 ;; *) floatX='' ;; esac
    for where in emulation ${PTX:+ptx}; do
        case $where in
        emulation) got=$(try "$where" "$EMULATION" "$LIBRARIES") ;;
        ptx) got=$(try "$where" "$PTX" "$LIBRARIES $PTX_LIBRARIES") ;;
        esac
        case $fault in without,*) want=green ;; *) want=$(field "$fault" "$where") ;; esac
        if [ "${got%%:*}" = "$want" ]; then
            passed=$((passed + 1)) && echo "$fault, $where: $got"
        else
            failed=$((failed + 1)) && echo "FAIL $fault, $where: $got; expected $want"
        fi
    done
    echo "$passed $failed" >"$build/planted/$fault.sums"
    rm -rf "$tree"
    exit 0
fi

build=$1 passed=0 failed=0
shift
# shellcheck disable=SC2046
[ $# -gt 0 ] || set -- $(faults)
for fault in $(unknown "$@"); do echo "no such fault: $fault; $TABLE lists them" >&2 && exit 1; done
if [ -z "$PTX" ]; then
    only=''
    for fault in "$@"; do
        shift
        if [ "$(field "$fault" emulation)" = green ]; then only="$only $fault"; else set -- "$@" "$fault"; fi
    done
    echo "nvcc's PTX is not tried, only the emulation (PTXSIM=DIR names an interpreter, NVCC=... nvcc)"
    [ -z "$only" ] || echo "skipped: $(echo "$only" | wc -w) that only the PTX shows:$only"
    [ $# -gt 0 ] || { echo "nothing is left to try" >&2 && exit 1; }
fi
# shellcheck disable=SC2046
set -- $(for fault in "$@"; do field "$fault" test; done | sort -u | tr ' ' , | sed 's/^/without,/') "$@"
for fault in "$@"; do rm -f "$build/planted/$fault.sums"; done
printf '%s\n' "$@" | xargs -P "${JOBS:-2}" -I FAULT test/planted.sh --one "$build" FAULT
for fault in "$@"; do
    read -r p f 2>/dev/null <"$build/planted/$fault.sums" || { p=0 f=1 && echo "FAIL $fault: it left no sums"; }
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
