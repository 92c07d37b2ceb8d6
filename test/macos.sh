#!/bin/sh
# macos.sh [PYTHON]: does it compile and link for a Mac with Apple's processor? By zig, which PyPI's ziglang brings for
# PYTHON, with macOS's headers and the list of what its system library has. Codecs and HTTP come from where pkg-config says,
# as Homebrew's do: from a folder on no default path, made of Debian's headers and, for each library, a list of the
# functions that Debian's has. A function that is in none of them is not linked. Nothing can be run here.
#
# And what make 3.81, Apple's, would not understand is not in the Makefile.
python=${1:-python3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"; rm -f a.o' EXIT # which zig leaves when it links into /dev/null
. test/lib.sh
export MAKEFLAGS=

# ---- The Makefile ----
newer() { # newer WHAT PATTERN: lines that are no comment and hold it
    grep -nE -- "$2" Makefile | grep -v '^[0-9]*:#' >"$dir/found"
    ok "make 3.81 has no $1: $(head -n 1 "$dir/found")" test ! -s "$dir/found"
}
newer "# inside a call" '^[^	].*\$\([^)]*[^\\]#'
newer "!= and ::=" '^[A-Za-z_ ]+(!=|::?:=)'
newer "define with an operator or a comment" '^(override )?define +[^ ]+ +[^ ]'
newer "undefine, private, unexport of one target" '(^|: *)(undefine|private) '
newer "functions file, let, intcmp, guile" '\$\((file|let|intcmp|guile) '
newer "special target or variable" '\.(ONESHELL|SHELLFLAGS|EXTRA_PREREQS|NOTINTERMEDIATE|WAIT|LOADED)'
newer "grouped targets" '&:'
newer "export of one target" '^[^	=]*: *export '

"$python" -m ziglang version >"$dir/out" 2>&1 || {
    echo "skipped: there is no zig; python3 -m pip install ziglang brings it"
    [ "$failed" -eq 0 ] || echo "$passed passed, $failed failed"
    exit "$failed"
}

# ---- A place like Homebrew's ----
out=$(pwd)/build/macos
mkdir -p "$out/include" "$out/lib/pkgconfig" "$out/cache"
cat >"$out/zigcc" <<CC
#!/bin/sh
ZIG_LOCAL_CACHE_DIR='$out/cache' exec '$(command -v "$python")' -m ziglang cc -target aarch64-macos "\$@"
CC
chmod +x "$out/zigcc"
for h in png.h pngconf.h pnglibconf.h zlib.h zconf.h jpeglib.h jmorecfg.h jerror.h jconfig.h lmdb.h microhttpd.h webp cjson; do
    for at in /usr/include/$h "/usr/include/$(uname -m)-linux-gnu/$h"; do [ ! -e "$at" ] || cp -rL "$at" "$out/include"; done
done
library() { # library NAME PKG: NAME.tbd, which says what there is, and PKG.pc
    so=$(cc -print-file-name="lib$1.so")
    [ -f "$so" ] || { echo "skipped: lib$1 is not here" && return; }
    {
        printf -- "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '/opt/homebrew/lib/lib%s.dylib'\nexports:\n" "$1"
        printf '  - targets: [ arm64-macos ]\n    symbols: [ '
        nm -D --defined-only "$so" | awk '{ sub(/@.*/, "", $3); if ($3 ~ /^[A-Za-z]/) printf "%s_%s", n++ ? ", " : "", $3 }'
        printf ' ]\n...\n'
    } >"$out/lib/lib$1.tbd"
    printf 'Name: %s\nDescription: of test/macos.sh\nVersion: 1\nCflags: -I%s\nLibs: -L%s -l%s\n' "$2" "$out/include" "$out/lib" "$1" \
        >"$out/lib/pkgconfig/$2.pc"
}
rm -f "$out"/lib/pkgconfig/* "$out"/lib/*.tbd
library png16 libpng
library jpeg libjpeg
library z zlib
library webp libwebp
library lmdb lmdb
library microhttpd libmicrohttpd
library cjson libcjson

# ---- All programs ----
mac() { PKG_CONFIG_LIBDIR=$out/lib/pkgconfig make -s NVCC= HAVE_MPI= CC="$out/zigcc" MARCH=apple_m1 "$@"; } # mac TARGET...
there=$(mac list-folder | tail -n 1)
programs="sample inpaint train imagebart golden test_base bench libimagebart.so"
[ ! -f "$out/lib/libmicrohttpd.tbd" ] || [ ! -f "$out/lib/libcjson.tbd" ] || programs="$programs serve"
# shellcheck disable=SC2046
ok "compiled and linked for macOS" mac $(for p in $programs; do echo "$there/$p"; done)
cp "$dir/err" "$dir/said"
head -n 40 "$dir/said"
for p in $programs; do
    ok "$p is for arm64" test "$(od -An -tx1 -N8 "$there/$p" | tr -d ' ')" = cffaedfe0c000001
done
# what is in no library is not linked: the check can fail
echo 'int nowhere(void); int main(void) { return nowhere(); }' >"$dir/nowhere.c"
refused_late 1 nowhere sh -c "'$out/zigcc' -o '$dir/nowhere' '$dir/nowhere.c' || { tail -n 50 >&2; exit 1; }" </dev/null
printf '#include <zlib.h>\nint main(void) { return !zlibVersion(); }\n' >"$dir/somewhere.c"
ok "what is in one is" "$out/zigcc" -I "$out/include" -o "$dir/somewhere" "$dir/somewhere.c" -L "$out/lib" -lz
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
