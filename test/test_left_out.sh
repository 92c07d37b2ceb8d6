#!/bin/sh
# What this machine may not show. The pictures and the data sets of a machine without libwebp and LMDB: everything else
# works, and what is left out says which package brings it. Code for Intel's tiles (AMX): it compiles, and holds their
# instructions, by each compiler that knows such a processor.
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cc=${CC:-$(command -v gcc || command -v clang)}
libraries="$(pkg-config --cflags --libs libpng libjpeg zlib 2>/dev/null || echo -lpng -ljpeg -lz) -lm -lpthread"
passed=0 failed=0
for t in images data; do
    # shellcheck disable=SC2046,SC2086
    if $cc -std=c11 -D_GNU_SOURCE -DPLAIN -I. -O1 -Wall -Wextra -Wshadow -Wno-missing-field-initializers -Werror \
        -Wno-unknown-pragmas -o "$dir/test_$t" test/test_$t.c $(ls base/*.c | grep -vE 'start|level') files/*.c data.c $libraries &&
        "$dir/test_$t" >"$dir/log" 2>&1 && grep -q '^skipped: .*made without' "$dir/log"; then
        passed=$((passed + $(tail -n 1 "$dir/log" | sed 's/ passed.*//')))
    else
        failed=$((failed + 1))
        echo "FAIL test_$t without libwebp and LMDB"
        tail -n 5 "$dir/log"
    fi
done

tiles_compile() { # tiles_compile COMPILER FILE WORD: warn-free, and WORD is in the assembly
    $1 -march=sapphirerapids -std=c11 -D_GNU_SOURCE -I. -O1 -Wall -Wextra -Wshadow -Wno-missing-field-initializers -Werror \
        -Wno-unknown-pragmas -S -o "$dir/tiles.s" "$2" >"$dir/log" 2>&1 && grep -q "$3" "$dir/tiles.s" &&
        $1 -c -o "$dir/tiles.o" "$dir/tiles.s" >"$dir/log" 2>&1
}
for compiler in gcc clang; do
    if ! echo 'int x;' | $compiler -march=sapphirerapids -x c -c -o "$dir/x.o" - 2>/dev/null; then
        echo "SKIP tiles compiled by $compiler, which is missing or does not know -march=sapphirerapids"
        continue
    fi
    while read -r file word; do
        if tiles_compile $compiler "$file" "$word"; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "FAIL $file compiled by $compiler for a processor with tiles: expected $word in it"
            tail -n 5 "$dir/log"
        fi
    done <<FILES
kernels/bf16.c tdpbf16ps
kernels/stream.c tdpbf16ps
kernels/conv_bf16.c tdpbf16ps
kernels/fast.c tiles_here
base/threads.c tiles_here
base/tiles.c cpuid
test/peaks.c tdpbssd
FILES
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
