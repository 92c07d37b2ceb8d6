# lib.sh - what the tests of the programs share: a check is a command that must work, or one that must be refused.
# Sourced by scripts that have $dir, a folder of their own; what the last command said is in $dir/out and $dir/err.
passed=0 failed=0
unset IMAGEBART_MODELS # models/ is the one here

ok() { # ok WHAT COMMAND...: must exit 0; the command may look at what the one before said
    what=$1
    shift
    "$@" >"$dir/out" 2>"$dir/err.now"
    status=$?
    mv "$dir/err.now" "$dir/err"
    if [ $status -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $what: $*: exit status $status"
        head -5 "$dir/err"
    fi
}

refused_late() { # refused_late STATUS WORD COMMAND...: exit status, and a last line on stderr that holds WORD
    status=$1 word=$2
    shift 2
    "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    if [ $got -eq "$status" ] && tail -n 1 "$dir/err" | grep -q -- "$word"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $*: exit status $got, expected $status and a last line with \"$word\"; stderr ends:"
        tail -n 3 "$dir/err"
    fi
}

printed() { # printed FILE: is there nothing in it that a terminal obeys but ends of lines and tabs?
    ! LC_ALL=C tr -d '\n\t' <"$1" | LC_ALL=C grep -q '[[:cntrl:]]'
}

killed_at() { # killed_at FILE COMMAND...: in the background until FILE is there, then SIGKILL
    file=$1
    shift
    "$@" >/dev/null 2>&1 &
    pid=$! # the program itself, not a shell around it
    tries=0
    while [ ! -f "$file" ] && [ $tries -lt 1200 ] && kill -0 $pid 2>/dev/null; do
        sleep 0.05
        tries=$((tries + 1))
    done
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
}
