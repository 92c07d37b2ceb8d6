#!/bin/sh
# test_programs.sh BUILD: the three programs as a user runs them: train a tiny model from a folder of pictures, kill and
# resume it, sample and inpaint with it, and everything that can be asked wrongly.
build=$(cd "$1" && pwd)
here=$(pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh

refused() { # refused STATUS WORD COMMAND...: exit status, one clear line on stderr that holds WORD, and no crash
    status=$1 word=$2
    shift 2
    "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    if [ $got -eq "$status" ] && [ "$(grep -c . "$dir/err")" -eq 1 ] && grep -q -- "$word" "$dir/err"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $*: exit status $got, expected $status and one line with \"$word\"; stderr:"
        head -5 "$dir/err"
    fi
}

falls() { # falls LOG STAGE: the mean loss of the last 10 steps is below that of the first 10
    awk -v stage="$2" '$1 == stage { x[++n] = $3 } END { for (i = 1; i <= 10; i++) { a += x[i]; b += x[n - 10 + i] }
        if (n < 20 || !(b < a)) exit 1 }' "$1"
}

options="--config test/tiny.txt --data $dir/data --save-every 5 --eval-every 10 --picture-every 20"
# shellcheck disable=SC2086
train() { "$build/train" $options "$@"; }

killed() { # killed ARGUMENTS...: starts a run, SIGKILL after its second checkpoint, then resumes it to the end
    stage=$1
    shift
    # shellcheck disable=SC2086
    killed_at "$dir/killed/$stage.state-1.safetensors" "$build/train" $options --run "$dir/killed" "$@"
    train --run "$dir/killed" "$@" --resume
}

"$build/pictures" make "$dir/data" 60 20 || exit 1

# ---- train: every stage learns, survives a kill bit for bit, and does not depend on the number of threads ----
for stage in vqgan scale1 scale2 scale3 joint; do
    case $stage in
        scale*) arguments="--scale ${stage#scale}" ;;
        *) arguments="--$stage" ;;
    esac
    # shellcheck disable=SC2086
    ok "train $stage" train --run "$dir/run" $arguments
    ok "$stage loss falls" falls "$dir/run/log.tsv" $stage
    # shellcheck disable=SC2086
    ok "$stage killed and resumed" killed $stage $arguments --threads 1
    ok "$stage the same weights" cmp "$dir/run/$stage.state.safetensors" "$dir/killed/$stage.state.safetensors"
    ok "$stage the same weights for sampling" cmp "$dir/run/$stage.safetensors" "$dir/killed/$stage.safetensors"
    # shellcheck disable=SC2086
    ok "$stage evaluates" train --run "$dir/run" $arguments --eval
    ok "$stage drew a picture" test -s "$dir/run/$stage-000020.png"
done
ok "the log has every step once" awk '$1 == "scale2" { n[$2]++ } END { for (i = 1; i <= 30; i++) if (n[i] != 1) exit 1 }' "$dir/killed/log.tsv"
ok "no temporary files left by whole runs" sh -c "! ls $dir/run/*.tmp* 2>/dev/null"

mkdir "$dir/tuned" && cp "$dir/run/vqgan.safetensors" "$dir/tuned"
first_loss() { awk '$1 == "scale1" && $2 == 1 { print $3 }' "$1/log.tsv"; }
ok "train from a model's weights" train --run "$dir/tuned" --scale 1 --steps 1 --init "$dir/run"
ok "which start where that model ended" awk "BEGIN { exit !($(first_loss "$dir/tuned") < 0.9 * $(first_loss "$dir/run")) }"
refused 1 "scale2.safetensors" train --run "$dir/tuned" --scale 2 --init "$dir/tuned"
# Tokens whose sizes or labels are not this first stage's and these pictures': the header's h at byte 16, w, K; labels from 64 on
patched() { # patched OFFSET BYTES...: the run's tokens with other bytes there
    rm -rf "$dir/tuned"/*.state* && cp "$dir/run/train.tokens" "$dir/tuned"
    printf "$2" | dd of="$dir/tuned/train.tokens" bs=1 seek="$1" conv=notrunc 2>/dev/null
}
for bytes in '16 \020\0\0\0\0\0\0\0\004' '32 \100'; do # 16x4 for 8x8; 64 values for 16
    patched ${bytes% *} "${bytes#* }"
    ok "tokens of another grid or codebook" train --run "$dir/tuned" --scale 1 --steps 1
    ok "are made anew" cmp "$dir/run/train.tokens" "$dir/tuned/train.tokens"
done
patched 64 '\002'
refused_late 1 "train.tokens: label 0 is 2, the pictures have 2 classes" train --run "$dir/tuned" --scale 1 --steps 1
head -c 100 "$dir/run/train.tokens" >"$dir/tuned/train.tokens"
refused_late 1 "has 100 bytes, its header says .*; without this file it is made anew" train --run "$dir/tuned" --scale 1 --steps 1

# shellcheck disable=SC2086
"$build/train" $options --run "$dir/int" --vqgan --steps 100000 >/dev/null 2>"$dir/int.err" &
pid=$!
while [ ! -f "$dir/int/vqgan.state.safetensors" ] && kill -0 $pid 2>/dev/null; do sleep 0.05; done
kill -INT $pid
wait $pid
ok "an interrupt ends a run cleanly" test $? -eq 0
ok "and says how to go on" grep -q -- --resume "$dir/int.err"

"$build/pictures" make "$dir/two" 2 20
ok "a folder of two pictures: one trains, one is held out" train --data "$dir/two" --run "$dir/pair" --vqgan --steps 2
cp "$dir/err" "$dir/said"
ok "says so" grep -q ' 1 picture (1 held out)' "$dir/said"
ok "which is learnt by heart" grep -q 'fewer than 50 pictures: .*by heart' "$dir/said"

# ---- what a run says of its pictures, its first stage and its numbers ----
told() { grep -q -- "$1" "$dir/told"; }
tell() { train "$@" 2>"$dir/told"; }
sed '/conditioner_config/d; /balance/d; s/xt_start 2/xt_start 1/; s/n_unmasked 2/n_unmasked 1/' test/tiny.txt >"$dir/plain.txt"
ok "classes" tell --run "$dir/tell" --vqgan --steps 1
ok "are said" told "^$dir/data: 2 classes: bar, disc$"
ok "and what a good number is" told "PSNR [0-9.]* dB (20: blurred, 25: fair, 30: good)"
ok "which the log has" awk -F '\t' '$1 == "vqgan" { if ($NF < 1 || $NF > 60) exit 1; n++ } END { exit n != 1 }' "$dir/tell/log.tsv"
ok "a first stage for scales without classes" tell --run "$dir/tell2" --vqgan --steps 1 --config "$dir/plain.txt"
ok "has none, which is said" told "^$dir/data: pictures of 2 sub-folders (bar, disc), which are no classes to this recipe: it has none$"
ok "such a scale" tell --run "$dir/tell2" --scale 1 --steps 1 --config "$dir/plain.txt"
ok "says it too" told "which are no classes to this recipe"
ok "and what guessing is worth" told "hard [0-9.]* soft [0-9.]*; with EMA: .* (uniform guess: ln K = 2.77)$"
tell --run "$dir/typo" --scale 1
ok "the first stage of a run of a mistyped name" test $? -eq 1
ok "is not its own" told "the network writes 16 token values, the first stage has 1024"
ok "but another" told "^first stage: the bundled model's, .*models/emoji/vqgan.safetensors; $dir/typo had none$"
ok "which does not stay there" test ! -e "$dir/typo/vqgan.safetensors"
rm "$dir/tell2/scale1.safetensors"
ok "scale 3" tell --run "$dir/tell2" --scale 3 --steps 1 --config "$dir/plain.txt"
ok "is followed by the one that was begun" told "^next: .*--scale 1 --resume --config"
for seed in 18446744073709551615 9000000000000001 -1; do
    refused 2 "--seed $seed: expected" "$build/train" --vqgan --data "$dir/data" --seed $seed
done
ok "the largest seed" tell --run "$dir/seeded" --vqgan --steps 1 --seed 9000000000000000
ok "is taken as it is" told "seed 9000000000000000$"

# ---- a first stage and its discriminator: warm-up, kill and resume, threads, the official order, features ----
loss=vqgan.model.params.lossconfig.params
gan() { # gan FILE LINE...: a recipe
    file=$dir/$1
    shift
    { cat test/tiny.txt && printf '%s\n' "$loss.disc_num_layers 2" "$loss.disc_ndf 8" "$@"; } >"$file"
}
gan gan.txt "$loss.disc_start 8" "vqgan.train.disc_warm_up 4"
gan in-order.txt "$loss.disc_start 3" "$loss.disc_loss vanilla" "vqgan.train.official_order true" "vqgan.train.disc_warm_up 0" \
    "$loss.perceptual_weight 0.5" "vqgan.lightning.trainer.accumulate_grad_batches 2"
same_tensors() { "$build/pictures" tensors "$@"; }
rm -rf "$dir/killed2" && mv "$dir/killed" "$dir/killed2"
for recipe in gan in-order; do
    rm -rf "$dir/killed"
    ok "$recipe trains" train --run "$dir/$recipe" --vqgan --config "$dir/$recipe.txt"
    cp "$dir/err" "$dir/said"
    ok "$recipe killed and resumed" killed vqgan --vqgan --threads 1 --config "$dir/$recipe.txt"
    for file in vqgan.state.safetensors vqgan.safetensors; do
        ok "$recipe the same $file" cmp "$dir/$recipe/$file" "$dir/killed/$file"
    done
done
ok "no perceptual network, which is said" grep -q "features are matched instead" "$dir/said"
ok "the discriminator begins first, then the generator sees it" awk -F '\t' '$1 == "vqgan" {
    if (($13 > 0) != ($2 > 4) || ($14 != 0) != ($2 > 8) || ($15 > 0) != ($2 > 8) || NF != 22) exit 1; n++ } END { exit n != 30 }' \
    "$dir/gan/log.tsv"
ok "without a warm-up both at once" awk -F '\t' '$1 == "vqgan" && (($13 > 0) != ($2 > 3) || ($15 > 0) != ($2 > 3)) { exit 1 }' \
    "$dir/in-order/log.tsv"
ok "the discriminator is in the state" same_tensors "$dir/gan/vqgan.state.safetensors" value.loss.discriminator. "$dir/gan/vqgan.state.safetensors" value.loss.discriminator.
ok "and not among the weights" sh -c "! grep -q loss.discriminator '$dir/gan/vqgan.safetensors'"
ok "the generator was not told alone" sh -c "! cmp -s '$dir/gan/vqgan.safetensors' '$dir/run/vqgan.safetensors'"
# Adam's first update is lr, its 31st, without a gradient before it, 1.55 lr: (1-b1)/(1-b1^k) / sqrt((1-b2)/(1-b2^k))
for warm_up in 0 1; do
    gan late.txt "$loss.disc_start 30" "vqgan.train.disc_warm_up $warm_up"
    ok "until disc_start" train --run "$dir/late$warm_up" --vqgan --config "$dir/late.txt"
    cp "$dir/late$warm_up/vqgan.state.safetensors" "$dir/before.safetensors"
    ok "a step more" train --run "$dir/late$warm_up" --vqgan --config "$dir/late.txt" --steps 31 --resume
    awk -v moved="$("$build/pictures" moved "$dir/before.safetensors" "$dir/late$warm_up/vqgan.state.safetensors" value.loss.discriminator.main.0.)" \
        '$2 == 31 { print moved / $6 }' "$dir/late$warm_up/log.tsv" >"$dir/step$warm_up"
done
ok "the official Adam counts from step 0" awk '{ exit !($1 > 1.5 && $1 < 1.6) }' "$dir/step0"
ok "ours from where the discriminator begins" awk '{ exit !($1 > 0.1 && $1 < 1.45) }' "$dir/step1"
gan usual.txt "$loss.disc_start 0"
gan after.txt "$loss.disc_start 0" "vqgan.train.official_order true"
gan still.txt "$loss.disc_start 0" && sed 's/lr_start .*/lr_start 0/' "$dir/still.txt" >"$dir/still2.txt"
ok "a step" train --run "$dir/usual" --vqgan --config "$dir/usual.txt" --steps 1
ok "a step in the official order" train --run "$dir/after" --vqgan --config "$dir/after.txt" --steps 1
ok "moves the first stage alike" same_tensors "$dir/usual/vqgan.safetensors" "" "$dir/after/vqgan.safetensors" ""
ok "the moved one" train --run "$dir/still" --vqgan --config "$dir/still2.txt" --init "$dir/after" --steps 20 --save-every 1
judged() { awk -F '\t' '$2 == 1 { print $13 }' "$dir/$1/log.tsv"; }
ok "is what the discriminator judges then" test "$(judged after)" = "$(judged still)"
ok "and not the one before" test "$(judged usual)" != "$(judged after)"
gan frozen.txt "$loss.disc_start 0" "vqgan.train.freeze_encoder true"
ok "train a decoder alone" train --run "$dir/frozen" --vqgan --config "$dir/frozen.txt" --init "$dir/run" --steps 12
for part in encoder. quant_conv. quantize.; do
    ok "$part stays" same_tensors "$dir/run/vqgan.safetensors" $part "$dir/frozen/vqgan.safetensors" $part
done
for part in decoder. post_quant_conv.; do
    ok "$part does not" sh -c "! '$build/pictures' tensors '$dir/run/vqgan.safetensors' $part '$dir/frozen/vqgan.safetensors' $part"
done
refused 1 "freeze_encoder true: .* --init" train --run "$dir/random" --all --config "$dir/frozen.txt"
ok "a file to start from is a first stage's" train --run "$dir/begun" --all --config "$dir/frozen.txt" --init "$dir/run/vqgan.safetensors" --steps 1
ok "tokens of it" train --run "$dir/frozen" --scale 1 --steps 1
ok "are the same" cmp -i 64 "$dir/run/train.tokens" "$dir/frozen/train.tokens"
{ sed 's/^/vqgan./' test/golden-cases/vqgan_gan/config.txt && echo vqgan.train.steps 1 &&
    printf 'vqgan.model.params.scheduler_config.params.%s\n' 'lr_start 0' 'warm_up_steps 10'; } >"$dir/taken.txt"
ok "train from an official checkpoint" train --run "$dir/taken" --vqgan --config "$dir/taken.txt" --init test/golden-cases/vqgan_gan/model.safetensors --batch 2
for part in loss.discriminator.main.2. decoder.; do
    ok "$part is from there" same_tensors test/golden-cases/vqgan_gan/model.safetensors $part "$dir/taken/vqgan.state.safetensors" value.$part
done
gan wrong.txt "$loss.disc_start 0" "$loss.disc_conditional true"
refused 1 "disc_conditional true" train --run "$dir/wrong" --vqgan --config "$dir/wrong.txt"
gan wrong.txt "$loss.disc_start 0" "$loss.disc_loss wasserstein"
refused 1 "hinge or vanilla" train --run "$dir/wrong" --vqgan --config "$dir/wrong.txt"
{ cat test/tiny.txt && echo "$loss.disc_start 0"; } >"$dir/wrong.txt" # three layers on 16 pixels
refused 1 "smaller disc_num_layers" train --run "$dir/wrong" --vqgan --config "$dir/wrong.txt"
rm -rf "$dir/killed" && mv "$dir/killed2" "$dir/killed"

# ---- data as it lies on disk ----
cp -r "$dir/data" "$dir/worn" && : >"$dir/worn/bar/001.png" && head -c 90 "$dir/data/bar/003.png" >"$dir/worn/bar/003.png"
echo '<html>404</html>' >"$dir/worn/disc/000.png" && echo >"$dir/worn/disc/002.png"
ok "train on damaged pictures" train --data "$dir/worn" --run "$dir/wornrun" --vqgan
cp "$dir/err" "$dir/said"
ok "which says how many" grep -q "^damaged pictures skipped: 3; $dir/wornrun/skipped.txt lists them" "$dir/said"
ok "and lists them" test "$(cut -f 1 "$dir/wornrun/skipped.txt" | sed 's/.*worn.//' | tr '\n' ' ')" = "bar/001.png bar/003.png disc/002.png "
ok "a file of another kind is left out" grep -q "worn: left out: 1 HTML file (such as disc/000.png)" "$dir/said"
ok "and why" grep -q "bar/003.png$(printf '\t')damaged PNG: the file is cut short" "$dir/wornrun/skipped.txt"
rm -rf "$dir/killed2" && mv "$dir/killed" "$dir/killed2"
ok "killed and resumed with damaged pictures" killed vqgan --vqgan --threads 1 --data "$dir/worn"
ok "the same weights" cmp "$dir/wornrun/vqgan.state.safetensors" "$dir/killed/vqgan.state.safetensors"
ok "the same list" cmp "$dir/wornrun/skipped.txt" "$dir/killed/skipped.txt"
rm -rf "$dir/killed" && mv "$dir/killed2" "$dir/killed"
printf 'lmdb/z\tis a GIF file; PNG, JPEG or WebP expected\n' >>"$dir/wornrun/skipped.txt" # known only once it is read
ok "tokens without them" train --data "$dir/worn" --run "$dir/wornrun" --scale 1 --steps 2
cp "$dir/err" "$dir/said"
ok "and what was no picture" grep -q "^left out: 1 GIF file (such as lmdb/z); $dir/wornrun/skipped.txt lists them" "$dir/said"
ok "and how many there are" grep -q "^damaged pictures skipped: 3" "$dir/said"
"$build/pictures" make "$dir/lots" 1200 16
mkdir "$dir/cut" "$dir/whole" && cp "$dir/run/vqgan.safetensors" "$dir/cut" && cp "$dir/run/vqgan.safetensors" "$dir/whole"
ok "encode many pictures" train --data "$dir/lots" --run "$dir/whole" --scale 1 --steps 1
# shellcheck disable=SC2086
"$build/train" $options --data "$dir/lots" --run "$dir/cut" --scale 1 --steps 1 >/dev/null 2>&1 &
pid=$!
while [ "$(stat -c %s "$dir/cut/train.tokens.part" 2>/dev/null || echo 0)" -lt 20000 ] && kill -0 $pid 2>/dev/null; do :; done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "a kill while encoding leaves a part" test -s "$dir/cut/train.tokens.part"
ok "which the next run" train --data "$dir/lots" --run "$dir/cut" --scale 1 --steps 1
cp "$dir/err" "$dir/said"
ok "goes on from" grep -q 'train.tokens.part: continuing after [1-9][0-9]* pictures' "$dir/said"
ok "to the same tokens" cmp "$dir/cut/train.tokens" "$dir/whole/train.tokens"
ok "and removes" sh -c "! ls $dir/cut/*.part 2>/dev/null"
(cd "$dir/data" && ls disc/0[0-3]*.png bar/0[0-3]*.png) >"$dir/list.txt"
(cd "$dir/data" && ls disc/05*.png bar/05*.png) >"$dir/val.txt"
ok "train on lists" train --run "$dir/listed" --vqgan --steps 2 --list "$dir/list.txt" --val-list "$dir/val.txt"
cp "$dir/err" "$dir/said"
ok "which are the split" grep -q ' 40 pictures (10 held out)' "$dir/said"
echo nowhere.png >>"$dir/val.txt"
refused 1 "val.txt: line 11: no picture at" train --run "$dir/l2" --vqgan --list "$dir/list.txt" --val-list "$dir/val.txt"
refused 2 "goes with --list" train --run "$dir/l2" --vqgan --val-list "$dir/val.txt"
ok "one command: every stage, then samples" train --all --run "$dir/all" --steps 20
ok "are there" test -s "$dir/all/samples.png"
cp "$dir/all/scale3.state.safetensors" "$dir/state"
ok "once more: nothing left to train" train --all --run "$dir/all" --steps 20
ok "the same weights" cmp "$dir/state" "$dir/all/scale3.state.safetensors"
ok "the recipe for photographs needs no classes" sh -c "mkdir '$dir/flat' && cp '$dir'/data/*/*.png '$dir/flat' && '$build/train' photos --all --data '$dir/flat' --run '$dir/photos' --steps 1 --batch 1"
ok "and its samples are there" test -s "$dir/photos/samples.png"

# ---- the codes in use, and a first stage that numbers only those ----
columns() { head -n 1 "$dir/run/log.tsv" | tr '\t' '\n'; }
column() { columns | grep -nx "$1" | cut -d : -f 1; } # column NAME: its number in the log
c=$(column codes) l=$(column lpips) all=$(columns | wc -l)
code_columns() { cut -f "2,$c,$(column perplexity),$(column val_codes),$(column val_perplexity)" "$1/log.tsv"; } # of every step
ok "the log says how many codes are in use" awk -F '\t' -v c="$c" '$1 == "vqgan" && $2 == 20 { if (!($c > 0 && $(c + 1) >= 1 && $(c + 1) <= $c + 1e-4 && $(c + 2) > 0 && $(c + 3) >= 1 && $(c + 3) <= $(c + 2) + 1e-4)) exit 1; n++ } END { exit n != 1 }' "$dir/run/log.tsv"
ok "and at other steps nothing" awk -F '\t' -v c="$c" -v all="$all" '$1 == "vqgan" && $2 == 21 { if ($c $(c + 1) $(c + 2) $(c + 3) != "" || NF != all) exit 1; n++ } END { exit n != 1 }' "$dir/run/log.tsv"
code_columns "$dir/run" >"$dir/run.codes" && code_columns "$dir/killed" >"$dir/killed.codes"
ok "the same after a kill" cmp "$dir/run.codes" "$dir/killed.codes"
counted() { # counted FILE: the sum of the 16 numbers of its tensor usage
    at=$(head -c 100000 "$1" | grep -ao '"usage":{[^}]*"data_offsets":\[[0-9]*' | grep -o '[0-9]*$')
    od -An -v -tu4 -j $((8 + $(od -An -tu8 -N8 "$1") + at)) -N 64 "$1" | awk '{ for (i = 1; i <= NF; i++) n += $i } END { print n }'
}
ok "codes are counted since the last restart, 6 steps of 4 times 64" test "$(counted "$dir/run/vqgan.state.safetensors")" = 1536
codes() { "$build/codes" "$1/vqgan.safetensors" "$dir/data" "$2"; }
mkdir "$dir/wide" && sed 's/n_embed 16/n_embed 64/; s/_tokens 16/_tokens 64/; s/vocab_size 16/vocab_size 64/' test/tiny.txt >"$dir/wide.txt"
wide() { "$build/train" --config "$dir/wide.txt" --data "$dir/data" --run "$dir/wide" "$@"; }
ok "a first stage of 64 codes" wide --vqgan --steps 30
cp "$dir/wide/vqgan.safetensors" "$dir/plain.safetensors"
ok "what it makes of the pictures" codes "$dir/wide" "$dir/codes-before"
read -r before used dtype <"$dir/out"
ok "remap it" wide --vqgan --remap
cp "$dir/err" "$dir/said"
ok "which says what it did" grep -q "vqgan.safetensors: [0-9]* of 64 codes are in use, perplexity [0-9.]*; tokens number those now$" "$dir/said"
ok "what it makes of them now" codes "$dir/wide" "$dir/codes-after"
read -r K distinct dtype <"$dir/out"
ok "the same to the bit" cmp "$dir/codes-before" "$dir/codes-after"
ok "of as many different tokens, listed as int64" test "$before $used $dtype" = "64 $distinct I64"
ok "of fewer values" test "$K" -lt 64
ok "of which mirrored pictures may need more" test "$K" -ge "$distinct"
cp "$dir/wide/vqgan.safetensors" "$dir/remapped.safetensors"
ok "remap it again" wide --vqgan --remap
cp "$dir/err" "$dir/said"
ok "which changes nothing" cmp "$dir/remapped.safetensors" "$dir/wide/vqgan.safetensors"
ok "and says so" grep -q "tokens number those already$" "$dir/said"
for t in 1 2 3; do ok "scale $t on it" wide --scale $t --steps 3; done
ok "is resumed" wide --scale 1 --steps 4 --resume
ok "and samples" "$build/sample" "$dir/wide" -n 2 --seed 1 -o "$dir/s.png"
for i in $(seq 10 79); do mkdir -p "$dir/many/c$i" && cp "$dir/data/bar/001.png" "$dir/many/c$i"; done # more than codes
mkdir "$dir/wide2" && cp "$dir/remapped.safetensors" "$dir/wide2/vqgan.safetensors"
ok "70 classes, and none of them" "$build/train" --config "$dir/wide.txt" --data "$dir/many" --run "$dir/wide2" --scale 1 --steps 1 --label-dropout 0.1
ok "remap it once more" wide --vqgan --remap
cp "$dir/err" "$dir/said"
ok "is in no time, once there are transitions" sh -c "grep -q 'tokens number $K of 64 codes already, and transitions' '$dir/said' && ! grep -q encoding '$dir/said'"
cp "$dir/plain.safetensors" "$dir/wide/vqgan.safetensors"
refused_late 1 "scale1.state.safetensors: trained on the tokens as they are" wide --vqgan --remap
ok "and leaves it alone" cmp "$dir/plain.safetensors" "$dir/wide/vqgan.safetensors"
refused_late 1 "the network writes $K token values, the first stage has 64" wide --scale 1 --steps 5 --resume
ok "train and remap in one command" train --run "$dir/remap2" --vqgan --steps 3 --remap
ok "remaps at the end" sh -c "$build/codes $dir/remap2/vqgan.safetensors $dir/data $dir/codes-before | grep -q 'I64$'"
refused 2 "goes with --vqgan" train --scale 1 --remap

# ---- the perceptual loss, with weights of the real shapes ----
"$build/lpips" make "$dir/lpips.safetensors" || exit 1
ok "train with LPIPS" train --run "$dir/seen" --vqgan --steps 4 --batch 2 --perceptual "$dir/lpips.safetensors"
cp "$dir/err" "$dir/said"
ok "which says so" grep -q "^perceptual loss: LPIPS, weight 1$" "$dir/said"
ok "and from what" grep -q "^$dir/lpips.safetensors: weights of LPIPS$" "$dir/said"
ok "and logs it" awk -F '\t' -v l="$l" '$1 == "vqgan" { if (!($l > 0) || ($2 == 4 && !($(l + 1) > 0))) exit 1; n++ } END { exit n != 4 }' "$dir/seen/log.tsv"
ok "killed and resumed, which remembers the weights" sh -c "'$build/train' $options --run '$dir/seen2' --vqgan --steps 4 --batch 2 --threads 1 --perceptual '$dir/lpips.safetensors' --save-every 2 & p=\$!; while [ ! -f '$dir/seen2/vqgan.state.safetensors' ] && kill -0 \$p; do sleep 0.05; done; kill -9 \$p; wait \$p; '$build/train' $options --run '$dir/seen2' --vqgan --steps 4 --batch 2 --resume"
ok "the same weights" cmp "$dir/seen/vqgan.safetensors" "$dir/seen2/vqgan.safetensors"
ok "two micro batches of one" train --run "$dir/seen3" --vqgan --steps 4 --batch 1 --accumulate 2 --perceptual "$dir/lpips.safetensors"
ok "learn as one of two" awk -F '\t' -v l="$l" '$1 == "vqgan" && NR == FNR { a[$2] = $l; next } $1 == "vqgan" { d = $l / a[$2] - 1; if (d * d > 1e-6) exit 1; n++ } END { exit n != 4 }' "$dir/seen/log.tsv" "$dir/seen3/log.tsv"
ok "it changes what is learnt" train --run "$dir/blind" --vqgan --steps 4 --batch 2
ok "indeed" sh -c "! cmp -s $dir/seen/vqgan.safetensors $dir/blind/vqgan.safetensors"
sed 's/^vqgan.data/vqgan.model.params.lossconfig.target taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator\n&/' test/tiny.txt >"$dir/lossy.txt"
lossy() { "$build/train" --config "$dir/lossy.txt" --data "$dir/data" --run "$dir/lossy" --vqgan --steps 1 "$@"; }
if [ -e models/lpips ]; then
    echo "SKIP a recipe that wants LPIPS without its weights: models/lpips is there"
else
    ok "a recipe that wants it, without weights" lossy
    cp "$dir/err" "$dir/said"
    ok "says so in one line" test "$(grep -c '^perceptual loss: trained without it: there are no weights in models/lpips;' "$dir/said")" = 1
    ok "stays without when it goes on" lossy --steps 2 --resume
    cp "$dir/err" "$dir/said"
    ok "and says so again" grep -q '^perceptual loss: trained without it, as the run began$' "$dir/said"
    rm -r "$dir/lossy"
fi
ok "unless none are wanted" lossy --perceptual none
cp "$dir/err" "$dir/said"
ok "then not a word" sh -c "! grep -q perceptual '$dir/said'"
rm -r "$dir/lossy"
echo "vqgan.model.params.lossconfig.params.perceptual_weight 0.25" >>"$dir/lossy.txt"
ok "the official weight" lossy --perceptual "$dir/lpips.safetensors"
cp "$dir/err" "$dir/said"
ok "is used" grep -q "^perceptual loss: LPIPS, weight 0.25$" "$dir/said"
rm -r "$dir/lossy"
head -c 30000000 "$dir/lpips.safetensors" >"$dir/cut.safetensors"
refused 1 "cut.safetensors" lossy --perceptual "$dir/cut.safetensors"
refused 1 "run/vqgan.safetensors: no tensor 'net.slice1.0.weight' (or 'features.0.weight') there" lossy --perceptual "$dir/run/vqgan.safetensors"
refused 1 "nowhere.pth" lossy --perceptual "$dir/nowhere.pth"
refused 1 "expected one or two files" lossy --perceptual "a,b,c"
refused 2 "goes with --vqgan" train --scale 1 --perceptual "$dir/lpips.safetensors"
refused 2 "goes with --perceptual" train --convert-perceptual "$dir/x.safetensors"
rm "$dir/cut.safetensors"

# ---- sample ----
sample() { "$build/sample" "$@" -o "$dir/s.png"; }
ok "sample a run" sample "$dir/run" -n 5 --seed 7 --chain "$dir/chain.png"
cp "$dir/s.png" "$dir/first.png"
ok "sample again" sample "$dir/run" -n 5 --seed 7 --batch 2 --threads 1
ok "same seed, same file, any batch and threads" cmp "$dir/s.png" "$dir/first.png"
for block in 1 2 64; do
    ok "in blocks of $block" sample "$dir/run" -n 5 --seed 7 --block $block -v
    cp "$dir/err" "$dir/said"
    ok "the same file again" cmp "$dir/s.png" "$dir/first.png"
done
ok "sample says what a scale took" grep -q '^scale 1: [0-9]* tokens in [0-9]* passes, [0-9.]* in each, over [0-9]* positions; [0-9]*% of the drawn ones were as guessed$' "$dir/said"
ok "another seed" sample "$dir/run" -n 5 --seed 8
ok "the largest seed" sample "$dir/run" -n 1 --seed 18446744073709551615
ok "is said" grep -q "seed 18446744073709551615$" "$dir/err"
cp "$dir/s.png" "$dir/last.png"
ok "again" sample "$dir/run" -n 1 --seed 18446744073709551615
ok "is no new one" cmp "$dir/s.png" "$dir/last.png"
ok "another picture" sh -c "! cmp -s $dir/s.png $dir/first.png"
ok "the seed is kept in the PNG" grep -q seed "$dir/first.png"
ok "by class name" sample "$dir/run" -n 1 --class disc --temperature 1,0.9,0.8 --top-k 3
ok "by class number" sample "$dir/run" -n 1 --class 1 --official-temperature
mkdir -p "$dir/near/train" "$dir/near/val"
for seed in 7 8 9; do ok "a picture to find" sample "$dir/run" -n 1 --seed $seed && cp "$dir/s.png" "$dir/near/train/$seed.png"; done
cp "$dir/s.png" "$dir/near/val"
ok "the likely ones of many" sample "$dir/run" -n 5 --seed 7 --best-of 3 --chain "$dir/chain.png"
cp "$dir/s.png" "$dir/likely.png"
cp "$dir/chain.png" "$dir/likely-chain.png"
ok "are others" sh -c "! cmp -s '$dir/likely.png' '$dir/first.png'"
ok "likely ones again" sample "$dir/run" -n 5 --seed 7 --best-of 3 --batch 3 --threads 1 --chain "$dir/chain.png"
ok "do not depend on batch and threads" cmp "$dir/s.png" "$dir/likely.png"
ok "nor does their chain" cmp "$dir/chain.png" "$dir/likely-chain.png"
ok "one of one" sample "$dir/run" -n 5 --seed 7 --best-of 1
ok "is what it was" cmp "$dir/s.png" "$dir/first.png"
ok "more than a batch for each" sample "$dir/run" -n 1 --batch 2 --best-of 5
refused 2 "expected 1 to 64" "$build/sample" "$dir/run" --best-of 65
printf 'GIF89a.' >"$dir/near/moving.png"
ok "what is nearest" sample "$dir/run" -n 1 --seed 8 --nearest "$dir/near"
cp "$dir/out" "$dir/nearest"
ok "and what is left out" grep -q "near: left out: 1 GIF file (such as moving.png)" "$dir/err"
ok "is the picture itself, but for its 8 bits" awk -F'\t' '$1 == 0 && $4 < 0.003 && $5 ~ /train.8.png$/ { found = 1 } END { exit !found }' "$dir/nearest"
refused_late 1 "nowhere" sample "$dir/run" -n 1 --nearest "$dir/nowhere"
ok "shown in a terminal" sample "$dir/run" -n 1 --show
cp "$dir/out" "$dir/shown"
ok "as half blocks" grep -q '38;2;' "$dir/shown"
mkdir "$dir/official" && cp test/tiny.txt "$dir/official/config.txt"
ok "the run as official .ckpt files" "$build/test_ckpt" --official "$dir/run" "$dir/official"
ok "which sample" sample "$dir/official" -n 2 --class 1 --seed 7
cp "$dir/s.png" "$dir/official.png"
ok "as ours do" sample "$dir/run" -n 2 --class 1 --seed 7
ok "the same picture" "$build/pictures" same "$dir/s.png" "$dir/official.png" 0 0 34 16
# The same as a converter to safetensors leaves it: no metadata; names as wrappers of the network make them
for wrap in "" module. _orig_mod. +_orig_mod.; do
    rm -rf "$dir/plain" && mkdir "$dir/plain" && cp test/tiny.txt "$dir/plain/config.txt"
    ok "the run as a plain converter leaves it" "$build/test_ckpt" --plain "$dir/run" "$dir/plain" "$wrap"
    ok "which samples" sample "$dir/plain" -n 2 --class 1 --seed 7
    cp "$dir/err" "$dir/said"
    ok "the same picture" "$build/pictures" same "$dir/s.png" "$dir/official.png" 0 0 34 16
    ok "what was left out of names is said once" test "$(grep 'as wrappers of a network add them' "$dir/said" | wc -l)" -eq "$([ -n "$wrap" ] && echo 1 || echo 0)"
done
rm "$dir/plain/config.txt"
refused 1 "plain: its files do not say their architecture.*config.txt" sample "$dir/plain" -n 2 --class 1
mkdir "$dir/converted" "$dir/half"
ok "converted to safetensors" "$build/sample" "$dir/official" --convert "$dir/converted"
ok "which sample" sample "$dir/converted" -n 2 --class 1 --seed 7
ok "the same picture again" "$build/pictures" same "$dir/s.png" "$dir/official.png" 0 0 34 16
ok "converted to half the size" "$build/sample" "$dir/official" --convert "$dir/half" --store bf16
ok "which sample" sample "$dir/half" -n 2 --class 1 --seed 7
ok "a model of bf16, unpacked" sample "$dir/half" -n 4 --seed 7
cp "$dir/s.png" "$dir/unpacked.png"
ok "the same, used where it lies" sample "$dir/half" -n 4 --seed 7 --weights bf16
ok "the same tokens, decoded in bf16" "$build/pictures" near "$dir/s.png" "$dir/unpacked.png" 12
ok "kept in the PNG" grep -q bf16 "$dir/s.png"
ok "a model of f32 packed to bf16" sample "$dir/converted" -n 1 --weights bf16
ok "a model of f32 packed to int8" sample "$dir/converted" -n 1 --weights int8
ok "an official file packed to int8" sample "$dir/official" -n 1 --weights int8
refused 2 "expected f32, bf16x3, bf16 or int8" "$build/sample" "$dir/half" --weights f16
refused 1 "has a model already" "$build/sample" "$dir/official" --convert "$dir/half"
refused 1 "cannot make" "$build/sample" "$dir/official" --convert "$dir/nowhere/below"
refused 1 "is a file, expected a folder" "$build/sample" "$dir/official" --convert "$dir/official/config.txt"
ok "into a folder that is made" "$build/sample" "$dir/official" --convert "$dir/made/"
ok "the same" cmp "$dir/made/scale1.safetensors" "$dir/converted/scale1.safetensors"
refused 2 "f32, f16 or bf16" "$build/sample" "$dir/official" --convert "$dir/nowhere" --store int8
refused 1 "not installed" "$build/sample" ffhq --convert "$dir/nowhere"
ok "without the moving average" sample "$dir/official" -n 1 --class 1 --no-ema
echo "scale.imagebart.class_list names.txt" >>"$dir/official/config.txt" # as models/imagenet.txt has it
printf '# two\nn00000001 disc, round thing\nn00000002 bar\n' >"$dir/official/names.txt"
mkdir "$dir/named"
ok "a list of classes" sample "$dir/official" -n 1 --class n00000001
cp "$dir/err" "$dir/said"
ok "which says what it took" grep -q 'class 0: disc$' "$dir/said"
ok "goes along when converted" "$build/sample" "$dir/official" --convert "$dir/named"
ok "names and all" sample "$dir/named" -n 1 --class "Round THING"
refused 1 "n00000001 disc, 1 n00000002 bar" sample "$dir/named" -n 1 --class square
ok "inpaint knows it too" "$build/inpaint" "$dir/named" "$dir/data/disc/000.png" --half upper -n 1 --class round -o "$dir/i.png"
cp "$dir/err" "$dir/said"
ok "and says so" grep -q ', class disc$' "$dir/said"
rm "$dir/official/names.txt"
refused 1 "official/names.txt: No such file" sample "$dir/official" -n 1 --class 1
sed -i '/class_list/d' "$dir/official/config.txt"
# A picture that the levels do not divide is drawn smaller, as officially: 17 as 16.
rm -rf "$dir/odd" && cp -r "$dir/named" "$dir/odd" && rm "$dir"/odd/scale1.*
LC_ALL=C sed -i 's/\(ddconfig.resolution":"\)16/\117/' "$dir/odd/vqgan.safetensors"
sed 's/resolution 16/resolution 17/' test/tiny.txt >"$dir/odd.txt"
ok "a resolution that the levels do not divide trains a scale" train --run "$dir/odd" --scale 1 --steps 2 --picture-every 1
ok "draws" sample "$dir/odd" -n 2 --nearest "$dir/data"
ok "edits" "$build/inpaint" "$dir/odd" "$dir/data/disc/000.png" --half upper -n 1 -o "$dir/i.png"
refused 1 "nothing: no such folder or file; --data PATH says" "$build/train" --config test/tiny.txt --run "$dir/none" --vqgan --data "$dir/nothing"
refused 1 "resolution is 17, expected a multiple of 2" train --run "$dir/none" --vqgan --config "$dir/odd.txt"
# One token value; no convolution between levels
sed 's/n_embed 16$/n_embed 1/; s/dec_num_tokens 16/dec_num_tokens 1/; s/params\.vocab_size 16/params.vocab_size 1/' test/tiny.txt >"$dir/one.txt"
sed 's/^vqgan.*ddconfig.ch 32/&\nvqgan.model.params.ddconfig.resamp_with_conv false/' test/tiny.txt >"$dir/pooled.txt"
for recipe in one pooled; do
    ok "$recipe trains" train --run "$dir/$recipe" --vqgan --config "$dir/$recipe.txt" --steps 2
    for t in 1 2 3; do ok "scale $t" train --run "$dir/$recipe" --scale $t --config "$dir/$recipe.txt" --steps 1; done
    ok "$recipe draws" sample "$dir/$recipe" -n 2
    ok "in fewer bits" sample "$dir/$recipe" -n 2 --weights int8 --best-of 2
    ok "and edits" "$build/inpaint" "$dir/$recipe" "$dir/data/disc/000.png" --half upper -n 1 -o "$dir/i.png"
done
# A first stage of other than three channels, as metadata and as a recipe say it: no program opens or trains one.
for channels in "4 3" "3 4" "4 4" "6 6" "1 1" "1 3"; do
    rm -rf "$dir/channels" && cp -r "$dir/named" "$dir/channels"
    changed="s/\(ddconfig.in_channels[ \":]*\)3/\1${channels% *}/; s/\(ddconfig.out_ch[ \":]*\)3/\1${channels#* }/"
    LC_ALL=C sed -i "$changed" "$dir/channels/vqgan.safetensors"
    sed "$changed" test/tiny.txt >"$dir/channels.txt"
    refused 1 "vqgan.safetensors: .*in_channels is ${channels% *} and out_ch ${channels#* }, expected 3 and 3" sample "$dir/channels" -n 4
    refused 1 "expected 3 and 3" "$build/inpaint" "$dir/channels" "$dir/data/disc/000.png" --half upper -o "$dir/i.png"
    refused 1 "expected 3 and 3" train --run "$dir/channels" --scale 1
    refused 1 "expected 3 and 3" train --run "$dir/none" --vqgan --config "$dir/channels.txt"
    refused 1 "expected 3 and 3" train --run "$dir/none" --all --config "$dir/channels.txt"
    cp "$dir/channels.txt" "$dir/official/config.txt"
    refused 1 "official/config.txt: .*expected 3 and 3" sample "$dir/official" -n 4
done
cp test/tiny.txt "$dir/official/config.txt"
sed -i 's/enc_depth 1/enc_depth 2/' "$dir/official/config.txt"
refused 1 "no tensor" sample "$dir/official" -n 2 --class 1
sed -i 's/enc_depth 2/enc_depth 1/; s/ResidualScaledXTransformer/XTransformer/' "$dir/official/config.txt"
refused 1 "unexpected tensor 'transformer.log_scalors'" sample "$dir/official" -n 2 --class 1
rm "$dir/official/config.txt"
refused 1 "config.txt" sample "$dir/official" -n 2 --class 1
mkdir "$dir/foreign" && cp test/tiny.txt "$dir/foreign/config.txt"
foreign() { refused 1 "$1" "$build/sample" "$dir/foreign" -n 1; } # scale1.ckpt is not what its name says
echo '<!DOCTYPE html><html>log in</html>' >"$dir/foreign/scale1.ckpt"
foreign "scale1.ckpt: looks like an HTML or XML page.*fetch the file again"
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:01\n' >"$dir/foreign/scale1.ckpt"
foreign "scale1.ckpt: looks like a git-lfs pointer.*git lfs pull"
head -c 20000 "$dir/official/scale1.ckpt" >"$dir/foreign/scale1.ckpt"
foreign "scale1.ckpt: is a zip archive without an end: it is truncated; fetch it again"
if command -v python3 >/dev/null; then
    (cd "$dir" && python3 -m zipfile -c foreign/scale1.ckpt official/scale1.ckpt)
    foreign "scale1.ckpt: is a zip archive that holds '.*scale1.ckpt': unzip it"
else
    echo "skipped: a whole model's zip as scale1.ckpt: no python3 to make one"
fi
refused 1 "is a file, expected a folder" "$build/sample" "$dir/official/scale1.ckpt"
mkdir -p "$dir/home/models" && cp test/tiny.txt "$dir/home/models/cats.txt" && cp models/ffhq.txt "$dir/home/models"
at_home() { (cd "$dir/home" && "$@"); }
ok "a recipe is told by the tensors" at_home sample "$dir/official" -n 2 --class 1 --seed 7
ok "the same picture once more" "$build/pictures" same "$dir/s.png" "$dir/official.png" 0 0 34 16
sed -i 's/dec_depth 1/dec_depth 2/' "$dir/home/models/cats.txt"
refused 1 "config.txt" at_home sample "$dir/official" -n 2 --class 1
rm "$dir"/run/scale?.safetensors
ok "sample the joint model" sample "$dir/run" -n 2 --seed 1
mkdir -p "$dir/models/churches_3_scales" "$dir/models/cats_3_scales" && touch "$dir/models/cats_3_scales/scale1.ckpt"
for i in 1 2 3; do touch "$dir/models/churches_3_scales/scale$i.ckpt"; done
ok "the list" sh -c "cd $dir && $build/sample --list"
cp "$dir/out" "$dir/list"
ok "says what is here" grep -q '^churches  *here ' "$dir/list"
ok "what is partly here" grep -q '^cats  *partly here, no scale2.ckpt  *LSUN' "$dir/list"
ok "how to get the others" grep -q '^"make ffhq" and so on fetch' "$dir/list"
for model in emoji ffhq ffhq2 churches bedrooms cats imagenet imagenet4; do
    ok "which names $model" grep -q "^$model " "$dir/list"
done

# ---- inpaint: the kept part is the picture's, to the bit ----
picture=$dir/data/disc/000.png
inpaint() { "$build/inpaint" "$dir/killed" "$@" --seed 3 -o "$dir/i.png"; }
"$build/pictures" make "$dir/fit" 2 16
fit=$dir/fit/disc/000.png
ok "inpaint upper half" inpaint "$fit" --half upper -n 1
ok "the lower half is untouched" "$build/pictures" same "$dir/i.png" "$fit" 0 8 16 16
ok "inpaint a window" inpaint "$fit" --window 6 -n 1 --chain-length 1,2,1
ok "its surroundings are untouched" "$build/pictures" same "$dir/i.png" "$fit" 0 0 5 16
ok "inpaint outside" inpaint "$fit" --outside 8 -n 1
ok "the inside is untouched" "$build/pictures" same "$dir/i.png" "$fit" 4 4 12 12
cp "$dir/i.png" "$dir/ahead.png"
ok "one by one" inpaint "$fit" --outside 8 -n 1 --block 1
ok "gives the same file" cmp "$dir/i.png" "$dir/ahead.png"
ok "a mask picture" inpaint "$fit" --mask "$dir/fit/bar/001.png" -n 2
ok "with the original beside it" inpaint "$fit" --window 6 --compare
ok "which comes first" "$build/pictures" same "$dir/i.png" "$dir/i.png" 0 0 52 16
ok "a picture of another size" inpaint "$picture" --half left -n 1
ok "without pasting" inpaint "$fit" --half right -n 1 --no-paste
refused_late 1 "mask" "$build/inpaint" "$dir/killed" "$fit" --mask "$picture"

# ---- what has no weights yet says how it gets them ----
refused 1 'a recipe without weights; "./train photos --all --data DIR" first' "$build/sample" photos
refused 1 "no such folder, and not one of" "$build/sample" imagenet-classes # no recipe
mkdir "$dir/unfinished" && touch "$dir/unfinished/log.tsv"
refused 1 "an unfinished run; ./train RECIPE --all --data DIR --run $dir/unfinished" "$build/sample" "$dir/unfinished"
refused 1 "no first stage there, nor in photos/vqgan.safetensors here; a recipe" "$build/train" photos --scale 1 --data "$dir/two" --run "$dir/none"
refused 1 "nor of the model ffhq (looked in models/ here" "$build/train" ffhq --scale 1 --data "$dir/two" --run "$dir/none"

# ---- wrong usage: exit 2; what is missing or broken: exit 1; always one line ----
cd "$dir" && mkdir empty && echo '<!DOCTYPE html><html>' >page.png && head -c 60 "$fit" >cut.png && : >zero.png
mkdir broken && cp killed/vqgan.safetensors broken/ && head -c 2000 killed/scale1.safetensors >broken/scale1.safetensors
for program in sample train inpaint; do
    refused 2 "unknown option" "$build/$program" --nonsense
    refused 2 "unknown option --sede; did you mean --seed?" "$build/$program" --sede 1
    refused 2 "unknown option --devcie; did you mean --device?" "$build/$program" --devcie=cpu
    refused 2 "unknown option --thread; did you mean --threads?" "$build/$program" --thread 1
    refused 2 "needs a value" "$build/$program" --threads
    refused 2 "whole number" "$build/$program" --threads two
    refused 2 "expected 0 to" "$build/$program" --threads 99999999
    ok "$program -h" "$build/$program" -h
done
refused 2 "whole number" "$build/sample" killed -n -1
for program in sample inpaint train; do
    refused 1 "$program: a stack of 64 KiB (ulimit -s), expected at least" sh -c "ulimit -s 64 && exec '$build/$program' -h"
done
ok "a small stack that may grow does" sh -c "ulimit -S -s 64 && exec '$build/sample' '$dir/named' -n 2 -o '$dir/s.png'"
refused 2 "expected 1 to" "$build/sample" killed -n 0
refused 2 "expected 0 to 64" "$build/sample" killed --block 65
refused 2 "whole number" "$build/sample" killed --seed 1e99
refused 2 "temperature" "$build/sample" killed --temperature nan
refused 2 "temperature" "$build/sample" killed --temperature 1,2
refused 2 "top-k" "$build/sample" killed --top-k -3
refused 2 "unexpected argument" "$build/sample" killed extra
refused 1 "no such folder" "$build/sample" nothing-here
command -v nvidia-smi >/dev/null || refused 1 "device cuda" "$build/sample" killed --device cuda
refused 2 "expected cpu or cuda" "$build/sample" killed --device tpu
refused 1 "vqgan.safetensors" "$build/sample" empty
refused 1 "scale1.safetensors" "$build/sample" broken
refused_late 1 "class" "$build/sample" killed --class dragon
refused_late 1 "No space left" "$build/sample" killed -n 1 --seed 1 -o /dev/full
refused_late 1 "no/such" "$build/sample" killed -n 1 --seed 1 -o no/such/folder.png
refused 2 "one of" "$build/train" --scale 1 --vqgan
refused 2 "one of" "$build/train"
refused 1 "recipe" "$build/train" nothing --vqgan
refused 1 "scales 1 to 3" "$build/train" --config "$here/test/tiny.txt" --scale 9 --data data --run r1
refused 1 "empty" "$build/train" --config "$here/test/tiny.txt" --vqgan --data empty --run r2
refused 1 "missing" "$build/train" --config "$here/test/tiny.txt" --vqgan --data missing --run r3
refused 1 "exists" "$build/train" --config "$here/test/tiny.txt" --vqgan --data data --run killed
refused 2 "which picture" "$build/inpaint"
refused 2 "one of" "$build/inpaint" killed "$fit"
refused 2 "upper, lower" "$build/inpaint" killed "$fit" --half middle
refused_late 1 "page.png" "$build/inpaint" killed page.png --half upper
refused_late 1 "cut.png" "$build/inpaint" killed cut.png --half upper
refused_late 1 "zero.png" "$build/inpaint" killed zero.png --half upper
refused_late 1 "empty" "$build/inpaint" killed empty --half upper
refused_late 1 "window of 16" "$build/inpaint" killed "$fit" --window 16
case $build in
    *sanitize*) echo "SKIP the memory plan: the sanitizers need more address space than a limit leaves" ;;
    *)
        limited() { (ulimit -v 900000 && "$@"); }
        refused 1 "smaller --batch" limited "$build/sample" "$here/models/emoji" -n 4096 --batch 4096 --threads 1
        refused_late 1 "smaller --batch" limited "$build/inpaint" "$here/models/emoji" "$here/models/emoji/example.png" --half upper -n 3900 --batch 3900 --threads 1
        refused_late 1 "smaller --batch" limited "$build/train" --config "$here/test/tiny.txt" --vqgan --data data --run r5 --batch 65536 --threads 1
        ;;
esac
ok "the memory plan is said" sh -c "'$build/sample' killed -n 1 --seed 1 -v -o m.png 2>&1 | grep -q '^memory: first stage'"
ok "nothing half-written" sh -c "! ls ./*.tmp* no 2>/dev/null"

# a full disk: what was there before is there afterwards
if mkdir small && mount -t tmpfs -o size=200k tmpfs small 2>/dev/null; then
    refused_late 1 "No space left" "$build/train" --config "$here/test/tiny.txt" --vqgan --data data --run small/run --no-wait
    ok "no torn file on a full disk" sh -c "! ls small/run/*.tmp* small/run/*-new* small/run/*.safetensors 2>/dev/null"
    umount small
else
    echo "SKIP the full disk: mounting a small tmpfs needs root"
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
