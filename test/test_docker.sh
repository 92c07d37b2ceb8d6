#!/bin/sh
# test_docker.sh BUILD: dev/Dockerfile, without Docker: what "make install" puts into the image needs no library that its
# packages do not bring, and the command that the image starts serves callers who know the token, and nobody else. Where
# Docker runs, the image is built too.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
pid=
trap 'kill $pid 2>/dev/null; rm -rf "$dir"' EXIT
. test/lib.sh
export MAKEFLAGS=
file=dev/Dockerfile
BASE='libc6 libgcc-s1 libstdc++6' # what debian:12 has
[ -x "$build/serve" ] || { echo "skipped: ./serve was left out" && exit 0; }

# ---- What it copies ----
ok "two bases alike" test "$(grep -c '^FROM debian:12' $file)" -eq 2
make=$(sed -n 's/^RUN make -C \/src //p' $file)
ok "it is installed" test "$make" = "install DESTDIR=/out"
# shellcheck disable=SC2086
ok "as it says" make -s ${make%DESTDIR=*} BUILT="$build" DESTDIR="$dir/image"
root=$dir/image/usr/local

# ---- The packages of the second stage ----
runtime=$(sed -n '/^FROM debian:12$/,$ s/^RUN .*--no-install-recommends \(.*\) && rm.*/\1/p' $file)
if command -v dpkg >/dev/null && command -v objdump >/dev/null; then
    for needed in $(objdump -p "$root/libexec/imagebart/"* | awk '$1 == "NEEDED" { print $2 }' | sort -u); do
        case $needed in libmpi* | libopen-*) continue ;; esac # MPI is not in the image
        package=$(dpkg -S "*/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)/$needed" 2>/dev/null | sed 's/:.*//' | sort -u | head -n 1)
        ok "$needed is of $package, which is installed" sh -c "case ' $BASE $runtime ' in *' $package '*) ;; *) exit 1 ;; esac"
    done
    for package in $runtime; do
        library=$(dpkg -L "$package" 2>/dev/null | sed -n 's/.*\/\(lib[a-z]*[0-9-]*\.so\.[0-9]*\)$/\1/p' | head -n 1)
        ok "$package is needed, for $library" sh -c "objdump -p '$root/libexec/imagebart/'* | grep -q 'NEEDED *$library'"
    done
else
    echo "skipped: the packages of the image, for there is no dpkg or objdump"
fi

# ---- The command that it starts ----
words() { sed -n "s/^$1 \[\(.*\)\]/\1/p" $file | tr -d '",'; }
start() { # the image's command, with another place for the token and a port that is free
    # shellcheck disable=SC2046
    PATH=$root/bin:$PATH exec $(words ENTRYPOINT) $(words CMD | sed "s|/run/secrets/token|$dir/token|") --port 0
}
ask() { # ask TOKEN: the status of /api/models
    python3 - "$port" "$1" <<'PY'
import sys, urllib.error, urllib.request
header = {"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2] else {}
try:
    print(urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/api/models", headers=header), timeout=60).status)
except urllib.error.HTTPError as e:
    print(e.code)
PY
}
without() { (start); }
refused_late 1 "token-file.*$dir/token" without
echo 8c1f-secret >"$dir/token"
start >"$dir/said" 2>"$dir/errors" &
pid=$!
for _ in $(seq 100); do [ ! -s "$dir/said" ] || break; sleep 0.1; done
port=$(sed -n 's|^http://0\.0\.0\.0:\([0-9]*\)/.*|\1|p' "$dir/said")
ok "it listens for all: $(cat "$dir/said" "$dir/errors")" test -n "$port"
if [ -n "$port" ] && command -v python3 >/dev/null; then
    ok "who knows the token is served" test "$(ask 8c1f-secret)" = 200
    ok "who does not is not" test "$(ask '')" = 401
    ok "nor with another" test "$(ask 8c1f-secreT)" = 401
fi

# ---- Docker itself ----
if docker info >/dev/null 2>&1; then
    ok "docker build" docker build -q -t imagebart-test -f $file .
    ok "docker run" docker run --rm imagebart-test sample --list
else
    echo "skipped: docker build, for no Docker runs here"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
