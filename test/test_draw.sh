#!/bin/sh
# test_draw.sh BUILD: ./sample and ./inpaint look at where pictures will go before they draw, and say what they replace.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
sample() { "$build/sample" emoji -n 1 --seed 1 --best-of 1 "$@"; }
inpaint() { "$build/inpaint" emoji models/emoji/example.png --half upper --seed 1 "$@"; }
early() { # early WORD COMMAND...: refused with one line, which holds WORD: nothing was said, loaded or drawn before it
    refused_late 1 "$@"
    ok "$2: nothing before that" test "$(grep -c . "$dir/err")" -eq 1
}

mkdir "$dir/folder"
for to in nowhere/x.png folder x.jpg x.JPEG x.webp x.tiff folder/x.gif; do
    early "-o" sample -o "$dir/$to"
    early "-o" inpaint -o "$dir/$to"
    early "--chain" sample -o "$dir/x.png" --chain "$dir/$to"
done
early "No such file" sample -o "$dir/x.png" --nearest "$dir/no-pictures"
early "same file" sample -o "$dir/x.png" --chain "$dir/x.png"
ok "nothing is left behind" test "$(find "$dir" -name 'x*' | wc -l)" -eq 0
refused_late 1 "-o: a picture of .* pixels.*; a smaller -n" "$build/inpaint" emoji models/emoji/example.png --half upper -n 4096 --compare -o "$dir/x.png"
refused_late 1 "--chain: a picture of" "$build/sample" emoji -n 600 --best-of 1 --chain "$dir/c.png" -o "$dir/x.png"
ok "nothing was drawn" test ! -e "$dir/x.png"

for to in x.png plain 2026.11.29 x.PNG; do ok "a name" sample -o "$dir/$to"; done
ok "one" grep -q '^1 picture in' "$dir/err"
ok "a device" sample -o /dev/null
mkfifo "$dir/pipe"
cat "$dir/pipe" >"$dir/piped.png" &
ok "a pipe" sample -o "$dir/pipe"
wait
ok "a pipe holds the picture" cmp "$dir/x.png" "$dir/piped.png"

# ---- a missing model: the bundled one stands in, or cannot ----
for options in "--class goldfish" "--class n02099601" "--temperature 1,1,1,1" "--top-k 9,9,9,9"; do
    # shellcheck disable=SC2086
    early 'make imagenet4" fetches them.*cannot stand in' "$build/sample" imagenet4 $options -o "$dir/m.png"
done
ok "without such" "$build/sample" imagenet4 -n 1 --best-of 1 -o "$dir/m.png"
ok "that is said" grep -q "Going on with the bundled model" "$dir/err"

ok "one number of guidance" sample --class food --guidance 2 -o "$dir/g.png"
ok "what cannot is said" grep -q "^scale .: --guidance 1, not 2" "$dir/err"
ok "the same by hand" sample --class food --guidance 1,2,1 -o "$dir/h.png"
# ---- what a picture tells ----
cp -r models/emoji "$dir/own" && cp models/emoji/example.png "$dir/mine.png"
ok "a model elsewhere" "$build/sample" "$dir/own//" -n 1 --best-of 1 -o "$dir/p.png"
ok "a picture elsewhere" "$build/inpaint" "$dir/own" "$dir/mine.png" --half upper --candidates 1 -o "$dir/q.png"
for picture in p q; do
    ok "the model's name is in $picture" grep -aq "own" "$dir/$picture.png"
    ok "no folder is in $picture" test "$(grep -ac "$dir" "$dir/$picture.png")" -eq 0
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
