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
for program in sample inpaint; do early "is a folder; -o $dir/folder/ writes a file for each" $program -o "$dir/folder"; done
early "No such file" sample -o "$dir/x.png" --nearest "$dir/no-pictures"
refused_late 1 '^sample: --nearest: data/emoji/*: No such file or directory; "make data/emoji" makes the pictures' sh -c "cd '$dir' && IMAGEBART_MODELS='$PWD/models' '$build/sample' emoji --nearest data/emoji"
early "same file" sample -o "$dir/x.png" --chain "$dir/x.png"
early "same file" sample -o "$dir/x.png" --chain "$dir/./x.png"
early "same file" sample -o "$dir/x.png" --animate "$dir/folder/../x.png"
early "same file" sample -o "$dir/folder/" --chain "$dir//folder/0002.png"
cp models/emoji/example.png "$dir/in.png" && cp "$dir/in.png" "$dir/mask.png" && cp "$dir/in.png" "$dir/whole.png"
ln -s in.png "$dir/link.png" && mkdir "$dir/set" "$dir/set/a" && cp "$dir/in.png" "$dir/set/a/1.png"
edit() { "$build/inpaint" emoji "$dir/in.png" --seed 1 "$@"; }
for to in in.png ./in.png folder/../in.png link.png; do
    early "is the file that IMAGE reads and would be replaced" edit --half upper -o "$dir/$to"
done
early "is the file that IMAGE reads" edit --half upper -o "$dir/x.png" --animate "$dir/in.png"
early "is the file that --mask reads" edit --mask "$dir/mask.png" -o "$dir/mask.png"
early "is the file that --paste-into reads" edit --mask "$dir/mask.png" --paste-into "$dir/whole.png" -o "$dir/whole.png"
for option in -o --chain --animate; do
    early "$option .* is a file of the folder that --nearest reads" sample --nearest "$dir/set/" $option "$dir/set/a/1.png"
done
early "is a file of the folder that --nearest reads" sample --nearest "$dir" -o "$dir/folder/../in.png"
ok "they are as they were" sh -c "for f in in mask whole set/a/1; do cmp models/emoji/example.png '$dir'/\$f.png || exit; done"
rm -r "$dir/set" "$dir/link.png"

for also in "-n 3" "-o $dir/x.png" "--chain $dir/x.png" "--nearest models" "--best-of 2" "--animate $dir/x.png" "--show"; do
    # shellcheck disable=SC2086
    refused_late 2 "--score draws nothing" "$build/sample" emoji --score models/emoji/example.png $also
    # shellcheck disable=SC2086
    refused_late 2 "--convert draws nothing" "$build/sample" emoji --convert "$dir/folder" $also
done
refused_late 2 "--store is for --convert" "$build/sample" emoji -n 1 --store bf16 -o "$dir/x.png"
refused_late 2 "give one of --list, --score, --convert" "$build/sample" --list --convert "$dir/folder"
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

# ---- A picture of several, by its number ----
ok "two" sample -n 2 --class food -o "$dir/two/"
ok "the second" sample --first 1 --class food -o "$dir/second.png"
ok "is the same alone" cmp "$dir/two/0002.png" "$dir/second.png"
ok "two edits" inpaint -n 2 --class food --candidates 2 -o "$dir/edits/"
ok "the second" inpaint --first 1 --class food --candidates 2 -o "$dir/second.png"
ok "is the same alone" cmp "$dir/edits/0002.png" "$dir/second.png"
ok "into the picture" inpaint --class food --candidates 2 --paste-into models/emoji/example.png -o "$dir/into.png"
ok "whose size it has" "$build/pictures" same "$dir/into.png" models/emoji/example.png 0 32 64 64
refused_late 2 "paste-into is not for --extend" "$build/inpaint" emoji models/emoji/example.png --extend 32 --paste-into models/emoji/example.png
refused_late 1 "expected 64x64" inpaint --class food --paste-into models/emoji/samples.png -o "$dir/into.png"

# ---- Colours: a result is in those of the picture whose kept pixels it has ----
ok "Display P3" "$build/pictures" colour models/emoji/example.png "$dir/p3.png"
p3() { "$build/inpaint" emoji "$dir/p3.png" --half upper --seed 1 --class food --candidates 2 "$@"; }
for how in "-o $dir/c.png --paste-into $dir/p3.png" "-o $dir/c.png --animate $dir/f.png" "-n 2 -o $dir/c.png" "-o $dir/c.png --no-paste"; do
    # shellcheck disable=SC2086
    ok "in its colours" p3 $how
    ok "which the file says: $how" "$build/pictures" colours "$dir/p3.png" "$dir/c.png"
done
ok "the animation's, too" "$build/pictures" colours "$dir/p3.png" "$dir/f.png"
ok "those of another file, which says nothing" p3 --paste-into models/emoji/example.png -o "$dir/c.png"
ok "the same pixels" "$build/pictures" same "$dir/c.png" "$dir/into.png" 0 0 64 64
ok "no colours" test "$("$build/pictures" colours "$dir/p3.png" "$dir/c.png"; echo $?)" -eq 1

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
ok "that is said" grep -q '^sample: the official weights of imagenet4 .*; "make imagenet4" fetches them. Going on with the bundled model, which draws emoji instead.$' "$dir/err"
ok "quietly" "$build/sample" ffhq -q -n 1 --best-of 1 --chain-length 1 -o "$dir/m.png"
ok "that is said all the same" grep -q '"make ffhq" fetches them. Going on with the bundled model, which draws emoji, class smileys instead.$' "$dir/err"

ok "one number of guidance" sample --class food --guidance 2 -o "$dir/g.png"
ok "what cannot is said" grep -q "^scale .: --guidance 1, not 2" "$dir/err"
ok "the same by hand" sample --class food --guidance 1,2,1 -o "$dir/h.png"
# ---- what a picture tells ----
cp -r models/emoji "$dir/own" && cp models/emoji/example.png "$dir/mine.png"
ok "a model elsewhere" "$build/sample" "$dir/own//" -n 1 --best-of 1 -o "$dir/p.png"
ok "a picture elsewhere" "$build/inpaint" "$dir/own" "$dir/mine.png" --half upper --candidates 1 -o "$dir/q.png"
for picture in p q; do
    ok "the model's name is in $picture" grep -aq "own" "$dir/$picture.png"
    ok "the name alone ($picture)" test "$(tr '\000' '\n' <"$dir/$picture.png" | grep -ac '^own/')" -eq 0
    ok "no folder is in $picture" test "$(grep -ac "$dir" "$dir/$picture.png")" -eq 0
done

# ---- masks, and pictures prepared as the model's are ----
printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000@\000\000\000@\001\003\000\000\000\220\247\343\235\000\000\000\006PLTE\377\377\377\377\377\377U|\365l\000\000\000\002tRNS\377\000\345\2670J\000\000\000\025IDATx\332c\140\030d\340?\020\2142p3\006\031\000\000y\260\177\201\206F\375\023\000\000\000\000IEND\256B\140\202' >"$dir/hole.png" # white, with a transparent 32x32
edit() { "$build/inpaint" "$@" --class food --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/e.png"; }
ok "a transparent hole" edit emoji models/emoji/example.png --mask "$dir/hole.png"
ok "is said and drawn" test "$(grep -cE 'hole.png: its transparent parts are drawn anew|16 of 64 tokens' "$dir/err")" -eq 2
ok "the rest stays" "$build/pictures" same "$dir/e.png" models/emoji/example.png 32 0 64 64
ok "the opposite" edit emoji models/emoji/example.png --mask "$dir/hole.png" --invert
ok "of it" "$build/pictures" same "$dir/e.png" models/emoji/example.png 0 16 32 48
printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000@\000\000\000@\001\003\000\000\000\220\247\343\235\000\000\000\006PLTE\000\000\000\377\377\377\245\331\237\335\000\000\000\001tRNS\000@\346\330f\000\000\000\036IDATx\332c\140\260\140\200\002j\063\330\377\203\301\007,\014\332Y:\314\134\070\350\031\000\202\343\066W\025v\062\367\000\000\000\000IEND\256B\140\202' >"$dir/layer.png" # white strokes on a transparent layer
printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000@\000\000\000@\001\003\000\000\000\220\247\343\235\000\000\000\006PLTE\000\000\000\377\377\377\245\331\237\335\000\000\000\036IDATx\332c\140\260\140\200\002j\063\330\377\203\301\007,\014\332Y:\314\134\070\350\031\000\202\343\066W\025v\062\367\000\000\000\000IEND\256B\140\202' >"$dir/black.png" # on black
whole() { "$build/inpaint" emoji models/emoji/example.png --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/e.png" "$@"; }
told="so nothing tells the class: a token is 8x8 pixels here and kept only if"
for mask in layer black; do
    refused_late 1 "^inpaint: the mask keeps no token, $told all of it is light; --invert keeps the other parts, --class names" whole --mask "$dir/$mask.png"
    refused_late 1 "$told its first pixel is light; --invert" whole --mask "$dir/$mask.png" --official-mask
    ok "--invert does" whole --mask "$dir/$mask.png" --invert
    ok "--class does" whole --mask "$dir/$mask.png" --class food
done
refused_late 1 "^inpaint: no token is kept, $told all of it is; keep more, or" whole --outside 4
refused_late 2 "--invert is for --mask" edit emoji models/emoji/example.png --half upper --invert
"$build/pictures" make "$dir/large" 1 100
for prep in folder lsun ffhq none; do
    mkdir "$dir/as-$prep" && cp models/emoji/*.safetensors "$dir/as-$prep"
    case $prep in
    none) change='s/"data\.prep":"folder",/                     /' ;;
    *) change="s/\"data\.prep\":\"folder\"/$(printf '"data.prep":%-8s' "\"$prep\"")/" ;;
    esac
    LC_ALL=C sed -i "$change" "$dir/as-$prep/scale1.safetensors"
    ok "data.prep $prep" edit "$dir/as-$prep" "$dir/large/disc/000.png" --half upper
    cp "$dir/e.png" "$dir/$prep.png"
done
ok "what is not recorded is said" grep -q "at 64x64, scaled as data.prep folder" "$dir/err"
ok "it is so" "$build/pictures" same "$dir/none.png" "$dir/folder.png" 0 32 64 64
ok "lsun scales so too" "$build/pictures" same "$dir/lsun.png" "$dir/folder.png" 0 32 64 64
ok "ffhq does not" sh -c "! '$build/pictures' same '$dir/ffhq.png' '$dir/folder.png' 0 32 64 64"

# ---- --settings draws a picture again, byte by byte ----
again() { # again FILE OPTION...: drawn with these and by --settings alone, it is the same
    file=$1
    shift
    ok "drawn: $*" "$build/sample" -q "$@"
    ok "again: $*" "$build/sample" -q --settings "$file" -o "$dir/again.png"
    ok "the same: $*" cmp "$file" "$dir/again.png"
}
again "$dir/s.png" emoji -n 1 --best-of 2 --seed 3 --first 4 --class food --guidance 2 -o "$dir/s.png"
again "$dir/s/0001.png" emoji -n 2 --best-of 1 --seed 3 --temperature 0.123456789,.5,1 --top-k 9 --weights bf16 --enlarge 2 -o "$dir/s/" --chain "$dir/steps.png" --animate "$dir/film.png"
ok "the second of several" "$build/sample" -q --settings "$dir/s/0002.png" -o "$dir/again.png"
ok "is the same" cmp "$dir/s/0002.png" "$dir/again.png"
again "$dir/s.png" emoji -n 1 --best-of 1 --seed 3 --official-temperature --temperature .5 --no-ema --chain-length 1,2,1 -o "$dir/s.png"
ok "another option comes instead" "$build/sample" --settings "$dir/s.png" --seed=9 -o "$dir/again.png"
ok "it does" grep -q "seed 9$" "$dir/err"
ok "MODEL too" "$build/sample" "$dir/own" -q --settings "$dir/s.png" -o "$dir/again.png"
changed() { LC_ALL=C sed "s/$1\\x00$2/$3\\x00$4/" "$dir/s.png" >"$dir/changed.png"; } # changed KEY TEXT KEY TEXT, of the same lengths
again_changed() { "$build/sample" --settings "$dir/changed.png" -o "$dir/again.png"; }
changed seed '' sexd ''
early "changed.png: its text lacks seed; " again_changed
changed model emoji model ffhq2
early 'changed.png: it was drawn with ffhq2, whose weights are not here; "make ffhq2" fetches them' again_changed
changed model emoji model mines
early 'changed.png: .* a model "mines", and no folder of that name is here' again_changed
for file in steps film; do early "$file.png: it shows the steps" "$build/sample" --settings "$dir/$file.png" -o "$dir/x.png"; done
early "p.png: .* \"own\", and no folder" "$build/sample" --settings "$dir/p.png"
early "q.png: ./inpaint drew it from mine.png" "$build/sample" --settings "$dir/q.png"
early "example.png: nothing in it says" "$build/sample" --settings models/emoji/example.png
early "README.md: not a PNG" "$build/sample" --settings README.md
early "none.png: No such file" "$build/sample" --settings="$dir/no/none.png"
refused_late 2 "is not for --list" "$build/sample" --settings "$dir/s.png" --list
refused_late 2 "needs a value" "$build/sample" --settings

# ---- what is said: three lines, of the processor, of what is drawn, of how long it took; -v more, -q nothing ----
for how in "" -v -q; do
    # shellcheck disable=SC2086
    ok "sample $how" sample -o "$dir/v.png" $how
    cat "$dir/out" "$dir/err" >"$dir/all$how"
    # shellcheck disable=SC2086
    ok "inpaint $how" inpaint --candidates 1 --chain-length 0,0,1 -o "$dir/w.png" $how
    cat "$dir/out" "$dir/err" >"$dir/edit$how"
done
for run in all edit; do
    ok "three lines and where it went ($run)" test "$(grep -vc '^device: ' "$dir/$run")" -eq 4
    ok "which arithmetic ($run)" grep -q '^processor: .*, [0-9]* thread.*; weights in f32, products in f32$' "$dir/$run"
    ok "nothing with -q ($run)" test ! -s "$dir/$run-q"
    ok "passes with -v ($run)" grep -q '^scale 1: [0-9]* tokens in [0-9]* pass' "$dir/$run-v"
    ok "memory with -v ($run)" grep -q '^memory: first stage' "$dir/$run-v"
    ok "no unknown time ($run)" test "$(cat "$dir/$run" "$dir/$run-v" | grep -c '?')" -eq 0
done
ok "what, with which, which seed" grep -q '^drawing 1 picture with emoji, seed 1, ' "$dir/all"
ok "where" grep -qx "$dir/v.png" "$dir/all"
ok "how long" grep -q '^1 picture in [0-9.]* s, seed 1$' "$dir/all"
ok "of an edit" grep -q '^completing example.png with emoji, seed 1: 32 of 64 tokens are drawn anew, class smileys (--class ' "$dir/edit"
ok "its time" grep -q '^1 completion in [0-9.]* s' "$dir/edit"
refused_late 2 "-q and -v: give one" sample -q -v
ok "likely ones" "$build/sample" -n 2 --best-of 2 --chain-length 1 --seed 1 -o "$dir/v.png"
ok "a good number is said" grep -q 'each a likely one of 2, [0-9.]* nats per token (its good ones have 0.8 to 2.2, blind guessing 13.7; less is likelier)' "$dir/err"

# ---- a file for each, enlarged, animated ----
ok "single files" sample -n 2 -o "$dir/single/"
cp "$dir/out" "$dir/said"
ok "two" test "$(ls "$dir/single" | tr '\n' ' ')" = "0001.png 0002.png "
ok "which are said" test "$(tr '\n' ' ' <"$dir/said")" = "$dir/single/0001.png $dir/single/0002.png "
ok "a grid" sample -n 2 -o "$dir/grid.png"
ok "the first alone" sample -n 1 -o "$dir/alone.png"
ok "is the same" "$build/pictures" same "$dir/single/0001.png" "$dir/alone.png" 0 0 64 64
for i in 0 1; do ok "each says which it is" test "$(tr '\000' = <"$dir/single/000$((i + 1)).png" | grep -ac "picture=$i")" -eq 1; done
cp -r "$dir/single" "$dir/before"
ok "more of them" sample -n 1 -o "$dir/single/"
ok "say that there were some" grep -q "pictures up to number 2 already" "$dir/err"
ok "as number 3" "$build/pictures" same "$dir/single/0003.png" "$dir/alone.png" 0 0 64 64
for i in 1 2; do ok "number $i is as it was" cmp "$dir/before/000$i.png" "$dir/single/000$i.png"; done
ok "single files of inpaint" inpaint -n 2 --candidates 1 --chain-length 0,0,1 -o "$dir/edits/"
ok "keep the rest" "$build/pictures" same "$dir/edits/0002.png" models/emoji/example.png 0 32 64 64
refused_late 2 "--compare is for a grid" inpaint --compare -o "$dir/edits/"
early "is a file, expected a folder" sample -o "$dir/grid.png/"
early "-o" sample -o "$dir/nowhere/deep/"
ok "a folder is not left behind" sh -c "! '$build/sample' nothing -o '$dir/unused/' 2>/dev/null && test ! -e '$dir/unused'"
ok "enlarged" sample -n 2 --enlarge 3 -o "$dir/large.png" --chain "$dir/large-chain.png"
png_size() { od -An -j 16 -N 8 -tu1 "$1" | awk '{ print $3 * 256 + $4 "x" $7 * 256 + $8 }'; }
ok "three times as large" test "$(png_size "$dir/large.png") $(png_size "$dir/large-chain.png")" = "390x192 786x390"
refused_late 2 "--enlarge" sample --enlarge 0
refused_late 1 "-o: a picture of .*--enlarge" sample -n 400 --enlarge 64 -o "$dir/x.png"
ok "an animation" sample -n 2 --animate "$dir/film.png" -o "$dir/still.png" --enlarge 2
ok "of an edit" inpaint --animate "$dir/edit-film.png" --candidates 2 --chain-length 0,0,1 -o "$dir/x.png"
ok "its first picture is the last frame" "$build/pictures" same "$dir/edit-film.png" "$dir/x.png" 0 0 64 64
ok "kept pixels are kept in it" "$build/pictures" same "$dir/edit-film.png" models/emoji/example.png 0 32 64 64
early "same file" sample -o "$dir/x.png" --animate "$dir/x.png"
early "--animate" sample -o "$dir/x.png" --animate "$dir/nowhere/x.png"

# ---- outwards ----
ok "extend" "$build/inpaint" emoji models/emoji/example.png --extend 32 --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/wide.png" --no-paste
cp "$dir/err" "$dir/said"
ok "says so" grep -q 'example.png is 64x64: its centre square is used at 32x32, in the middle' "$dir/said"
ok "48 tokens" grep -q '48 of 64 tokens are drawn anew' "$dir/said"
ok "outside" "$build/inpaint" emoji models/emoji/example.png --outside 32 --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/x.png"
ok "keeps the middle" "$build/pictures" same "$dir/x.png" models/emoji/example.png 16 16 48 48
"$build/pictures" make "$dir/small" 1 32
small=$(find "$dir/small" -name '*.png' | head -n 1)
ok "extend what is as large" "$build/inpaint" emoji "$small" --extend 32 --candidates 1 --chain-length 0,0,1 -n 2 --compare -o "$dir/x.png"
ok "no word of its size" test "$(grep -c 'centre square' "$dir/err")" -eq 0
refused_late 1 "--extend 64: the model's pictures have 64" "$build/inpaint" emoji "$small" --extend 64
refused_late 2 "^inpaint: --half and --window: give one of --mask, --half, --window, --outside, --extend" inpaint --window 16
refused_late 2 "^inpaint: --half and --outside and --extend: give one of" inpaint --outside 16 --extend 16
refused_late 2 "^inpaint: give one of" "$build/inpaint" emoji "$small"

# ---- is a picture like what the model has learnt? ----
printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000@\000\000\000@\001\000\000\000\000\202\022Ls\000\000\000\027IDATx\332c`\370\017\205\024\062\250d\014\303\250{\206\224{\000\363\002\377\001\201t\367p\000\000\000\000IEND\256B`\202' >"$dir/chess.png" # a board of 8x8 squares
strange=$dir/chess.png
quick() { "$build/inpaint" emoji "$@" --half upper --candidates 1 --chain-length 0,0,1 --seed 1 -o "$dir/x.png"; }
ok "an emoji" quick models/emoji/example.png
ok "is none" test "$(grep -c unlike "$dir/err")" -eq 0
ok "something else" quick "$strange"
ok "is, in one line" test "$(grep -c 'unlike all that emoji has learnt.* nats per kept token (what it knows has 1.1 to 4.5, ' "$dir/err")" -eq 1
ok "score" "$build/sample" emoji --score models/emoji/example.png "$strange"
cp "$dir/out" "$dir/scores"
ok "why is said in one line" test "$(grep -c "compare by the first number" "$dir/err")" -eq 1
ok "the emoji is likelier" awk -F '\t' 'NR == 2 { a = $2 } NR == 3 { b = $2 } END { exit !(NR == 3 && a < 2 && b > 2 * a) }' "$dir/scores"
ok "a picture that the model draws" sample --class food -o "$dir/drawn.png"
ok "encoded again" "$build/sample" emoji --score "$dir/drawn.png" models/emoji/example.png
cp "$dir/out" "$dir/out.kept" && cp "$dir/err" "$dir/said"
ok "the columns" grep -qx "picture	nats per token	with scale 1	first stage off by	likeliest class" "$dir/out.kept"
ok "is no worse than what it knows" awk -F '\t' 'NR == 2 && $2 > 4.8 { bad = 1 } END { exit bad || NR != 3 }' "$dir/out.kept"
ok "why scale 1 may not" grep -q "compare by the first number: .*encoding a picture again changes many of them" "$dir/said"
ok "without a model" "$build/sample" --score models/emoji/example.png
cp "$dir/out" "$dir/alone"
ok "the same" test "$(sed -n 2p "$dir/alone")" = "$(sed -n 2p "$dir/scores")"
for other in README.md "$dir/no-such.png" models; do
    refused_late 1 "$other" "$build/sample" emoji --score models/emoji/example.png "$other" "$strange"
    ok "no row before it" test ! -s "$dir/out"
done
refused_late 2 "--score which pictures" "$build/sample" --score
ok "a grid" "$build/sample" emoji -n 2 --seed 1 --best-of 1 -o "$dir/grid.png" --chain "$dir/chain.png"
refused_late 1 "grid.png: 2 pictures, .* -o DIR/" "$build/sample" emoji --score "$dir/grid.png"
refused_late 1 "chain.png: the way to pictures, .* -o DIR/" "$build/sample" emoji --score "$dir/chain.png"
ok "a comparison" "$build/inpaint" emoji models/emoji/example.png --half upper --candidates 1 --chain-length 0,0,1 --compare -o "$dir/beside.png"
refused_late 1 "beside.png: several pictures, .* -o DIR/" "$build/sample" emoji --score "$dir/beside.png"

# ---- Names with a line feed and an escape: each is '?' in whatever is said ----
odd=$(printf 'p\ni \033[31mc')
cp models/emoji/example.png "$dir/$odd.png"
for command in "$build/inpaint emoji IN --half upper --candidates 1 --chain-length 0,0,1 -o OUT" "$build/sample emoji --score IN" \
    "$build/sample emoji -v -n 1 --best-of 1 --nearest IN/ -o OUT" "$build/sample emoji -n 1 --best-of 1 -o OUT/" "$build/sample emoji IN" "$build/sample --seed=IN"; do
    set --
    for word in $command; do
        case $word in
        IN/) word="$dir/$odd" ;;
        IN) word="$dir/$odd.png" ;;
        OUT*) word="$dir/$odd${word#OUT}" && [ "${word%/}" != "$word" ] || word="$word-out.png" ;;
        *IN) word="${word%IN}$odd" ;;
        esac
        set -- "$@" "$word"
    done
    mkdir -p "$dir/$odd" && cp models/emoji/example.png "$dir/$odd"
    "$@" >"$dir/said.out" 2>"$dir/said"
    cat "$dir/said.out" >>"$dir/said"
    ok "$command: said printably" printed "$dir/said"
    ok "with the name" grep -q 'p?i ?\[31mc' "$dir/said"
done
ok "which raw text is not" sh -c ". test/lib.sh; printf '%s' '$odd' >'$dir/raw'; ! printed '$dir/raw'"

# ---- The device that the environment names ----
for device in wrong ''; do
    refused_late 2 "^sample: IMAGEBART_DEVICE=$device: expected cpu or cuda" env IMAGEBART_DEVICE="$device" "$build/sample" -n 1 -o "$dir/none.png"
    refused_late 2 "^train: IMAGEBART_DEVICE=$device: expected cpu or cuda" env IMAGEBART_DEVICE="$device" "$build/train" --vqgan --run "$dir/none"
    refused_late 2 "^inpaint: --device wrong: expected" env IMAGEBART_DEVICE="$device" "$build/inpaint" models/emoji/example.png --half upper --device wrong
done

refused_late 2 "unexpected argument" "$build/sample" emoji models/emoji/example.png
for key in 'inpaint_chain_length 0,8,8' 'candidates 16'; do
    for recipe in emoji photos; do ok "$recipe edits well" grep -qx "scale.imagebart.$key" "models/$recipe.txt"; done
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
