#!/bin/sh
# test_page.sh BUILD: the page of ./serve in headless Chromium (test_page.py): what is clicked, painted and typed there.
build=$(cd "$1" && pwd)
for program in chromium chromedriver python3; do
    if ! command -v $program >/dev/null; then
        echo "skipped: the page, which needs $program (Debian: apt-get install chromium chromium-driver python3)"
        exit
    fi
done
if [ ! -x "$build/serve" ]; then
    echo "skipped: ./serve, which needs libmicrohttpd and libcjson"
    exit
fi
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid"; rm -rf "$dir"' EXIT
mkdir "$dir/work" "$dir/profile"
ln -s "$build/sample" "$build/inpaint" "$(pwd)/models" "$dir/work"
"$build/serve" emoji --port 0 >"$dir/address" 2>"$dir/log" &
pid=$!
for _ in $(seq 100); do
    [ -s "$dir/address" ] && break
    sleep 0.1
done
python3 test/test_page.py "$(cat "$dir/address")" "$dir" $PAGE_OPTIONS
