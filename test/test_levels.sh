#!/bin/sh
# test_levels.sh ANY BUILD: the programs in ANY, which hold a copy of themselves for each level of x86-64 (start.c):
# every level that this machine has draws the same tokens, in the library too, and trains to the same loss, in fewer bits near
# it. BUILD holds test programs and programs for this processor only.
any=$1 build=$2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 best=

ok() { # ok WHAT COMMAND...: must exit 0
    what=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $what: $*"
        tail -n 3 "$dir/err"
    fi
}

refused() { # refused WORD COMMAND...: exit status 2 and one line that holds WORD
    word=$1
    shift
    "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    ok "refused" test "$got $(wc -l <"$dir/err") $(grep -c -- "$word" "$dir/err")" = "2 1 1"
}

# Greedy, so that a picture shows which tokens were likeliest at every step; rounding may shift a colour by one.
draw() { "$any/sample" models/emoji -v -n 4 --top-k 1 --seed "$2" -o "$dir/$1.png"; }
draw_in() { "$any/sample" models/emoji -v -n 1 --top-k 1 --seed 3 --weights "$1" -o "$dir/$2.png"; }
train() { "$any/train" --config test/tiny.txt --data "$dir/data" --run "$dir/$1" --scale 1 --steps "$2" --precision "$3"; }
loss() { awk -v step="$2" '$1 == "scale1" && $2 == step { print $3 }' "$dir/$1/log.tsv"; }
within() { awk "BEGIN { a = $2 + 0; b = $3 + 0; d = a - b; exit !(a > 0 && d * d < $1 * $1 * a * a) }"; }

library() { IMAGEBART_DEVICE=cpu IMAGEBART_LIBRARY="$any/libimagebart.so" $python -B dev/imagebart.py emoji "$1" seed=3; }
python=$(command -v python3) || echo "SKIP the library at every level: there is no python3"

# the level is set when the library is there already, and its number of the API is asked for
late_level() {
    IMAGEBART_LIBRARY="$any/libimagebart.so" $python -B -c 'import os, sys
sys.path.append("dev")
import imagebart
imagebart.lib.imagebart_api()
os.environ["IMAGEBART_LEVEL"] = "x86-64-v9"
try: imagebart.Model()
except RuntimeError as e: sys.exit("no such level" not in str(e))
sys.exit(1)'
}

"$build/pictures" make "$dir/data" 40 20 || exit 1
ok "a first stage" "$any/train" --config test/tiny.txt --data "$dir/data" --run "$dir/first" --vqgan --steps 5

while read -r level vectors; do
    export IMAGEBART_LEVEL="$level"
    if ! "$any/sample" --list >/dev/null 2>"$dir/err"; then
        if grep -qE 'lacks it|not compiled' "$dir/err" && [ "$level" != x86-64 ]; then
            echo "SKIP $(head -n 1 "$dir/err")"
            continue
        fi
    fi
    ok "$level draws" draw "$level" 3
    cp "$dir/err" "$dir/said"
    ok "$level is what computes" grep -q "^processor: $vectors, " "$dir/said"
    ok "$level: the same picture as x86-64" "$build/pictures" near "$dir/$level.png" "$dir/x86-64.png" 2
    if [ -n "$python" ]; then
        ok "$level: one picture" "$any/sample" emoji -q -n 1 --seed 3 -o "$dir/one.png"
        ok "$level: the library" library "$dir/library.png"
        ok "$level: the library's picture is the program's" "$build/pictures" same "$dir/library.png" "$dir/one.png" 0 0 64 64
    fi
    mkdir "$dir/$level" "$dir/bf16-$level" && cp "$dir/first/vqgan.safetensors" "$dir/$level"
    cp "$dir/first/vqgan.safetensors" "$dir/bf16-$level"
    ok "$level trains" train "$level" 5 f32
    ok "$level: the same loss as x86-64" within 1e-3 "$(loss "$level" 5)" "$(loss x86-64 5)"

    # Products in fewer bits: bf16x3 draws what f32 does; what bf16 rounds may choose other tokens.
    ok "$level: one picture in f32" draw_in f32 f32
    for weights in bf16x3 bf16 int8; do
        ok "$level draws in $weights" draw_in $weights $weights
        cp "$dir/err" "$dir/said"
        ok "$level says so" grep -q "^processor: .*; weights in $weights, " "$dir/said"
        ok "$level: a picture in $weights" "$build/pictures" near "$dir/$weights.png" "$dir/$weights.png" 0
    done
    ok "$level: in bf16x3 the same as in f32" "$build/pictures" near "$dir/bf16x3.png" "$dir/f32.png" 2
    ok "$level trains in bf16" train "bf16-$level" 2 bf16
    ok "$level: at first as in f32" within 0.05 "$(loss "$level" 2)" "$(loss "bf16-$level" 2)"
    best=$level
done <<LEVELS
x86-64 SSE2
x86-64-v3 AVX2
x86-64-v4 AVX-512
x86-64-v4-bf16 AVX-512 with bf16
x86-64-v4-amx AVX-512 with bf16, AMX
LEVELS

if [ "$best" != x86-64 ]; then
    export IMAGEBART_LEVEL="$best"
    ok "a run goes on" "$any/train" --config test/tiny.txt --data "$dir/data" --run "$dir/$best" --scale 1 --resume --steps 6
    cp "$dir/err" "$dir/said"
    ok "without a word" sh -c "! grep -q 'bits will differ' '$dir/said'"
    export IMAGEBART_LEVEL=x86-64
    ok "and at another level" "$any/train" --config test/tiny.txt --data "$dir/data" --run "$dir/$best" --scale 1 --resume --steps 7
    cp "$dir/err" "$dir/said"
    ok "with one" grep -q '^scale1: trained with .* so far, from here on with SSE2: bits will differ' "$dir/said"
fi
unset IMAGEBART_LEVEL
ok "without being told" draw chosen 3
ok "the best level is taken" cmp "$dir/chosen.png" "$dir/$best.png"
ok "another seed" draw other 4
ok "draws other pictures" sh -c "! '$build/pictures' near '$dir/other.png' '$dir/$best.png' 2" # the check can fail
export IMAGEBART_LEVEL=x86-64-v9
refused "no such level; expected one of: x86-64" "$any/sample" --list
if [ -n "$python" ]; then
    library "$dir/never.png" >"$dir/refused" 2>&1
    ok "the library refuses it, too" grep -q "^RuntimeError: .*no such level; expected one of: x86-64" "$dir/refused"
    ok "and draws nothing" test ! -e "$dir/never.png"
    export IMAGEBART_LEVEL=x86-64
    ok "a level is taken by the first call, not when the library is loaded" late_level
fi
export IMAGEBART_LEVEL=x86-64
refused "one kind of processor" "$build/sample" --list # never silently another than the one asked for
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
