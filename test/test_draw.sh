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

# ---- models/ is found from anywhere: $IMAGEBART_MODELS, here, beside the program, however it is called ----
here=$(pwd)
mkdir "$dir/house" "$dir/else" "$dir/house/models" "$dir/none"
ln -s "$here/models/emoji" "$here/models/photos.txt" "$here/models/fetch.sh" "$dir/house/models"
for p in sample inpaint train; do cp "$build/$p" "$dir/house" && cp "$build/$p" "$dir/none" && ln -s "../house/$p" "$dir/else/my$p"; done
from() { (cd "$dir/$1" && shift && "$@"); } # from FOLDER COMMAND...
quick="-n 1 --seed 1 --best-of 1 --chain-length 1 -o $dir/f.png"
for program in ../house/sample "$dir/house/sample" ./mysample; do
    # shellcheck disable=SC2086
    ok "from elsewhere, as $program" from else $program emoji $quick
    ok "--list there, as $program" from else $program --list
    cp "$dir/out" "$dir/list"
    ok "finds the model" grep -q "^emoji  *here " "$dir/list"
    ok "says where it looked" grep -qx "Looked for in models/ here, $dir/house/models." "$dir/list"
done
ok "inpaint there" from else ./myinpaint "$here/models/emoji/example.png" --half upper --candidates 1 --chain-length 0,0,1 -o "$dir/f.png"
refused_late 1 "nope.txt.*recipes: photos (in models/ here, $dir/house/models)" from else ./mytrain nope --vqgan
refused_late 1 "looked in models/ here, $dir/none/models" from else ../none/sample
# shellcheck disable=SC2086
ok "by the environment" from else env IMAGEBART_MODELS="$here/models" ../none/sample emoji $quick
mkdir "$dir/else/models" # somebody else's hides nothing
# shellcheck disable=SC2086
ok "models/ of another kind here" from else ./mysample emoji $quick
refused_late 1 "IMAGEBART_MODELS=/no/such: no such folder" from else env IMAGEBART_MODELS=/no/such ./mysample
refused_late 1 "IMAGEBART_MODELS=/no/such: no such folder" from else env IMAGEBART_MODELS=/no/such ./mysample --list
mkdir "$dir/else/models/emoji" # the nearer one is taken
refused_late 1 "models/emoji/vqgan.safetensors is missing" from else ./mysample emoji
ok "--list there" from else ./mysample --list
cp "$dir/out" "$dir/list"
ok "what lacks a file is damaged" grep -q "^emoji  *damaged: no vqgan.safetensors" "$dir/list"
rm -r "$dir/else/models"
ok "--list without any" from none ./sample --list
cp "$dir/out" "$dir/list"
ok "an absent model is not here" grep -q "^emoji  *not here " "$dir/list"
ok "not damaged" test "$(grep -c damaged "$dir/list")" -eq 0
refused_late 1 "make -C $dir/house ffhq" from else ./mysample ffhq --convert "$dir"

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

# ---- masks, and pictures prepared as the model's are ----
printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000@\000\000\000@\001\003\000\000\000\220\247\343\235\000\000\000\006PLTE\377\377\377\377\377\377U|\365l\000\000\000\002tRNS\377\000\345\2670J\000\000\000\025IDATx\332c\140\030d\340?\020\2142p3\006\031\000\000y\260\177\201\206F\375\023\000\000\000\000IEND\256B\140\202' >"$dir/hole.png" # white, with a transparent 32x32
edit() { "$build/inpaint" "$@" --class food --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/e.png"; }
ok "a transparent hole" edit emoji models/emoji/example.png --mask "$dir/hole.png"
ok "is said and drawn" test "$(grep -cE 'hole.png: its transparent parts are drawn anew|^16 of 64 tokens' "$dir/err")" -eq 2
ok "the rest stays" "$build/pictures" same "$dir/e.png" models/emoji/example.png 32 0 64 64
ok "the opposite" edit emoji models/emoji/example.png --mask "$dir/hole.png" --invert
ok "of it" "$build/pictures" same "$dir/e.png" models/emoji/example.png 0 16 32 48
refused_late 2 "--invert is for --mask" edit emoji models/emoji/example.png --half upper --invert
"$build/pictures" make "$dir/large" 1 100
for prep in folder lsun ffhq pr-p; do
    mkdir "$dir/as-$prep" && cp models/emoji/*.safetensors "$dir/as-$prep"
    case $prep in
    pr-p) change='s/"data\.prep":"folder"/"data.pr-p":"folder"/' ;;
    *) change="s/\"data\.prep\":\"folder\"/$(printf '"data.prep":%-8s' "\"$prep\"")/" ;;
    esac
    LC_ALL=C sed -i "$change" "$dir/as-$prep/scale1.safetensors"
    ok "data.prep $prep" edit "$dir/as-$prep" "$dir/large/disc/000.png" --half upper
    cp "$dir/e.png" "$dir/$prep.png"
done
ok "what is not recorded is said" grep -q "at 64x64, scaled as data.prep folder" "$dir/err"
ok "it is so" "$build/pictures" same "$dir/pr-p.png" "$dir/folder.png" 0 32 64 64
ok "lsun scales so too" "$build/pictures" same "$dir/lsun.png" "$dir/folder.png" 0 32 64 64
ok "ffhq does not" sh -c "! '$build/pictures' same '$dir/ffhq.png' '$dir/folder.png' 0 32 64 64"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
