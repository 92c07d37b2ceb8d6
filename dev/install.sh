#!/bin/sh
# install.sh install BUILD: the programs that lie in BUILD, with what they need, under $DESTDIR$PREFIX, and the library if
# "make lib" has made it; "make install" calls it. install.sh uninstall takes away what was put there, and the folders that were made for it.
#
#     bin/imagebart                          imagebart sample, train, inpaint, serve
#     libexec/imagebart/                     these four as they were built
#     share/imagebart/                       the bundled model, recipes, classes, fetch.sh; installed: a list of all this
#     share/man/man1/                        man pages, and
#     share/bash-completion/completions/     completion, both made from what the programs print with -h
#     lib/, include/                         the library, its header, imagebart.pc
#
# The programs find share/ from where they lie: a prefix may be moved. What users put into share/imagebart themselves,
# such as official weights, stays.
die() {
    echo "make $what: $*" >&2
    exit 1
}
what=$1 build=$2
case $PREFIX in /*) ;; *) die "PREFIX=$PREFIX: expected an absolute path" ;; esac
case $DESTDIR in /* | "") ;; *) die "DESTDIR=$DESTDIR: expected an absolute path" ;; esac
plain() { printf '%s\n' "$1" | sed 's|//*|/|g; s|/$||'; } # plain PATH: //a//b/ is /a/b, / is empty
PREFIX=$(plain "$PREFIX") DESTDIR=$(plain "$DESTDIR")
root=$DESTDIR$PREFIX
share=$PREFIX/share/imagebart list=$root/share/imagebart/installed

uninstall() { # files, then folders, the innermost first
    while read -r kind path; do
        [ "$kind" != file ] || rm -f "$DESTDIR$path" || exit 1
    done <"$list"
    mv "$list" "$list.old" || exit 1
    folders=$(sed -n 's/^folder //p' "$list.old" | LC_ALL=C sort -r)
    rm -f "$list.old"
    echo "$folders" | while read -r path; do
        rmdir "$DESTDIR$path" 2>/dev/null || [ ! -d "$DESTDIR$path" ] || echo "$DESTDIR$path stays: it has other files"
    done
}

folder() { # folder PATH: made with those above it, which are remembered if they are new
    [ -d "$DESTDIR$1" ] || {
        case $1 in /*/*) folder "${1%/*}" ;; esac
        [ ! -d "$DESTDIR$1" ] || return 0 # a/.. and a/. are there when a is
        mkdir "$DESTDIR$1" && chmod 755 "$DESTDIR$1" || exit 1
        echo "folder $1" >>"$made"
    }
}
put() { # put MODE FILE PATH: replaced whole, so that a program that runs is left alone
    folder "${3%/*}"
    cp "$2" "$DESTDIR$3.new" && chmod "$1" "$DESTDIR$3.new" && mv -f "$DESTDIR$3.new" "$DESTDIR$3" || exit 1
    echo "file $3" >>"$made"
}

pages() { # man pages and completion, from what the installed program says
    imagebart=$root/bin/imagebart commands=$1
    see='.BR imagebart (1)'
    for c in $commands; do
        "$imagebart" "$c" -h >"$work/$c.txt" || die "$imagebart $c -h: it does not run here"
        see="$see,
.BR imagebart\\\\-$c (1)"
    done
    "$imagebart" -h >"$work/imagebart" || die "$imagebart does not run here"
    for c in $commands; do
        awk -v name="imagebart-$c" -v see="$see" -f dev/man.awk "$work/$c.txt" >"$work/page" &&
            put 644 "$work/page" "$PREFIX/share/man/man1/imagebart-$c.1"
    done
    awk -v name=imagebart -v see="$see" -f dev/man.awk "$work/imagebart" >"$work/page" &&
        put 644 "$work/page" "$PREFIX/share/man/man1/imagebart.1"
    models=$("$imagebart" sample --list | awk '$1 == "model" { on = 1; next } on && !NF { exit } on { printf "%s ", $1 }')
    # shellcheck disable=SC2086
    (cd "$work" && awk -v models="$models" -f "$here/dev/completion.awk" $(for c in $commands; do echo "$c.txt"; done)) >"$work/page" &&
        put 644 "$work/page" "$PREFIX/share/bash-completion/completions/imagebart"
}

library() { # so, a, header, and what pkg-config is told
    put 644 "$build/libimagebart.so" "$PREFIX/lib/libimagebart.so.1"
    put 644 "$build/libimagebart.a" "$PREFIX/lib/libimagebart.a"
    put 644 sampling/libimagebart.h "$PREFIX/include/libimagebart.h"
    ln -sf libimagebart.so.1 "$root/lib/libimagebart.so" && echo "file $PREFIX/lib/libimagebart.so" >>"$made" || exit 1
    cat >"$work/pc" <<PC
prefix=\${pcfiledir}/../..
Name: imagebart
Description: draws, completes, encodes and decodes pictures with ImageBART models
Version: $(sed -n 's/^#define IMAGEBART_API \([0-9]*\).*/\1/p' sampling/libimagebart.h)
Cflags: -I\${prefix}/include
Libs: -L\${prefix}/lib -limagebart
Libs.private: $LIBRARY_NEEDS
PC
    put 644 "$work/pc" "$PREFIX/lib/pkgconfig/imagebart.pc"
}

case $what in
install)
    here=$(pwd) work=$(mktemp -d) || exit 1
    trap 'rm -rf "$work"' EXIT
    made=$work/made commands=
    [ -x "$build/imagebart" ] || die "$build/imagebart is missing: make install without BUILT makes it"
    if [ -f "$list" ]; then uninstall >/dev/null; fi
    : >"$made"
    mkdir -p "$DESTDIR/" || exit 1
    for c in sample inpaint train serve; do
        [ -x "$build/$c" ] || continue
        put 755 "$build/$c" "$PREFIX/libexec/imagebart/$c"
        commands="$commands $c"
    done
    put 755 "$build/imagebart" "$PREFIX/bin/imagebart"
    for f in models/*.txt models/emoji/*; do put 644 "$f" "$share${f#models}"; done
    put 755 models/fetch.sh "$share/fetch.sh"
    [ ! -f "$build/libimagebart.so" ] || library
    pages "$commands"
    for own in "$share" "$share/emoji" "$PREFIX/libexec/imagebart"; do echo "folder $own" >>"$made"; done
    LC_ALL=C sort -u "$made" >"$work/sorted" && put 644 "$work/sorted" "$share/installed" || exit 1
    echo "installed: $root/bin/imagebart, with$commands"
    ;;
uninstall)
    [ -f "$list" ] || die "nothing is installed there: no file $list (PREFIX=..., DESTDIR=... say where)"
    uninstall
    ;;
*) die "expected install or uninstall" ;;
esac
