#!/bin/sh
# house.sh BUILD: is the house in order? The root holds what README.md lists, no arrow runs up and none in a circle, by
# #include and by the functions that a file defines and others use (the objects in BUILD tell), no root file is over its
# budget, no function over a screen. One check a rule; what is wrong is said with file and line.
#
# house.sh --selftest: a small house in order, then the same with one fault after the other, each of which its rule must
# report.
here=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
passed=0 failed=0

FOLDERS="base kernels files sampling serving training test dev models doc web"
# root files with the lines that they may have, of which 15% more are forgiven
BUDGET="imagebart.h 550 vqgan.c 900 transformer.cu 1250 diffusion.c 430 data.c 720 train.c 450 sample.c 250 inpaint.c 330 serve.c 400"
FUNCTION_LINES=60 README_LINES=200
SEAM="fast_layers cuda_f32 cuda_bf16" # tables that base/compute.c hands on without knowing what is in them

rule() { # rule WHAT WRONG: passes if WRONG, a list of what is wrong, is empty
    if [ -z "$2" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $1:"
        echo "$2" | sed 's/^/     /'
    fi
}

sources() { # of the product
    ls ./*.c ./*.cu ./*.h base/*.[ch] kernels/*.[ch] kernels/*.cu files/*.[ch] sampling/*.[ch] serving/*.[ch] training/*.[ch] training/*.cu dev/*.c \
        2>/dev/null | sed 's|^\./||'
}

strangers() {
    for f in *; do
        case " Makefile README.md SPEC.md LICENSE $FOLDERS $BUDGET " in *" $f "*) continue ;; esac
        git check-ignore -q "$f" 2>/dev/null || [ "$f" = build ] || echo "$f"
    done
}

# ---- Arrows: lines "FROM TO WHY" ----

includes() {
    sources | xargs awk '/^ *# *include "/ { split($0, q, "\""); sub(/^\.\//, "", FILENAME); print FILENAME, q[2], FILENAME ":" FNR }' |
        grep -v ' test/\(cuda_on_cpu\|matmul_on_cpu\)\.h kernels/device\.\| test/tiles_in_c\.h kernels/tiles\.h' # stand in for CUDA, AMX
}

# The objects of sources: "D FILE SYMBOL" defined there, "U FILE SYMBOL" used there. Weak uses bind nobody.
symbols() { # symbols BUILD
    for f in $(sources | grep '\.c$\|^transformer\.cu$'); do
        [ -f "$1/${f%.*}.o" ] && nm -g "$1/${f%.*}.o" | awk -v f="$f" '
            NF == 3 && $2 ~ /[TDBRVC]/ { print "D", f, $3 }
            NF == 2 && $1 == "U" { print "U", f, $2 }'
    done
    for o in "$1"/emulated/device_f32.o; do
        [ -f "$o" ] && nm -g "$o" | awk 'NF == 2 && $1 == "U" { print "U kernels/device.cu", $2 }'
    done
}
uses() { # uses BUILD
    symbols "$1" | awk -v seam="$SEAM" 'BEGIN { n = split(seam, s); for (i = 1; i <= n; i++) free[s[i]] = 1 }
        $1 == "D" { home[$3] = $2; next }
        { from[++m] = $2; what[m] = $3 }
        END { for (i = 1; i <= m; i++) if (what[i] in home && home[what[i]] != from[i] && !(what[i] in free))
            print from[i], home[what[i]], what[i] }'
}
# CUDA files are one program for the compiler: there the names of functions tell. A name is used where it is called,
# launched, or put into a table.
cuda_uses() {
    sources | grep '^kernels/.*\.cu$' | xargs -r awk '
        FNR == 1 { file = FILENAME }
        /^ \*|^ *\/\*/ { next }
        { line = $0; gsub(/"[^"]*"/, "", line); gsub(/(__launch_bounds__|alignas)\([^)]*\)+/, "", line) }
        line ~ /^[A-Za-z_].*\(/ && line !~ /;$/ && line !~ /^(#|LAYER|LAUNCH)/ {
            name = line; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name)
            if (name ~ /^[a-z_][a-z0-9_]*$/ && !(name in home)) home[name] = file
        }
        { text[++n] = line; where[n] = file }
        END {
            for (i = 1; i <= n; i++)
                for (rest = text[i]; match(rest, /[A-Za-z_][A-Za-z0-9_]*/); rest = substr(rest, RSTART + RLENGTH)) {
                    word = substr(rest, RSTART, RLENGTH)
                    before = substr(rest, 1, RSTART - 1); after = substr(rest, RSTART + RLENGTH, 1)
                    if ((word in home) && home[word] != where[i] && before !~ /(\.|->)$/ &&
                        (after == "(" || word ~ /_(kernel|cuda)$/ || before ~ /\.[a-z_]+ = &?$/)) print where[i], home[word], word
                }
        }' | sort -u
}

# height of a file; what is beside one another there
LEVELS='
function level(f) {
    if (f ~ /^base\//) return 0
    if (f ~ /^kernels\//) return 1
    if (f ~ /^files\//) return 2
    if (f ~ /^sampling\//) return 6
    if (f ~ /^training\//) return 7
    if (f == "imagebart.h") return 3
    if (f ~ /^(vqgan|transformer|data)\./) return 4
    if (f ~ /^diffusion\./) return 5
    if (f ~ /^serving\//) return 7
    if (f ~ /^(train|sample|inpaint|serve)\./ || f ~ /^dev\//) return 8
    return 9
}'
arrows_up() {
    awk "$LEVELS"'
        level($2) > level($1) || ($1 ~ /^kernels\// && $2 !~ /^(base|kernels)\//) || ($1 ~ /^training\// && $2 ~ /^s(ampling|erving)\//) ||
        ($1 ~ /^serving\// && $2 ~ /^training\//) ||
        (level($1) == 8 && level($2) == 8) { print $1 " knows " $2 " (" $3 ")" }' | sort -u
}
# Arrows between files each of which, from arrow to arrow, knows the other
circles() {
    awk '$1 != $2 && !(($1, $2) in why) { why[$1, $2] = $3; node[$1]; node[$2]; to[$1] = to[$1] " " $2 }
        function visit(file, from,   n, i, next_one) { # marks all that file knows
            n = split(to[file], next_one, " ")
            for (i = 1; i <= n; i++) if (!((from, next_one[i]) in reach)) { reach[from, next_one[i]]; visit(next_one[i], from) }
        }
        END {
            for (one in node) visit(one, one)
            for (pair in why) {
                split(pair, end, SUBSEP)
                if ((end[2], end[1]) in reach) print end[1] " -> " end[2] " (" why[pair] ")"
            }
        }' | sort
}

# ---- Sizes ----

over_budget() {
    echo "$BUDGET" | tr ' ' '\n' | paste - - | while read -r f most; do
        [ -f "$f" ] && n=$(wc -l <"$f") && [ "$n" -gt $((most * 115 / 100)) ] && echo "$f: $n lines, budget $most and 15%"
    done
}
long_functions() {
    { sources && ls test/*.c test/*.cu test/*.h; } 2>/dev/null | xargs awk -v most="$FUNCTION_LINES" '
        FNR == 1 { start = inside = 0 }
        inside { if (/^}/) { if (FNR - start >= most) print FILENAME ":" start ": " name "() has " FNR - start + 1 " lines"; inside = start = 0 }; next }
        !start && /^[A-Za-z_]/ { start = FNR; text = "" }
        start { text = text $0 }
        start && /\{$/ {
            if (text ~ /\(/ && text !~ /= *\{$/ && text !~ /^(extern|namespace|typedef|enum)/) {
                inside = 1
                name = text
                sub(/\(.*/, "", name)
                sub(/.*[ *]/, "", name)
            } else
                start = 0
        }
        start && !inside && /[;}:]$/ { start = 0 }'
}

in_c() {
    sources | grep '\.c$' | xargs grep -nE '__global__|__device__|<<<|cuda(Malloc|Memcpy|Stream)|__CUDACC__|DEVICE_CODE|CUDA_ON_CPU'
}

check_house() { # check_house BUILD
    by_include=$(includes)
    by_use=$(uses "$1")
    [ -n "$by_use" ] || rule "objects of the program in $1" "there are none"
    by_use=$(echo "$by_use" && cuda_uses)
    rule "the root holds what README.md lists, nothing else" "$(strangers)"
    rule "no #include of what lies above or beside" "$(echo "$by_include" | arrows_up)"
    rule "no use of a function that lies above or beside" "$(echo "$by_use" | arrows_up)"
    rule "no circle of #include" "$(echo "$by_include" | circles)"
    rule "no circle of files that use each other's functions" "$(echo "$by_use" | circles)"
    rule "root files are within their budget" "$(over_budget)"
    rule "a function fits on a screen: $FUNCTION_LINES lines" "$(long_functions)"
    rule "no CUDA in .c files" "$(in_c)"
    rule "transformer.cu has one #ifdef for its CUDA" \
        "$(awk '/^ *# *(if|elif).*(DEVICE_CODE|__CUDACC__|CUDA_ON_CPU)/ && n++ { print FILENAME ":" FNR ": " $0 }' transformer.cu)"
    rule "README.md is no longer than $README_LINES lines" \
        "$(awk -v most=$README_LINES 'END { if (NR > most) print FILENAME ": " NR " lines" }' README.md)"
}

# ---- The house of the self-test ----

compile() { # compile FILE...: objects of the small house
    for f in "$@"; do
        case $f in
        *.c | transformer.cu) mkdir -p "build/$(dirname "$f")" && ${CC:-cc} -x c -I. -c -o "build/${f%.*}.o" "$f" 2>/dev/null ;;
        esac
    done
}
fault() { # fault RULE FILE TEXT: the house with TEXT at the end of FILE breaks the rule
    rm -rf "$dir/bad" && cp -r "$dir/house" "$dir/bad" && cd "$dir/bad" || exit 1
    printf '%b\n' "$3" >>"$2"
    compile "$2"
    if ! sh "$here" build >"$dir/log" 2>&1 && grep -q "^FAIL $1" "$dir/log"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL a fault in $2 that should break \"$1\""
        cat "$dir/log"
    fi
}
lines() { # lines N TEXT
    awk -v n="$1" -v t="$2" 'BEGIN { for (i = 0; i < n; i++) printf "%s\\n", t }'
}
selftest() {
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    mkdir "$dir/house" && cd "$dir/house" && mkdir base kernels files sampling training test || exit 1
    echo 'int base(void);' | tee base/base.h >kernels/device.h
    echo 'int net(void);' >imagebart.h
    printf '#include "base/base.h"\nint base(void) {\n    return 1;\n}\n' >base/base.c
    printf '#include "base/base.h"\nint gemm(void) {\n    return base();\n}\n' >kernels/gemm.c
    printf '#include "kernels/device.h"\nstatic int row_kernel(int i) {\n    return i;\n}\n' >kernels/layers.cu
    printf '#include "kernels/layers.cu"\nint launch(void) {\n    return row_kernel(base());\n}\n' >kernels/device.cu
    printf 'int gemm(void);\nint put(void) {\n    return gemm();\n}\n' >files/atomic.c
    printf '#include "imagebart.h"\nint gemm(void);\nint net(void) {\n    return gemm();\n}\n' >vqgan.c
    printf 'int move(void) {\n    return 2;\n}\n#ifdef __CUDACC__\n#endif\n' >transformer.cu
    printf 'int put(void);\nint net(void);\nint batch(void) {\n    return put() + net();\n}\n' >data.c
    printf 'int move(void);\nint chain(void) {\n    return move();\n}\n' >diffusion.c
    printf 'int chain(void);\nint model(void) {\n    return chain();\n}\n' >sampling/model.c
    printf 'int chain(void);\nint state(void) {\n    return chain();\n}\n' >training/state.c
    printf 'int state(void);\nint main(void) {\n    return state();\n}\n' >train.c
    echo text >README.md
    compile base/base.c kernels/gemm.c files/atomic.c vqgan.c transformer.cu data.c diffusion.c sampling/model.c training/state.c train.c
    sh "$here" build >"$dir/log" 2>&1
    if [ "$(tail -n 1 "$dir/log")" = "10 passed, 0 failed" ]; then passed=1; else failed=1 && cat "$dir/log"; fi
    fault "the root" notes.txt "a stranger"
    fault "no #include of" base/base.c '#include "imagebart.h"'
    fault "no #include of" kernels/gemm.c '#include "imagebart.h"'
    fault "no use of" base/base.c 'int gemm(void);\nint up(void) {\n    return gemm();\n}'
    fault "no use of" files/atomic.c 'int net(void);\nint up(void) {\n    return net();\n}'
    fault "no use of" training/state.c 'int model(void);\nint beside(void) {\n    return model();\n}'
    fault "no use of" sampling/model.c 'int state(void);\nint up(void) {\n    return state();\n}'
    fault "no circle of #include" base/base.h '#include "base/base.c"'
    fault "no circle of files" vqgan.c 'int batch(void);\nint all(void) {\n    return batch();\n}'
    fault "no circle of files" kernels/layers.cu 'int again() {\n    return launch();\n}'
    fault "root files" diffusion.c "$(lines 520 'typedef int line;')"
    fault "a function" files/atomic.c "int long_one(int i) {\n$(lines 59 '    i++;')    return i;\n}"
    fault "a function" test/test_atomic.c "int long_one(int i) {\n$(lines 59 '    i++;')    return i;\n}"
    fault "no CUDA" data.c '#ifdef __CUDACC__\n#endif'
    fault "transformer.cu" transformer.cu '#if defined(DEVICE_CODE)\n#endif'
    fault "README.md" README.md "$(lines 201 x)"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

if [ "$1" = --selftest ]; then
    selftest
    exit
fi
check_house "${1:-build/gcc-native}"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
