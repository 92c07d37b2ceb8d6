#!/bin/sh
# test_guidance.sh BUILD: label dropout in ./train and guidance in ./sample and ./inpaint; moments in bf16; schedules
# from a run's own VQGAN.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh

"$build/pictures" make "$dir/data" 60 20 || exit 1
train() { "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 "$@"; }
losses() { awk -v stage="$2" '$1 == stage { print $2, $3, $4, $5, $7 }' "$dir/$1/log.tsv" | cksum; }
sample() { "$build/sample" "$@" -o "$dir/s.png"; }

# ---- label dropout ----
ok "a first stage" train --run "$dir/run" --vqgan
for run in none half rec; do mkdir "$dir/$run" && cp "$dir/run/vqgan.safetensors" "$dir/$run"; done
for t in 1 2 3; do
    ok "scale $t with label dropout" train --run "$dir/run" --scale $t --label-dropout 0.3
    ok "scale $t without" train --run "$dir/none" --scale $t
done
ok "the file names the label" grep -q '"imagebart.null_class": *"2"' "$dir/run/scale1.safetensors"
ok "only then" sh -c "! grep -q null_class '$dir/none/scale1.safetensors'"
ok "dropout 0" train --run "$dir/half" --scale 1 --label-dropout 0 --threads 1
ok "is none" test "$(losses half scale1)" = "$(losses none scale1)"
ok "dropout changes what is learnt" test "$(losses run scale1)" != "$(losses none scale1)"
ok "the same on one thread" train --run "$dir/half" --scale 2 --label-dropout 0.3 --threads 1
ok "to the bit" cmp "$dir/half/scale2.safetensors" "$dir/run/scale2.safetensors"
sed 's/enc_num_tokens 16/enc_num_tokens 2/' test/tiny.txt >"$dir/full.txt"
rm "$dir"/half/scale1.state*.safetensors
refused_late 1 '"no class" .*raise enc_num_tokens to 3' "$build/train" --config "$dir/full.txt" --data "$dir/data" --run "$dir/half" --scale 1 --label-dropout 0.1
sed 's/input_vocab_size 16/input_vocab_size 2/' test/tiny.txt >"$dir/full.txt"
refused_late 1 '"no class" .*raise input_vocab_size to 3' "$build/train" --config "$dir/full.txt" --data "$dir/data" --run "$dir/half" --scale 3 --label-dropout 0.1
sed '/conditioner_config/d' test/tiny.txt >"$dir/unlabelled.txt"
refused_late 1 "not conditioned on classes" "$build/train" --config "$dir/unlabelled.txt" --data "$dir/data" --run "$dir/half" --scale 3 --label-dropout 0.1
refused_late 2 "label-dropout" train --run "$dir/half" --scale 3 --label-dropout 2

# ---- guidance ----
ok "sample" sample "$dir/run" -n 4 --seed 7
cp "$dir/s.png" "$dir/plain.png"
ok "guidance 1" sample "$dir/run" -n 4 --seed 7 --guidance 1
ok "is none, to the byte" cmp "$dir/s.png" "$dir/plain.png"
ok "guidance 3" sample "$dir/run" -n 4 --seed 7 --guidance 3
cp "$dir/s.png" "$dir/guided.png"
ok "draws others" sh -c "! cmp -s '$dir/s.png' '$dir/plain.png'"
ok "kept in the PNG" grep -q guidance "$dir/s.png"
for how in "--block 1" "--block 64" "--batch 1 --threads 1" "--batch 3"; do
    # shellcheck disable=SC2086
    ok "guided, $how" sample "$dir/run" -n 4 --seed 7 --guidance 3,3,3 $how
    ok "the same file" cmp "$dir/s.png" "$dir/guided.png"
done
ok "a scale at a time" sample "$dir/run" -n 4 --seed 7 --guidance 1,1,2.5
for guidance in 2 2,2,2 1,1,2; do
    refused_late 1 "guidance 2 at scale 1: .*none was trained without" sample "$dir/none" --guidance $guidance
    ok "nothing was said before" test "$(grep -c . "$dir/err")" -eq 1
done
ok "guidance 1 of a model without" sample "$dir/none" -n 1 --guidance 1
refused_late 2 "guidance" sample "$dir/run" --guidance -1
refused_late 2 "guidance" sample "$dir/run" --guidance 1,2
mkdir "$dir/mixed" && cp "$dir"/run/*.safetensors "$dir/mixed" && cp "$dir/none/scale2.safetensors" "$dir/mixed"
ok "one number, of a model that can at some scales" sample "$dir/mixed" -n 2 --guidance 2
ok "the scale that cannot is said" grep -q "scale 2: --guidance 1, not 2" "$dir/err"
ok "that scale unguided" sample "$dir/mixed" -n 2 --guidance 2,1,2
picture=$dir/data/disc/000.png
ok "inpaint" "$build/inpaint" "$dir/run" "$picture" --half upper -n 2 --seed 3 --candidates 2 --guidance 2 -o "$dir/i.png"
cp "$dir/i.png" "$dir/ahead.png"
ok "one by one" "$build/inpaint" "$dir/run" "$picture" --half upper -n 2 --seed 3 --candidates 2 --guidance 2 -o "$dir/i.png" --block 1
ok "the same file" cmp "$dir/i.png" "$dir/ahead.png"
sed 's/^scale1.model/scale.imagebart.guidance 3\nscale1.model/' test/tiny.txt >"$dir/recommends.txt"
for t in 1 2 3; do
    ok "scale $t of a recipe that recommends guidance" "$build/train" --config "$dir/recommends.txt" --data "$dir/data" --run "$dir/rec" --scale $t --label-dropout 0.3
done
ok "which is taken" sample "$dir/rec" -n 4 --seed 7
ok "as if it were given" "$build/pictures" same "$dir/s.png" "$dir/guided.png" 0 0 34 34

# ---- the optimizer's moments in bf16 ----
mean() { awk -v stage="$2" '$1 == stage && $2 > 20 { n++; sum += $3 } END { print n == 10 ? sum / n : "none" }' "$dir/$1/log.tsv"; }
for stage in vqgan scale1; do
    arguments=--vqgan
    [ $stage = vqgan ] || arguments="--scale ${stage#scale}"
    mkdir -p "$dir/float" "$dir/bf16" "$dir/killed"
    # shellcheck disable=SC2086
    ok "$stage with moments in float" train --run "$dir/float" $arguments
    grep -o 'optimizer.*, activations' "$dir/err" >"$dir/floats"
    [ $stage = vqgan ] && cp "$dir/float/vqgan.safetensors" "$dir/kept" # both scales stand on the same first stage
    # shellcheck disable=SC2086
    ok "$stage with moments in bf16" train --run "$dir/bf16" $arguments --bf16-states
    grep -o 'optimizer.*, activations' "$dir/err" >"$dir/halves"
    ok "which the memory plan says" grep -q '^optimizer (in bf16)' "$dir/halves"
    ok "and counts" awk '{ sub(/ \(in bf16\)/, "") } NR == 1 { whole = $2 } NR == 2 { exit !($2 < 0.85 * whole && $2 > 0.5 * whole) }' "$dir/floats" "$dir/halves"
    ok "$stage learns as well" awk "BEGIN { a = $(mean float $stage); b = $(mean bf16 $stage); exit !(a > 0 && b < 1.05 * a && b > 0.95 * a && a != b) }"
    # shellcheck disable=SC2086
    killed_at "$dir/killed/$stage.state.safetensors" "$build/train" --config test/tiny.txt --data "$dir/data" \
        --save-every 5 --run "$dir/killed" $arguments --bf16-states --threads 1
    # shellcheck disable=SC2086
    ok "$stage killed and resumed" train --run "$dir/killed" $arguments --resume
    ok "to the bit" cmp "$dir/killed/$stage.state.safetensors" "$dir/bf16/$stage.state.safetensors"
    for run in float bf16 killed; do cp "$dir/kept" "$dir/$run/vqgan.safetensors"; done
done

# ---- a schedule from the run's own first stage ----
schedule() { train --run "$dir/run" --schedule psim "$@"; }
betas() { # betas FILE: T of them in (0,1], the last is 1
    awk '$1 ~ /^[0-9]+$/ && NF == 3 { n++; last = $2; if (!($2 > 0 && $2 <= 1)) bad = 1 } END { exit !(n == 3 && last == 1 && !bad) }' "$1"
}
ok "a schedule" schedule
cp "$dir/out" "$dir/said" && cp "$dir/run/psim.txt" "$dir/psim.txt"
ok "three betas" betas "$dir/said"
ok "which the check can refuse" sh -c "! printf '1 0.5 0.5\n2 0.5 0.2\n3 0.9 0.1\n' | awk '{ last = \$2 } END { exit !(last == 1) }'"
ok "a curve from 1 to 0 that rises" awk '!/^#/ { n++; if (n == 1 && ($1 != 1 || $2 != 0)) bad = 1; if (n > 1 && !($1 < a && $2 > m)) bad = 1; a = $1; m = $2 }
    END { exit !(n >= 10 && a == 0 && !bad) }' "$dir/psim.txt"
ok "what it is" grep -q '^# .*training pictures of .*, seed 23; ' "$dir/psim.txt"
ok "on one thread" schedule --threads 1
ok "the same" cmp "$dir/run/psim.txt" "$dir/psim.txt"
ok "another seed" schedule --seed 24
ok "another noise" sh -c "! cmp -s '$dir/run/psim.txt' '$dir/psim.txt'"
line=$(tail -n 1 "$dir/said")
ok "the recipe's line" test "$line" = "scale.model.params.redraw_prob curve:$dir/run/psim.txt"
cp "$dir/psim.txt" "$dir/run/psim.txt"
{ grep -v redraw_prob test/tiny.txt && echo "$line"; } >"$dir/curved.txt"
rm "$dir"/half/scale2.state*.safetensors
ok "which trains" "$build/train" --config "$dir/curved.txt" --data "$dir/data" --run "$dir/half" --scale 2 --steps 2
refused_late 2 "expected psim" train --run "$dir/run" --schedule cosine
refused_late 2 "one of" train --run "$dir/run" --schedule psim --scale 1
refused_late 1 "no first stage" train nothing --run "$dir/empty" --schedule psim
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
