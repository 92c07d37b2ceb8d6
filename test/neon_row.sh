#!/bin/sh
# neon_row.sh [-o TSV] FLAG...: for "make bench": what the fast layers' inner loops cost on 64-bit Arm, where no such machine
# is there to be timed: instructions for each multiply-add (of LANES numbers) in the loops as the cross compiler makes them
# with these flags. Of each function with multiply-adds in an innermost loop, the loop that has most of them; of weights in
# fewer bits, known by what widens them, one each. 1 is the least that there can be.
cc=aarch64-linux-gnu-gcc dump=aarch64-linux-gnu-objdump
table=/dev/null
[ "$1" != -o ] || { table=$2 && shift 2; }
if ! command -v $cc $dump >/dev/null; then
    echo "skipped: NEON's inner loops, for there is no $cc (Debian: apt-get install gcc-aarch64-linux-gnu)"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# lines: function, kind of weights, instructions, multiply-adds. A loop: from where a branch back goes to, to the branch.
loops() { # loops FILE: of its object
    $dump -d --no-show-raw-insn "$dir/$1.o" | awk -F '\t' -v file="$1" '
        /^[0-9a-f]+ <.*>:$/ { name = $0; gsub(/.*<|>.*|\.[a-z]*\.[0-9]*/, "", name); n = 0; delete line; next }
        /^ *[0-9a-f]+:/ {
            address = $1
            gsub(/[ :]/, "", address)
            line[address] = ++n
            op[n] = $2
            ends[n] = 0
            if ($2 !~ /^(b|b\..*|cbn?z|tbn?z)$/) next
            to = $3
            sub(/ <.*/, "", to)
            sub(/.*[ ,]/, "", to)
            if (!(to in line)) next
            kind = "f32"
            for (i = line[to]; i <= n; i++) {
                if (ends[i]) { ends[n] = 1; next } # not an innermost one
                if (op[i] ~ /^([su]?shll|[su]xtl|shll|shl|zip1)/ && kind == "f32") kind = "bf16"
                if (op[i] ~ /^scvtf/) kind = "int8"
            }
            adds = 0
            if (file != "stream") kind = "f32"
            for (i = line[to]; i <= n; i++) adds += op[i] ~ /^fml[as]/
            ends[n] = 1
            if (adds) print name, kind, n - line[to] + 1, adds
        }'
}
for f in gemm stream conv attention; do
    if ! $cc "$@" -march=armv8-a -c -o "$dir/$f.o" "kernels/$f.c"; then
        echo "FAIL kernels/$f.c is not compiled by $cc"
        exit 1
    fi
    loops "$f" | awk -v file="$f" '
        { what = $1 " " $2 }
        !(what in adds) || $4 > adds[what] || ($4 == adds[what] && $3 < all[what]) { adds[what] = $4; all[what] = $3 }
        END { for (what in adds) if (adds[what] >= 4) printf "%s\t%.2f\t%d\t%d\n", file " " what, all[what] / adds[what], all[what], adds[what] }' |
        LC_ALL=C sort
done >"$dir/rows"
[ -s "$dir/rows" ] || { echo "FAIL no inner loop was found" && exit 1; }
echo
echo "neon: instructions for each multiply-add in inner loops, by $cc $($cc -dumpversion)"
awk -F '\t' '{ printf "  %-40s %6.2f   (%d for %d)\n", $1, $2, $3, $4 }' "$dir/rows"
awk -F '\t' '{ printf "neon\t%s: %s instructions for each multiply-add\t\t\t\t\t\n", $1, $2 }' "$dir/rows" >>"$table"
