#!/bin/sh
# test_serve.sh BUILD: ./serve: its options; then what it answers, byte by byte on a socket (serve_client.c).
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 "$pid"; rm -rf "$dir"' EXIT
. test/lib.sh
if [ ! -x "$build/serve" ]; then
    echo "skipped: ./serve, which needs libmicrohttpd and libcjson"
    exit
fi
start() { # start OPTIONS: sets $port
    : >"$dir/address"
    "$build/serve" --port 0 "$@" >"$dir/address" 2>"$dir/log" &
    pid=$!
    for _ in $(seq 100); do
        [ -s "$dir/address" ] && break
        sleep 0.1
    done
    port=$(sed 's/.*:\([0-9]*\)\/$/\1/' "$dir/address")
}
ended() { # with exit status 0, and nothing to say
    wait "$pid" && return
    tail -n 20 "$dir/log"
    return 1
}
stop() { # ends by SIGTERM
    kill "$pid"
    ok "the end of $1" ended
    [ ! -s "$dir/out" ] || cat "$dir/out"
    pid=
}
ask() { # ask WHAT [ARGUMENT]: the client's checks count
    "$build/serve_client" "$1" "$port" "$2" >"$dir/client"
    grep -v ' passed, ' "$dir/client"
    line=$(tail -n 1 "$dir/client")
    p=$(expr "$line" : '\([0-9]*\) passed') f=$(expr "$line" : '.*, \([0-9]*\) failed')
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-1}))
}

# ---- Options ----
serve="$build/serve"
refused_late 2 "emoji" "$serve" emoji emoji
refused_late 2 "emoji" "$serve" emoji models/emoji
refused_late 1 "ffhq" "$serve" ffhq
refused_late 1 "no such folder" "$serve" "$dir"/nowhere
refused_late 2 "token" "$serve" emoji --host 0.0.0.0 --port 0
refused_late 2 "token" "$serve" emoji --host :: --port 0
refused_late 2 "token" "$serve" emoji --token ""
printf '\n' >"$dir/empty" && printf 'sesame\n' >"$dir/token"
refused_late 1 "empty" "$serve" emoji --token-file "$dir/empty"
refused_late 1 "token-file" "$serve" emoji --token-file "$dir/nothing"
refused_late 2 "expected one of them" "$serve" emoji --token a --token-file "$dir/token"
for origin in example.org http:// https://a/ https://a/b ftp://a http://a:x "http://a b" null; do
    refused_late 2 "origin" "$serve" emoji --origin "$origin"
done
refused_late 2 "unknown option" "$serve" --prot 80

# ---- A server for this machine ----
start
ok "the version" "$serve" --version
ask version "$(sed -n '1s/.* //p' "$dir/out")"
refused_late 1 "cannot listen" "$serve" emoji --port "$port"
ask http
stop http

# ---- One with a token ----
start emoji --host 0.0.0.0 --token-file "$dir/token" --origin https://page.example --origin http://other.example:81
ask token
stop token

# ---- Jobs: what they draw is what the command that they show draws ----
mkdir "$dir/work" && ln -s "$build/sample" "$build/inpaint" "$(pwd)/models" "$dir/work"
start --queue 2 --count-limit 40
ask jobs "$dir/work"
stop jobs
start emoji --results 1
ask forget
stop forget

# ---- doc/api.md's lines for a shell ----
if command -v curl >/dev/null; then
    start emoji
    awk '/^## / { on = $0 == "## From a shell" } on && sub(/^    /, "")' doc/api.md | sed "s/:8080/:$port/" >"$dir/lines"
    "$build/sample" emoji -n 1 --seed 7 -q -o "$dir/first.png"
    ok "a shell's lines" sh -c "cd '$dir' && . ./lines"
    cp "$dir/out" "$dir/events"
    ok "its events end" grep -q "^event: done" "$dir/events"
    ok "its picture" "$build/pictures" same "$dir/0.png" "$dir/first.png" 0 0 64 64
    stop "a shell's lines"
fi

# ---- The end: what runs is cancelled, everybody is told ----
start emoji
began=$(date +%s)
ask end "$pid"
ok "the end" ended
[ ! -s "$dir/out" ] || cat "$dir/out"
ok "soon" test $(($(date +%s) - began)) -lt 8
pid=

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
