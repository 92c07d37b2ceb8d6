#!/bin/sh
# The pictures and the data sets of a machine without libwebp and LMDB: everything else works, and what is left out says
# which package brings it.
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
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
