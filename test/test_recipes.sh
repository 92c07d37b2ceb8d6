#!/bin/sh
# test_recipes.sh BUILD: what a recipe says is obeyed, or refused in one line: misspelt keys, official keys in their own
# words, rates, losses, the preprocessing. Every key of the table is test_keys.c's.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
LC_ALL=C && export LC_ALL # sed on binary files

recipe() { # recipe LINE...: the tiny one with more lines, which take the place of their keys'; -KEY: without such keys
    cp test/tiny.txt "$dir/recipe.txt"
    for line in "$@"; do
        key=${line%% *}
        sed -i "/^${key#-}/d" "$dir/recipe.txt"
        [ "$key" != "${key#-}" ] || echo "$line" >>"$dir/recipe.txt"
    done
}
train() { # train RUN ARGUMENTS...: a fresh run, with the first stage where scales are trained
    run=$dir/$1
    shift
    rm -rf "$run" && mkdir "$run"
    case $* in *--scale*) cp "$dir/vqgan.safetensors" "$run" ;; esac
    "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$run" "$@"
}
says() { # says STATUS WORDS COMMAND...: exit status; one line on stderr if it is an error; the words are in it
    status=$1 words=$2
    shift 2
    "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    if [ $got -eq "$status" ] && grep -qF -- "$words" "$dir/err" && { [ $got -eq 0 ] || [ "$(grep -c . "$dir/err")" -eq 1 ]; }; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $(tail -n 1 "$dir/recipe.txt"): exit status $got, expected $status and \"$words\"; stderr:"
        head -5 "$dir/err"
    fi
}
refused() { # refused WORDS STAGE LINE...: before anything is trained
    words=$1 stage=$2
    shift 2
    recipe "$@"
    # shellcheck disable=SC2086
    says 1 "$words" train refused $stage --steps 1
}
same() { "$build/pictures" tensors "$@"; }
column() { # column RUN N: of the log, the steps in a line
    awk -F '\t' -v n="$2" 'NR > 1 { printf "%s%s", $n, FNR ? " " : "" }' "$dir/$1/log.tsv" | sed 's/ $//'
}

"$build/pictures" make "$dir/data" 8 20 || exit 1
recipe
ok "a first stage" train first --vqgan --steps 2
cp "$dir/first/vqgan.safetensors" "$dir"
P=model.params. NET=model.params.transformer_config.params. LR=model.params.scheduler_config. LOSS=model.params.lossconfig.

# ---- keys that there are not, and values that cannot be had ----
refused "recipe.txt: line 58: unknown key 'vqgan.train.sed'; did you mean vqgan.train.seed?" --vqgan "vqgan.train.sed 5"
refused "did you mean vqgan.train.seed?" "--scale 1" "vqgn.train.seed 5"
refused "did you mean vqgan.train.seed or scale.train.seed?" --vqgan "train.seed 5"
refused "did you mean scale.train.steps?" --vqgan "sclae.train.steps 5"
refused "did you mean vqgan.data.params.batch_size?" --all "vqgan.data.params.batchsize 2"
in_line() { # in_line WORDS STAGE LINE...: refused, by the file, the first line and the key as it is written there
    said=$1 of=$2 its=$3
    shift 2
    recipe "$@"
    refused "recipe.txt: line $(grep -n -F -x -- "$its" "$dir/recipe.txt" | cut -d : -f 1): $said" "$of" "$@"
}
# also where an option comes instead
in_line "configuration key 'vqgan.train.steps' is 'nan', expected a whole number" --vqgan "vqgan.train.steps nan"
in_line "configuration key 'vqgan.${LR}params.max_decay_steps' is 'nan'" --vqgan "vqgan.${LR}params.max_decay_steps nan"
in_line "configuration key 'vqgan.${LR}params.lr_max' is 'x'" "--vqgan --lr 1e-3" "vqgan.${LR}params.lr_max x"
in_line "configuration key 'scale.${P}soft_only' is 'maybe'" "--scale 1 --alpha 0.5" "scale.${P}soft_only maybe"
in_line "imagebart.store: f8: expected" "--vqgan --store f16" "vqgan.imagebart.store f8"
in_line "vqgan.model.target x.GumbelVQ: is another first stage" --vqgan "vqgan.model.target x.GumbelVQ"
in_line "configuration key 'vqgan.model.params.embed_dim' is 'sixteen', expected a whole number" --vqgan "vqgan.model.params.embed_dim sixteen"
in_line "configuration key 'scale.train.flip' is 'maybe', expected true" "--scale 1" "scale.train.flip maybe"
in_line "configuration key 'scale.${NET}enc_depth' is '-1', expected" "--scale 1" "scale.${NET}enc_depth -1"
in_line "configuration key 'scale.model.params.n_scales' is '0', expected" "--scale 1" "scale.model.params.n_scales 0"
in_line "schedule \"steep\": expected" "--scale 1" "scale.model.params.redraw_prob steep"
in_line "data.prep neat: expected" "--scale 1" "scale.data.prep neat"
in_line "imagebart.store: f8: expected" --vqgan "vqgan.imagebart.store f8"
in_line "model.params.ckpt_path nowhere.ckpt: no such file" --vqgan "vqgan.${P}ckpt_path nowhere.ckpt"
in_line "$dir/recipe.txt: is neither a .ckpt nor" --vqgan "vqgan.${P}ckpt_path recipe.txt"
in_line "model.params.single_scale is 2, but scale1 is" "--scale 1" "scale.${P}single_scale 2"
in_line "train.ema_decay beside model.params.use_ema false" "--scale 1" "scale.train.ema_decay 0.9" "scale.${P}use_ema false"
in_line "train.crops 4: only data.prep imagenet" "--scale 1" "scale.train.crops 4"
in_line "imagebart.class_list: $dir/nowhere.txt: No such file" "--scale 1" "scale.imagebart.class_list nowhere.txt"
in_line "model.params.scheduler_config.params.f_max: is not a key of" --vqgan "vqgan.${LR}params.f_max 1"
in_line "data.params.train.target x.Pictures: no data set that is known" "--scale 1" "scale.data.params.train.target x.Pictures"
in_line "data.params.train.params.size is 32, the first stage's" --vqgan "vqgan.data.params.train.params.size 32"
in_line "model.params.conditioner_config.target is \"x.Words\", expected" "--scale 1" "scale.${P}conditioner_config.target x.Words"
in_line "model.params.use_past_for_sampling false: not implemented" "--scale 3" "last.${P}use_past_for_sampling false" "last.${NET}n_unmasked 5"
in_line "train.freeze_encoder true: the encoder would stay at random" --vqgan "vqgan.train.freeze_encoder true"
# a discriminator's, though there is none
in_line "model.params.lossconfig.params.disc_loss foo: expected hinge or vanilla" --vqgan "vqgan.${LOSS}params.disc_loss foo"
in_line "configuration key 'vqgan.${LOSS}params.disc_weight' is 'foo', expected" --vqgan "vqgan.${LOSS}params.disc_weight foo"
in_line "configuration key 'vqgan.${LOSS}params.disc_ndf' is 'foo', expected" --vqgan "vqgan.${LOSS}params.disc_ndf foo"
in_line "configuration key 'vqgan.train.disc_warm_up' is 'foo', expected" --vqgan "vqgan.train.disc_warm_up foo"
in_line "configuration key 'vqgan.train.feature_weight' is 'foo', expected" --vqgan "vqgan.train.feature_weight foo"
refused "recipe.txt: vqgan: re_embed is 4000, expected" --vqgan "vqgan.model.params.re_embed 4000"
refused "regression true" "--scale 1" "scale.${P}regression true"
refused "sos_token 3" "--scale 1" "scale.${P}sos_token 3"
refused "enc_pre_norm false: layers are normalised in front; expected true" "--scale 1" "scale.${NET}enc_pre_norm false"
refused "causal_decoder False" "--scale 1" "scale.${NET}causal_decoder False"
refused "dec_ff_dropout 0.1" "--scale 1" "scale.${NET}dec_ff_dropout 0.1"
refused "ddconfig.dropout 0.5" --vqgan "vqgan.${P}ddconfig.dropout 0.5"
refused "use_actnorm true" --vqgan "vqgan.${LOSS}params.use_actnorm true"
refused "use_past_for_sampling false" "--scale 3" "last.${P}use_past_for_sampling false" "last.${NET}n_unmasked 5"
refused "expected imagebart.models.diffusion.DecoderOnlyDenoiser" "--scale 3" "last.model.target imagebart.models.diffusion.DenoisingXTransformer"
refused "single_scale is 2, but scale1 is to be trained" "--scale 1" "scale.${P}single_scale 2"
refused "n_embed is 17, but the first stage" --vqgan "scale.${P}first_stage_config.params.n_embed 17"
refused "ckpt_path nowhere.ckpt: no such file" --vqgan "vqgan.${P}ckpt_path nowhere.ckpt"
refused "expected imagebart.lr_scheduler.LambdaWarmUpCosineScheduler" --vqgan "vqgan.${LR}target torch.optim.StepLR"
refused "prepares pictures as ffhq, but data.prep says lsun" --vqgan "vqgan.data.prep lsun" "vqgan.data.params.train.target taming.data.faceshq.FFHQTrain"
refused "no data set that is known" --vqgan "vqgan.data.params.validation.target taming.data.ade20k.Examples"
refused "config.size is 256, the first stage's resolution 16" "--scale 1" "scale.data.params.train.params.config.size 256"
for endless in /dev/zero "$dir/pipe"; do
    [ -e "$endless" ] || mkfifo "$endless"
    says 1 "is a device or a pipe" timeout 10 "$build/train" --config "$endless" --data "$dir/data" --run "$dir/none" --vqgan
done

# ---- the official words ----
recipe "scale.${P}use_ema false" "scale.model.target imagebart.models.diffusion.DenoisingXTransformer" "scale.${P}use_past_for_sampling false" \
    "scale.${P}first_stage_config.params.n_embed 16" "scale.${P}first_stage_config.params.ddconfig.dropout 0.1" "scale.lightning.trainer.benchmark True"
ok "without a moving average" train plain --scale 1 --steps 4
ok "the weights are the plain ones" same "$dir/plain/scale1.safetensors" transformer. "$dir/plain/scale1.state.safetensors" value.
recipe
ok "with one" train moving --scale 1 --steps 4
ok "they are not" sh -c "! '$build/pictures' tensors '$dir/moving/scale1.safetensors' transformer. '$dir/moving/scale1.state.safetensors' value."
ok "but are trained alike" same "$dir/plain/scale1.state.safetensors" value. "$dir/moving/scale1.state.safetensors" value.
sed -i 's/model.params.alpha/model.params.alhpa/' "$dir/moving/scale1.safetensors"
says 1 "scale1.safetensors: unknown key 'model.params.alhpa'; did you mean model.params.alpha?" "$build/sample" "$dir/moving" -n 1 -o "$dir/x.png"
sed -i -e 's/model.params.alhpa/model.params.alpha/' -e 's/"imagebart.h":"8"/"imagebart.h":"x"/' "$dir/moving/scale1.safetensors"
says 1 "scale1.safetensors: configuration key 'imagebart.h' is 'x', expected a whole number" "$build/sample" "$dir/moving" -n 1 -o "$dir/x.png"
in_line "configuration key 'scale.imagebart.own_nats' is 'foo', expected two numbers" "--scale 1" "scale.imagebart.own_nats foo"
in_line "configuration key 'scale.imagebart.temperature' is '1,1', expected 1 number, or 3" "--scale 1" "scale.imagebart.temperature 1,1"
in_line "configuration key 'scale.model.params.use_past_for_sampling' is 'maybe', expected true" "--scale 1" "scale.${P}use_past_for_sampling maybe"
recipe "scale.${P}alpha 0.2" "scale.${P}soft_only True"
ok "soft_only" train soft --scale 2 --steps 2
recipe
ok "is alpha 1" train one --scale 2 --steps 2
ok "at every step" test "$(column soft 3)" = "$(column one 3)"
ok "unless the user says otherwise" train one --scale 2 --steps 2 --alpha 0.2
ok "which is another loss" sh -c "[ '$(column soft 3)' != '$(column one 3)' ]"
recipe "vqgan.${P}ckpt_path vqgan.safetensors" "-vqgan.${LR}" "vqgan.model.base_learning_rate 0"
says 0 "vqgan: begins with the weights of $dir/vqgan.safetensors (ckpt_path)" train begun --vqgan --steps 2
ok "which are there" same "$dir/vqgan.safetensors" decoder. "$dir/begun/vqgan.safetensors" decoder.
recipe "vqgan.data.params.train.target taming.data.imagenet.ImageNetTrain" "vqgan.data.params.train.params.config.size 16"
ok "pictures of an official data set" train named --vqgan --steps 2
recipe "vqgan.data.prep imagenet"
ok "and in our word" train prepared --vqgan --steps 2
ok "are prepared alike" same "$dir/named/vqgan.safetensors" "" "$dir/prepared/vqgan.safetensors" ""
ok "not as a folder's" sh -c "! '$build/pictures' tensors '$dir/named/vqgan.safetensors' '' '$dir/first/vqgan.safetensors' ''"
{ printf '\357\273\277' && sed 1d test/tiny.txt; } >"$dir/recipe.txt"
ok "a byte-order mark is no part of a key" train marked --vqgan --steps 2
ok "and changes nothing" cmp "$dir/marked/vqgan.safetensors" "$dir/first/vqgan.safetensors"
tr '\n' '\r' <test/tiny.txt >"$dir/recipe.txt"
ok "lines may end as on old machines" train marked --vqgan --steps 2
ok "which changes nothing" cmp "$dir/marked/vqgan.safetensors" "$dir/first/vqgan.safetensors"
says 0 "vqgan: goes on with its own weights; --init $dir/first is of runs that begin" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" \
    --run "$dir/marked" --vqgan --steps 3 --resume --init "$dir/first"
recipe "scale4.train.seed 5"
says 1 "scale4.train.seed: this model has scales 1 to 3" train none --vqgan --steps 1
says 1 "scale4.train.seed: this model has scales 1 to 3" train none --all --steps 1

# ---- names with a line feed and an escape: each is '?' in what is said, and in the next command as a shell takes it ----
recipe
odd=$(printf "p\ni \033[31mc'")
cp -r "$dir/data" "$dir/$odd"
ok "odd names" "$build/train" --config "$dir/recipe.txt" --data "$dir/$odd" --run "$dir/$odd-run" --vqgan --steps 1
cat "$dir/out" "$dir/err" >"$dir/said"
ok "are said printably" printed "$dir/said"
ok "as a name" grep -q "kept in .*p?i ?\[31mc'-run$" "$dir/said"
ok "and as a word of the next command" grep -qF -- "--data \$'$dir/p\\012i \\033[31mc\\'' --run" "$dir/said"

# ---- rates: constant without a schedule, also on resuming and with --lr; with cycles ----
recipe "-vqgan.${LR}" "vqgan.model.base_learning_rate 1e-4"
ok "a base_learning_rate alone" train rate --vqgan --steps 3
ok "which goes on" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/rate" --vqgan --steps 4 --resume
ok "is constant, times the pictures of a step" test "$(column rate 6)" = "0.0004 0.0004 0.0004 0.0004"
ok "the same" train old --vqgan --steps 3
sed -i -e 's/train.checksum/notes.checksum/' -e 's/train.processor/notes.processor/' -e 's/train.pictures/notes.pictures/' "$dir"/old/vqgan.state*.safetensors
says 0 "vqgan: begun by an earlier version, whose learning rate" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/old" --vqgan --steps 4 --resume
ok "once" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/old" --vqgan --steps 5 --resume
ok "no more" sh -c "! grep 'earlier version' '$dir/err'"
recipe "-vqgan.${LR}" "vqgan.model.base_learning_rate 1e-4" "vqgan.${LR}params.lr_start 2.5e-6" "vqgan.${LR}params.lr_max 1e-4" "vqgan.${LR}params.lr_min 1e-8"
ok "as it was then" train then --vqgan --steps 5
ok "it goes on" test "$(column old 6 | cut -d ' ' -f 5)" = "$(column then 6 | cut -d ' ' -f 5)"
recipe "-vqgan.${LR}" "vqgan.model.base_learning_rate 0.25" "vqgan.${LR}target imagebart.lr_scheduler.LambdaLinearScheduler" \
    "vqgan.${LR}params.warm_up_steps 0" "vqgan.${LR}params.f_start 0" "vqgan.${LR}params.f_max 1e-3" "vqgan.${LR}params.f_min 0" "vqgan.${LR}params.cycle_lengths 9"
ok "cycles" train old --vqgan --steps 3
sed -i -e 's/train.checksum/notes.checksum/' -e 's/train.processor/notes.processor/' -e 's/train.pictures/notes.pictures/' "$dir"/old/vqgan.state*.safetensors
says 0 "which did not look at scheduler_config.target: from here on" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/old" --vqgan --steps 4 --resume
recipe "-vqgan.${LR}" "vqgan.model.base_learning_rate 1e-4"
ok "--lr in its place" train rate --vqgan --steps 3 --lr 1e-3
ok "is constant too" test "$(column rate 6)" = "0.001 0.001 0.001"
cycles="scheduler_config.params."
recipe "-vqgan.${LR}" "vqgan.model.base_learning_rate 0.25" "vqgan.${LR}target imagebart.lr_scheduler.LambdaLinearScheduler" \
    "vqgan.${P}${cycles}warm_up_steps [1, 0]" "vqgan.${P}${cycles}f_start 0,0" "vqgan.${P}${cycles}f_max 1e-3,4e-4" \
    "vqgan.${P}${cycles}f_min 0,0" "vqgan.${P}${cycles}cycle_lengths 2,2"
ok "the official linear cycles" train rate --vqgan --steps 5
ok "are as there" test "$(column rate 6)" = "0 0.0005 0 0.0002 0"
says 1 "cycle_lengths end at step 4, train.steps is 6" train rate --vqgan --steps 6
says 1 "--lr: the recipe's schedule has cycles" train rate --vqgan --steps 2 --lr 1

# ---- the official remap: which codes are tokens, from a .npy ----
npy() { # npy FILE NUMBER...: as numpy.save writes int16
    file=$1
    shift
    header="{'descr': '<i2', 'fortran_order': False, 'shape': ($#,), }"
    { printf '\223NUMPY\001\000\166\000%-117s\n' "$header" && for n in "$@"; do printf "\\$(printf %o "$n")\\000"; done; } >"$file"
}
npy "$dir/used.npy" 3 1 4 5 9 2 6 7
npy "$dir/others.npy" 1 2 3 4 5 6 7 8
npy "$dir/outside.npy" 1 2 16
npy "$dir/twice.npy" 3 1 4 3 9 2 3 1
used="${P}first_stage_config.params.remap"
in_line "model.params.remap nowhere.npy: no such file beside this one or from here" --vqgan "vqgan.${P}remap nowhere.npy"
mkdir "$dir/folder.npy" && mkfifo "$dir/pipe.npy"
for kind in "folder.npy=$dir/folder.npy: is a folder" "pipe.npy=$dir/pipe.npy: is a device or a pipe" "/dev/zero=/dev/zero: is a device" "/dev/null=/dev/null: is a device"; do
    in_line "${kind#*=}" --vqgan "vqgan.${P}remap ${kind%%=*}"
done
in_line "$dir/folder.npy: is a folder, not a regular file" "--scale 1" "scale.$used folder.npy"
in_line "$dir/recipe.txt: is no .npy file" --vqgan "vqgan.${P}remap recipe.txt"
in_line "$dir/outside.npy: number 2 is 16, expected a code, 0..15" --vqgan "vqgan.${P}remap outside.npy"
in_line "model.params.re_embed is 9, $dir/used.npy has 8" --vqgan "vqgan.${P}re_embed 9" "vqgan.${P}remap used.npy"
in_line "model.params.re_embed 8: is how many codes" --vqgan "vqgan.${P}re_embed 8"
in_line "--remap beside model.params.remap" "--vqgan --remap" "vqgan.${P}remap used.npy"
in_line "scale.$used is others.npy, but the first stage's model.params.remap is used.npy" --vqgan "scale.$used others.npy" "vqgan.${P}remap used.npy"
in_line "$used nowhere.npy: no such file" "--scale 1" "scale.$used nowhere.npy"
coded() { recipe "scale.$used $1" "scale.${NET}dec_num_tokens 8" "last.${NET}vocab_size 8"; }
eight() { "$build/codes" "$dir/coded/vqgan.safetensors" "$dir/data" "$dir/raw" | grep -q '^8 [1-8] I64$'; }
coded used.npy
ok "a first stage of eight codes" train coded --vqgan --steps 2
ok "as many tokens" eight
ok "trains as one of all" same "$dir/coded/vqgan.safetensors" decoder. "$dir/first/vqgan.safetensors" decoder.
mv "$dir/used.npy" "$dir/gone.npy"
ok "and goes on without the file" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/coded" --vqgan --steps 3 --resume
ok "with those of its state" eight
mv "$dir/gone.npy" "$dir/used.npy"
says 0 "tokens number 8 of 16 codes now, as $dir/used.npy lists them" train adopted --scale 1 --steps 1
on() { "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/adopted" --steps 1 "$@"; }
ok "the next scale too" on --scale 2
coded nowhere.npy
ok "whose first stage knows its codes" on --scale 3
rm "$dir"/adopted/scale2*
coded others.npy
coded twice.npy
says 0 "$dir/twice.npy: 3 of its 8 entries repeat a code further ahead" train twice --vqgan --steps 1
says 0 "tokens number 8 of 16 codes now, as $dir/twice.npy lists them" train twice2 --scale 1 --steps 1
ok "and says it there" grep -q "twice.npy: 3 of its 8 entries repeat" "$dir/err"
ok "the state has them" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/twice" --vqgan --steps 2 --resume
ok "and they are said once" sh -c "! grep -q repeat '$dir/err'"
coded others.npy
says 1 "lists 8 codes, and $dir/adopted/vqgan.safetensors has other ones, 8" on --scale 2
coded used.npy
ok "again" on --scale 2
ok "drawn" "$build/sample" "$dir/adopted" -n 2 --class 1 --seed 7 -o "$dir/ours.png"
mkdir "$dir/official" && mv "$dir/adopted/vqgan.safetensors" "$dir/adopted.safetensors" && cp "$dir/vqgan.safetensors" "$dir/adopted"
ok "as official files, without the codes" "$build/test_ckpt" --official "$dir/adopted" "$dir/official"
draw() { "$build/sample" "$dir/official" -n 2 --class 1 --seed 7 -o "$dir/theirs.png"; }
cp "$dir/recipe.txt" "$dir/official/config.txt"
says 1 "config.txt: line $(grep -n "remap used" "$dir/recipe.txt" | cut -d : -f 1): model.params.remap used.npy: no such file beside this one or from here, and the weights have no tensor first_stage_model.quantize.used" draw
cp "$dir/used.npy" "$dir/official"
ok "drawn with those of the file" draw
ok "the same" "$build/pictures" same "$dir/ours.png" "$dir/theirs.png" 0 0 34 16
cp "$dir/others.npy" "$dir/official/used.npy"
ok "drawn with other codes" draw
ok "is not" sh -c "! '$build/pictures' same '$dir/ours.png' '$dir/theirs.png' 0 0 34 16"

# ---- the loss beside an official lossconfig is L1 alone, the codebook's set aside ----
recipe "vqgan.${LOSS}target taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator" "vqgan.${LOSS}params.codebook_weight 0"
ok "an official loss, without LPIPS" train l1 --vqgan --steps 2 --perceptual none
says 0 "vqgan: a new run of 1 step, kept in $dir/l0" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/l0" --vqgan --steps 1
says 0 "vqgan: continuing after step 2" "$build/train" --config "$dir/recipe.txt" --data "$dir/data" --run "$dir/l1" --vqgan --steps 3 --resume
ok "and goes on, with not a word about it" sh -c "! grep -q l2_weight '$dir/err'"
ok "is L1" awk -F '\t' 'NR > 1 && ($3 != $4 || !($5 > 0)) { exit 1 }' "$dir/l1/log.tsv"
echo "vqgan.train.l2_weight 1" >>"$dir/recipe.txt"
ok "with L2 where it is said" train l2 --vqgan --steps 2 --perceptual none
ok "is their sum" awk -F '\t' 'NR > 1 && ($3 - $4 - $5) ^ 2 > 1e-10 { exit 1 }' "$dir/l2/log.tsv"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
