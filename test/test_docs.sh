#!/bin/sh
# test_docs.sh BUILD: are README.md and doc/*.md true? The walkthrough's commands are run and its numbers compared; the
# changes of its exercises are made in a copy, where the checks that it names must go red; every file, function, option,
# target and link that is named exists; the table of models says what the recipes give.
# EXERCISES=all makes the changes of all exercises, not only the first of every second page; EXERCISES=none makes none.
build=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
docs="README.md doc/*.md"
sources=$(find . -path ./build -prune -o \( -name '*.[ch]' -o -name '*.cu' \) -print)

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAIL $*"
}

# same EXPECTED GOT: word by word; numbers with decimals may differ by one in the last
same() {
    awk '
        function number(w) { return w ~ /^-?[0-9]+(\.[0-9]+)?$/ }
        function unit(w) { return w ~ /\./ ? 10 ^ -(length(w) - index(w, ".")) : 0 }
        NR == FNR { want[FNR] = $0; n = FNR; next }
        {
            gsub(/[,:]/, " & "); gsub(/[,:]/, " & ", want[FNR])
            count = split(want[FNR], a)
            bad = count != NF
            for (i = 1; i <= NF && !bad; i++)
                bad = a[i] != $i && !(number(a[i]) && number($i) && (a[i] - $i) ^ 2 <= (1.01 * unit($i)) ^ 2)
            if (bad) { print "     line " FNR ": says \"" want[FNR] "\", the program \"" $0 "\""; wrong = 1 }
        }
        END { if (FNR != n) { print "     " n " lines, the program prints " FNR; wrong = 1 } exit wrong }' "$1" "$2"
}

# ---- The walkthrough's commands and numbers ----
: >"$dir/printed"
for page in 1 2 3 4 5 6 7 8; do
    awk -v command="    \$ test/walkthrough $page" '
        $0 == command { on = 1; next }
        on && !/^    / { exit }
        on { print substr($0, 5) }' doc/walkthrough.md >"$dir/said$page"
    if "$build/walkthrough" $page >"$dir/got" 2>"$dir/err" && [ -s "$dir/said$page" ] && same "$dir/said$page" "$dir/got"; then
        pass
    else
        fail "doc/walkthrough.md: the numbers of page $page: $(cat "$dir/err")"
    fi
    cat "$dir/got" >>"$dir/printed"
done

# ... and a wrong number is found
sed 's/0\.5625/0.5645/' "$dir/said4" >"$dir/wrong"
if same "$dir/wrong" "$dir/said4" >/dev/null; then fail "0.5645 passed for 0.5625"; else pass; fi

# Numbers in the text, three decimals or more, are printed by some page (signs aside).
awk '
    NR == FNR { gsub(/[^0-9.]/, " "); for (i = 1; i <= NF; i++) printed[++n] = $i; next }
    /^    / { next }
    {
        gsub(/[^0-9.]/, " ")
        for (i = 1; i <= NF; i++) {
            sub(/\.$/, "", $i)
            if ($i !~ /^[0-9]+\.[0-9][0-9][0-9]+$/) continue
            unit = 10 ^ -(length($i) - index($i, "."))
            for (found = j = 0; j < n && !found; found = (printed[++j] - $i) ^ 2 <= (1.01 * unit) ^ 2) ;
            if (!found) { print "     line " FNR ": " $i " is printed nowhere"; wrong = 1 }
        }
    }
    END { exit wrong }' "$dir/printed" doc/walkthrough.md && pass || fail "doc/walkthrough.md: numbers in the text"

end() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}
if [ ! -d kernels ]; then
    echo "skipped: names and exercises, for kernels/ is not here"
    end
fi

# ---- Names ----
# Words in backquotes. Files are named with their folder.
cat $docs | awk '/^    /{ next } { n = split($0, part, "`"); for (i = 2; i <= n; i += 2) print part[i] }' |
    sort -u >"$dir/quoted"
grep -E '^[A-Za-z0-9_./-]+(\.(c|cu|h|md|sh|py|txt|slurm|png)|/)$' "$dir/quoted" |
    grep -vE '^(config\.txt|samples\.png|chain\.png|psim\.txt|ffhq[a-z]*\.txt|skipped\.txt|models/NAME\.txt|(runs|data|events|train|val|valid|validation)/.*|models/lpips)$' >"$dir/files"
while read -r file; do
    if [ -e "$file" ]; then pass; else fail "a file is named that is not there: $file"; fi
done <"$dir/files"

# Identifiers with an underscore are somewhere in the sources, the recipes, or are files of a run.
grep -E '^[a-z][a-z0-9]*(_[a-z0-9]+)+$' "$dir/quoted" | grep -vx load_state_dict >"$dir/names"
# shellcheck disable=SC2086
cat $sources models/*.txt | tr -c 'A-Za-z0-9_' '\n' | sort -u >"$dir/words"
while read -r name; do
    if grep -qxF "$name" "$dir/words"; then pass; else fail "a name that no source has: $name"; fi
done <"$dir/names"

defines() { # defines FILE FUNCTION: its body is there
    awk -v name="$2" '$0 ~ "^[A-Za-z].*[ *]" name "\\(" { on = 1 } on && /;$/ { on = 0 } on && /\{$/ { found = 1 }
        END { exit !found }' "$1"
}
# "| `function` | `file` |" in tables, and "`function` (`file`)", "function (file)" in text
cat $docs | tr '\n' ' ' | grep -oE '`[a-z0-9_]+` (\| |\()`[A-Za-z0-9_./]+\.(c|cu)`|[a-z_]+ \([a-z_/]+\.(c|cu)\)' |
    tr -c 'A-Za-z0-9_./\n' ' ' | sort -u >"$dir/pairs"
while read -r name file; do
    if [ -f "$file" ] && defines "$file" "$name"; then pass; else fail "$file does not define $name"; fi
done <"$dir/pairs"
[ "$(wc -l <"$dir/pairs")" -ge 12 ] && pass || fail "few functions are named with their files"

# Options: of the programs, of make's other programs, of mpirun
for p in sample train inpaint serve; do [ ! -x "$build/$p" ] || "$build/$p" -h; done >"$dir/help" 2>/dev/null
[ -x "$build/serve" ] || docs=$(echo $docs | tr ' ' '\n' | grep -v '^doc/api.md$')
cat $docs | grep -oE '(^|[^-A-Za-z])--[a-z][a-z0-9-]+' | sed 's/.*--/--/' | sort -u |
    grep -vE '^--(bind-to|host|allow-run-as-root|logdir|cflags|libs|install)$' >"$dir/options"
while read -r option; do
    if grep -qE -- "(^|[^-a-z])$option([^-a-z]|\$)" "$dir/help"; then pass; else fail "no program has the option $option"; fi
done <"$dir/options"

# Targets of make
make -npq NVCC= 2>/dev/null | grep -oE '^[A-Za-z][A-Za-z0-9/_-]*:' | tr -d : | sort -u >"$dir/targets"
cat $docs | grep -oE '(^ +|`|&& )make( [A-Za-z][A-Za-z0-9_/-]*(=[^ `]*)?)*' | sed 's/^[^m]*make//' | tr ' ' '\n' | grep . |
    grep -v = | sort -u >"$dir/made"
while read -r target; do
    if grep -qxF "$target" "$dir/targets"; then pass; else fail "make has no target $target"; fi
done <"$dir/made"

make help 2>/dev/null | grep -q '^make test  *every test' && pass || fail "make help does not say what can be made"

# Links: files and headings
grep -oE '\]\([^)]*\)' $docs | sed 's/:\](/ /; s/)$//' | grep -v ' https*:' >"$dir/links"
while read -r from to; do
    file=${to%%#*} heading=${to#"${to%%#*}"}
    path=$(dirname "$from")/$file
    [ -n "$file" ] || path=$from
    found=1
    [ -e "$path" ] || found=
    if [ -n "$heading" ] && [ -n "$found" ]; then
        grep '^#' "$path" | tr 'A-Z ' 'a-z-' | sed 's/^#*-//; s/[^a-z0-9-]//g; s/^/#/' | grep -qxF -- "$heading" || found=
    fi
    if [ -n "$found" ]; then pass; else fail "$from links to $to, which is not there"; fi
done <"$dir/links"

# ---- README.md: short, with the commands that CI runs, and sizes that are true ----
[ "$(wc -l <README.md)" -lt 200 ] && pass || fail "README.md has 200 lines or more"
for line in 'apt-get update && apt-get install -y gcc g++ make libpng-dev libjpeg-dev zlib1g-dev && make' 'make test'; do
    grep -qxF "    $line" README.md && pass || fail "README.md does not say: $line"
done
# shellcheck disable=SC2086
lines=$(cat $(echo "$sources" | grep -v '^\./test/') | wc -l)
said=$(grep -oE 'about [0-9]+,000 lines' README.md | head -n 1 | tr -dc 0-9)
[ $((lines * 10)) -gt $((${said:-0} * 9)) ] && [ $((lines * 10)) -lt $((${said:-0} * 11)) ] && pass ||
    fail "README.md says ${said:-nothing about} lines; there are $lines"
"$build/sizes" >"$dir/sizes" 2>"$dir/err" || fail "sizes: $(cat "$dir/err")"
# A model's row: side, scales, millions of parameters, GB, GiB of memory and seconds; within a unit of what sizes says.
# emoji's is measured but for the first three.
while read -r name side scales vqgan all disk f32 bf16 int8 times; do
    grep -E "^\|.*\`$name\`.*iB" README.md | tr -d ',' | tr -c '0-9.|\n' ' ' | awk -F '|' \
        -v want="$side $scales $(awk "BEGIN { print $vqgan + $all }") $disk $f32 $bf16 $int8 $times" -v all="$name" '
        function near(got, n, unit) { if ((got - n) ^ 2 > (1.01 * unit) ^ 2) { print "     " got " is said, " n " is true"; bad = 1 } }
        {
            split(want, w, " "); split($8, memory, " "); split($9, time, " ")
            near($4, w[1], 0); near($5, w[2], 0); near($6, w[3], 1)
            if (all == "emoji") exit
            near($7, w[4], 0.1)
            for (f = 1; f <= 3; f++) { near(memory[f], w[4 + f], 0.1); near(time[f], w[7 + f], 1) }
        }
        END { exit bad || !NR }' && pass || fail "README.md: the row of $name in the table of models"
done <"$dir/sizes"

# ---- Exercises: each change makes its check red ----
awk '/^## [0-9]/ { page = $2 + 0 }
    /^    sed -i / { change = substr($0, 5); next }
    change != "" { print page "\t" change "\t" substr($0, 5); change = "" }' doc/walkthrough.md >"$dir/exercises"
[ "$(wc -l <"$dir/exercises")" -ge 8 ] && pass || fail "few exercises: $(cat "$dir/exercises")"

red() { # red FILE CHANGE CHECK: in the copy; the file is then put back
    (cd "$dir/copy" && sh -c "$2")
    if cmp -s "$1" "$dir/copy/$1"; then
        echo "     it changes nothing in $1"
        return 1
    fi
    (cd "$dir/copy" && timeout 600 sh -c "$3") >"$dir/log" 2>&1
    cp "$1" "$dir/copy/$1"
    grep -qE 'error:|Error 127|No rule' "$dir/log" && return 1
    case $3 in
        *test/walkthrough*) # prints something else now
            tail -n "$(wc -l <"$dir/said${3##* }")" "$dir/log" >"$dir/got"
            ! same "$dir/said${3##* }" "$dir/got" >/dev/null
            ;;
        *) grep -qE '(^| )FAIL ' "$dir/log" ;;
    esac
}
case $build in
    *sanit* | *plain*) EXERCISES=none && echo "skipped: the exercises, which need fast layers and no sanitizers" ;;
esac
[ "${EXERCISES:-}" != none ] || : >"$dir/exercises"
tab=$(printf '\t')
mkdir "$dir/copy" && cp -rp Makefile ./*.h ./*.c ./*.cu base $([ -d kernels ] && echo kernels) files sampling training test models doc "$dir/copy"
mkdir -p "$dir/copy/$build"
for part in "$build"/*; do # what is built already need not be again
    [ "${part##*/}" = emulated ] || cp -rp "$part" "$dir/copy/$build"
done
before=0
while IFS=$tab read -r page change check; do
    { [ "$page" != "$before" ] && [ $((page % 2)) -eq 0 ]; } || [ "${EXERCISES:-}" = all ] || continue
    before=$page
    if red "${change##* }" "$change" "$check"; then
        pass
    else
        fail "page $page: after \"$change\", \"$check\" does not fail as it should:"
        tail -n 5 "$dir/log"
    fi
done <"$dir/exercises"

end
