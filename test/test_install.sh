#!/bin/sh
# test_install.sh BUILD: what "make install" puts under DESTDIR works from anywhere, under another prefix, by a link and
# without the sources; its pages and completion have every option; "make uninstall" leaves nothing.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
export MAKEFLAGS=
stage=$dir/stage
root=$stage/opt/image\ bart
list() { (cd "$1" && find . ! -name . | LC_ALL=C sort); }
by_hand() { PREFIX=$1 DESTDIR=$2 dev/install.sh "$3" "$build"; } # by_hand PREFIX DESTDIR install|uninstall

ok "make install" make -s install BUILT="$build" PREFIX="/opt/image bart" DESTDIR="$stage"
ok "what there is" test -x "$root/bin/imagebart" -a -f "$root/share/imagebart/emoji/scale1.safetensors" -a -f "$root/share/imagebart/photos.txt"
ok "others may read all of it" test -z "$(find "$stage" ! -perm -o=r -o -type d ! -perm -o=x)"
list "$stage" >"$dir/first"
ok "again" by_hand "/opt/image bart" "$stage" install
list "$stage" >"$dir/second"
ok "is the same" cmp "$dir/first" "$dir/second"

# ---- Used from another folder, under another prefix, by a link ----
mkdir "$dir/else" "$dir/bin"
mv "$root" "$dir/moved"
ln -s ../moved/bin/imagebart "$dir/bin/imagebart"
imagebart() { (cd "$dir/else" && PATH=$dir/bin:$PATH && command imagebart "$@"); }
quick="emoji -n 1 --seed 1 --best-of 1 --chain-length 1"
# shellcheck disable=SC2086
ok "sample" imagebart sample $quick -o "$dir/installed.png"
# shellcheck disable=SC2086
ok "by the program that was built" "$build/sample" $quick -o "$dir/built.png"
ok "the same picture" cmp "$dir/installed.png" "$dir/built.png"
ok "inpaint" imagebart inpaint "$dir/installed.png" --half upper --candidates 1 --chain-length 0,0,1 -o "$dir/edited.png"
ok "--list" imagebart sample --list
cp "$dir/out" "$dir/list"
ok "says where it looked" grep -q "^Looked for in models/ here, $dir/moved/share/imagebart.$" "$dir/list"
ok "how to fetch" grep -q "sh $dir/moved/share/imagebart/fetch.sh ffhq" "$dir/list"
refused_late 1 "^imagebart train: .*recipes: .*photos" imagebart train nope --vqgan
refused_late 2 "^imagebart inpaint: which picture. imagebart inpaint .MODEL. IMAGE" imagebart inpaint
refused_late 2 "^imagebart sample: unknown option --sed; did you mean --seed" imagebart sample --sed 1
refused_late 2 '^imagebart: no command "smaple"; expected sample' imagebart smaple
refused_late 2 '^imagebart: no command "sm?aple"; expected sample' imagebart "$(printf 'sm\033aple')"
refused_late 2 "commit, compiler" imagebart
ok "help sample" imagebart help sample
cp "$dir/out" "$dir/help"
ok "is sample -h" imagebart sample -h
cp "$dir/out" "$dir/other"
ok "the same" cmp "$dir/other" "$dir/help"

# ---- The library ----
if [ -f "$build/libimagebart.so" ]; then
    here=$(pwd)
    ok "the library has its number" test "$(sed -n 's/^Version: //p' "$dir/moved/lib/pkgconfig/imagebart.pc")" -ge 1
    printf '#include <libimagebart.h>\nint main(void) {\n    imagebart_model *m;\n    return imagebart_open(&m, "emoji", 0);\n}\n' >"$dir/own.c"
    ok "a program of one's own" "${CC:-cc}" -I "$dir/moved/include" -o "$dir/own" "$dir/own.c" -L "$dir/moved/lib" -limagebart
    ok "finds library and model" sh -c "cd '$dir/else' && LD_LIBRARY_PATH='$dir/moved/lib' '$dir/own'"
    if command -v python3 >/dev/null; then
        ok "Python, from elsewhere" sh -c "cd '$dir/else' && IMAGEBART_LIBRARY='$dir/moved/lib/libimagebart.so' python3 -B '$here/dev/imagebart.py' emoji '$dir/python.png' seed=1 best_of=1 chain_length=1"
        ok "the same picture" "$build/pictures" same "$dir/python.png" "$dir/built.png" 0 0 64 64
    fi
fi

# ---- Pages and completion: every option of every command ----
for c in sample inpaint train serve; do
    [ -x "$build/$c" ] || continue
    ok "$c -h" imagebart $c -h
    cp "$dir/out" "$dir/help"
    ok "$c -h names no program here" test "$(grep -cE '\./(sample|train|inpaint|serve)' "$dir/help")" -eq 0
    sed 's/\\-/-/g' "$dir/moved/share/man/man1/imagebart-$c.1" >"$dir/page"
    grep -oE '^  --?[a-z][a-z0-9-]*' "$dir/help" | tr -d ' ' >"$dir/options"
    ok "$c has options" test "$(wc -l <"$dir/options")" -ge 10
    while read -r option; do
        grep -qE -- "^\.B \".*$option[\", ]" "$dir/page" || echo "$c $option"
    done <"$dir/options" >"$dir/missing"
    ok "$c: the page has all: $(tr '\n' ' ' <"$dir/missing")" test ! -s "$dir/missing"
    command -v bash >/dev/null || continue
    # shellcheck disable=SC2016
    ok "$c completed" bash -c '. "$1/share/bash-completion/completions/imagebart" && COMP_WORDS=(imagebart $2 -) COMP_CWORD=2 &&
        _imagebart && printf "%s\n" "${COMPREPLY[@]}"' - "$dir/moved" $c
    LC_ALL=C sort "$dir/out" >"$dir/completed"
    ok "$c: completion has all" test -z "$(LC_ALL=C sort "$dir/options" | LC_ALL=C comm -23 - "$dir/completed")"
done
if command -v groff >/dev/null; then
    for page in "$dir"/moved/share/man/man1/*; do
        ok "$page" groff -man -Tascii -ww "$page"
        ok "$page: no complaint" test ! -s "$dir/err"
    done
fi

# ---- --version: the same of all, and of installed ones ----
for c in sample inpaint train serve; do
    [ -x "$build/$c" ] || continue
    ok "$c --version" "$build/$c" --version
    cp "$dir/out" "$dir/version"
    ok "$c: four lines" test "$(wc -l <"$dir/version")" -eq 4
    for line in "^$c of imagebart.c, commit [0-9a-z-]*$" "^compiler: .* [0-9][0-9.]*" "^processor: ." "^libraries: .*libpng [0-9.]*.*zlib [0-9.]*.*libjpeg"; do
        ok "$c --version: $line" grep -q "$line" "$dir/version"
    done
    ok "installed" imagebart $c --version
    ok "$c: the same" test "$(sed 's/^imagebart //' "$dir/out")" = "$(cat "$dir/version")"
done
[ ! -e .git ] || ok "the commit" grep -q "commit [0-9a-f]\{12\}" "$dir/version"

# ---- Uninstalled ----
mv "$dir/moved" "$root"
ok "make uninstall" make -s uninstall PREFIX="/opt/image bart" DESTDIR="$stage"
ok "nothing is left" test -z "$(list "$stage")"
for prefix in /new/ /a//b //a///b// /a/./b/../c /; do # each taken away as it was put there, or as others write it
    ok "PREFIX=$prefix" by_hand "$prefix" "$stage" install
    case $prefix in */) away=${prefix%/} ;; *) away=$prefix// ;; esac
    ok "works" "$stage/$prefix/bin/imagebart" -h
    ok "no path has two slashes" test "$(grep -c // "$stage/$prefix/share/imagebart/installed")" -eq 0
    ok "uninstalled as PREFIX=$away" by_hand "${away:-/}" "$stage/" uninstall
    ok "PREFIX=$prefix: nothing is left: $(list "$stage" | head -n 3)" test -z "$(list "$stage")"
done
ok "DESTDIR//" by_hand /usr/ "$stage//" install
ok "is DESTDIR" by_hand /usr "$stage" uninstall
ok "nothing of it is left" test -z "$(list "$stage")"
refused_late 1 "nothing is installed there" by_hand /opt/x "$stage" uninstall
refused_late 1 "expected an absolute path" by_hand opt/x "$stage" install
mkdir -p "$stage/usr/bin" && echo mine >"$stage/usr/bin/mine"
ok "beside others" by_hand /usr "$stage" install
mkdir "$stage/usr/share/imagebart/ffhq" && echo weights >"$stage/usr/share/imagebart/ffhq/scale1.ckpt"
ok "taken away" by_hand /usr "$stage" uninstall
ok "what others put there stays" test "$(cd "$stage" && find . -type f | LC_ALL=C sort | tr '\n' ' ')" = "./usr/bin/mine ./usr/share/imagebart/ffhq/scale1.ckpt "
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
