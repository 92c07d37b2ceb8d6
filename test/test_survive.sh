#!/bin/sh
# test_survive.sh BUILD: what a run of ./train goes on after: signals, bad batches, spikes, damaged checkpoints, full
# disks, the leavings of kills. Whatever happened on the way, the last state must be, byte for byte, that of a run to
# which it did not happen, or happened elsewhere.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
mounted=
trap '[ -z "$mounted" ] || umount "$mounted"; rm -rf "$dir"' EXIT
passed=0 failed=0
export IMAGEBART_TEST_PAUSE=0.05

ok() { # ok WHAT COMMAND...: must exit 0; what it said is in $dir/said until the next train
    what=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $what: $*: exit status $?"
        tail -n 5 "$dir/err" "$dir/said"
    fi
}

# What train says goes to $dir/said.
train() { "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 --eval-every 10 --picture-every 100 --threads 1 "$@" 2>"$dir/said"; }

fails() { # fails WORD ARGUMENTS...: train exits 1 and its last line holds WORD
    word=$1
    shift
    train "$@"
    [ $? -eq 1 ] && tail -n 1 "$dir/said" | grep -q -- "$word"
}

said() { grep -q -- "$1" "$dir/said"; }
state() { echo "$dir/$1/$2.state.safetensors"; }
same() { cmp "$(state "$1" "$3")" "$(state "$2" "$3")"; } # same RUN RUN STAGE
every_step_once() { awk -v stage="$2" -v steps="$3" '$1 == stage { n[$2]++ } END { for (i = 1; i <= steps; i++) if (n[i] != 1) exit 1 }' "$dir/$1/log.tsv"; }

begin() { # begin RUN ARGUMENTS...: in the background, until said is $until; its number is in $pid
    run=$1
    shift
    : >"$dir/said" # the program will, but not at once
    # the program itself, not a shell around it
    "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 --eval-every 10 --picture-every 100 --threads 1 --run "$dir/$run" "$@" >/dev/null 2>"$dir/said" &
    pid=$!
}

until_there() { # until_there COMMAND...: as long as $pid runs
    tries=0
    while ! "$@" && [ $tries -lt 8000 ] && kill -0 $pid 2>/dev/null; do
        sleep 0.005
        tries=$((tries + 1))
    done
}

new_run() { # new_run RUN: with the first stage, encoded
    mkdir "$dir/$1" && cp "$dir/first/vqgan.safetensors" "$dir/first/train.tokens" "$dir/first/val.tokens" "$dir/$1"
}

"$build/pictures" make "$dir/data" 60 20 || exit 1
ok "train a first stage" train --run "$dir/first" --vqgan
ok "and a scale" train --run "$dir/first" --scale 1

# ---- checkpoints: which is which ----
step_of() { # step_of FILE: of its metadata
    head -c 20000 "$1" | tr -d '\0' | grep -ao '"train.step":"[0-9]*"' | tr -dc 0-9
}
best_of() { awk -v stage="$2" '$1 == stage && $10 != "" && (n++ == 0 || $10 < best) { best = $10; step = $2 } END { print step }' FS='\t' "$dir/$1/log.tsv"; }
ok "the newest state" test "$(step_of "$(state first scale1)")" = 30
ok "the one before" test "$(step_of "$dir/first/scale1.state-1.safetensors")" = 25
ok "and no more" test ! -e "$dir/first/scale1.state-2.safetensors"
for stage in vqgan scale1; do
    ok "the best $stage is of the step with the least loss" test "$(step_of "$dir/first/$stage.best.safetensors")" = "$(best_of first $stage)"
done
ok "training that gets worse" train --run "$dir/worse" --vqgan --lr 0.5 --eval-every 1 --steps 12 --keep 4
ok "has its best before the end" test "$(best_of worse vqgan)" -lt 12
ok "which is kept" test "$(step_of "$dir/worse/vqgan.best.safetensors")" = "$(best_of worse vqgan)"
ok "with its loss" grep -aq '"train.best_validation_loss":"[0-9.]*"' "$dir/worse/vqgan.best.safetensors"
ok "four states" test "$(for i in '' -1 -2 -3; do step_of "$dir/worse/vqgan.state$i.safetensors" && echo; done | tr '\n' ' ')" = "12 10 5 0 "
ok "which with --keep 1" train --run "$dir/worse" --vqgan --lr 0.5 --steps 14 --resume --keep 1
ok "are one" test "$(cd "$dir/worse" && echo vqgan.state*)" = vqgan.state.safetensors
ok "how much of the disk that takes is said" said '^disk: a state 2.6 MiB, weights 0.9 MiB twice: with --keep 1 at most 7.0 MiB in .*, .* free$'

# ---- --early-stop: the end, and the best weights ----
stop="--vqgan --lr 0.5 --eval-every 1 --steps 60 --spike 0"
# shellcheck disable=SC2086
ok "training that gets worse" train --run "$dir/risen" $stop
ok "says so" said '^vqgan: the validation loss has risen since step .*by heart; --early-stop 3'
ok "once" test "$(grep -c 'has risen' "$dir/said")" -eq 1
ok "and keeps its last weights" test "$(step_of "$dir/risen/vqgan.safetensors")" = 60
# shellcheck disable=SC2086
ok "with --early-stop" train --run "$dir/stopped" $stop --early-stop 4
best=$(best_of stopped vqgan)
ok "it ends after four evaluations that were no better" test "$(step_of "$(state stopped vqgan)")" = $((best + 4))
ok "which is said" said "^vqgan: ended after step $((best + 4)), for validation was best at step $best: .*stopped/vqgan.safetensors"
ok "with the weights of the best" test "$(step_of "$dir/stopped/vqgan.safetensors")" = "$best"
weights() { # of a file: tensors in order of their names
    python3 -c 'import sys, struct, json, hashlib
b = open(sys.argv[1], "rb").read(); n = 8 + struct.unpack("<Q", b[:8])[0]; t = json.loads(b[8:n]); t.pop("__metadata__")
print(hashlib.sha256(b"".join(k.encode() + b[n + t[k]["data_offsets"][0] : n + t[k]["data_offsets"][1]] for k in sorted(t))).hexdigest())' "$1"
}
ok "to the bit" test -n "$(weights "$dir/stopped/vqgan.safetensors")" -a "$(weights "$dir/stopped/vqgan.safetensors")" = "$(weights "$dir/stopped/vqgan.best.safetensors")"
cp "$(state stopped vqgan)" "$dir/before"
# shellcheck disable=SC2086
ok "it has ended for good" train --run "$dir/stopped" $stop --resume
ok "as it says" said '^vqgan: the first stage, finished after'
ok "to the same state" cmp "$dir/before" "$(state stopped vqgan)"
ok "and the next is a scale" said '^next: .*--scale 1'
begin stopped-killed $stop --early-stop 4 --save-every 1 --steps 60
until_there test -f "$dir/stopped-killed/vqgan.state-1.safetensors"
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
# shellcheck disable=SC2086
ok "killed, it goes on" train --run "$dir/stopped-killed" $stop --resume
ok "to the same end" same stopped stopped-killed vqgan
ok "and the same weights" cmp "$dir/stopped/vqgan.safetensors" "$dir/stopped-killed/vqgan.safetensors"
ok "a finished run takes its best" train --run "$dir/risen" --vqgan --resume --eval-every 1 --early-stop 4
ok "too" test "$(step_of "$dir/risen/vqgan.safetensors")" = "$(best_of risen vqgan)"

# ---- signals: saved first; with a second one nothing is lost but the steps since the last checkpoint ----
steps=250
case $build in *sanitize*) steps=60 ;; esac # which take as long
long="--scale 1 --steps $steps"
new_run whole
# shellcheck disable=SC2086
ok "a run without disturbance" train --run "$dir/whole" $long
ok "leaves nothing out" test ! -e "$dir/whole/skipped_batches.tsv"
signals="TERM INT HUP"
if sh -c 'kill -HUP $$'; then # under nohup; what a shell was told to ignore it cannot heed again
    signals="TERM INT" && echo "SKIP SIGHUP ends a run: it is ignored here"
fi
for signal in $signals; do
    new_run $signal
    # shellcheck disable=SC2086
    begin $signal $long
    until_there test -f "$dir/$signal/scale1.state-1.safetensors"
    kill -$signal $pid
    wait $pid 2>/dev/null
    ok "SIG$signal ends a run cleanly" test $? -eq 0
    ok "before its end" said '^stopped after step .*--resume'
    ok "with all its steps saved" test "$(step_of "$(state $signal scale1)")" = "$(tail -n 1 "$dir/$signal/log.tsv" | cut -f 2)"
done
# shellcheck disable=SC2086
ok "the run goes on" train --run "$dir/TERM" $long --resume
ok "to the same state" same TERM whole scale1
new_run second
# shellcheck disable=SC2086
begin second $long
until_there test -f "$dir/second/scale1.state-1.safetensors"
kill -TERM $pid && kill -INT $pid
wait $pid 2>/dev/null
ok "a second signal ends it at once" test $? -gt 128
# shellcheck disable=SC2086
ok "the run goes on" train --run "$dir/second" $long --resume
ok "to the same state" same second whole scale1
(
    trap '' HUP
    new_run nohup
    # shellcheck disable=SC2086
    begin nohup $long
    until_there test -f "$dir/nohup/scale1.state-1.safetensors"
    kill -HUP $pid
    wait $pid 2>/dev/null
)
ok "with nohup it goes on" same nohup whole scale1

# ---- bad batches: left out, whatever happens in between ----
bad_batch() { # bad_batch STAGE MICRO MICROS STEP REASON ARGUMENTS...
    stage=$1 micro=$2 micros=$3 step=$4 reason=$5
    shift 5
    export IMAGEBART_TEST_NAN=$stage:$micro
    if [ "$reason" != "not finite" ]; then
        export IMAGEBART_TEST_SPIKE=$stage:$micro
        unset IMAGEBART_TEST_NAN
    fi
    new_run "$stage-bad" && new_run "$stage-killed" && new_run "$stage-good"
    ok "$stage: a bad batch" train --run "$dir/$stage-bad" "$@"
    case $micros in *-*) which="es $micros are" ;; *) which=" $micros is" ;; esac
    ok "is said" said "^$stage step $step: $reason: loss .*; back to step $((step / 5 * 5)), micro batch$which left out from now on"
    ok "once" test "$(grep -c 'left out' "$dir/said")" -eq 1
    tab=$(printf '\t')
    ok "and noted" grep -q "^$stage$tab$step$tab$micros$tab.*$tab.*$tab$reason\$" "$dir/$stage-bad/skipped_batches.tsv"
    ok "every step is in the log" every_step_once "$stage-bad" "$stage" 60
    begin "$stage-killed" "$@"
    until_there said "left out"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    ok "killed before the end" test "$(step_of "$(state "$stage-killed" "$stage")")" -lt 60
    unset IMAGEBART_TEST_NAN IMAGEBART_TEST_SPIKE # what is left out is in the state
    ok "goes on without it" train --run "$dir/$stage-killed" "$@" --resume
    ok "to the same state" same "$stage-bad" "$stage-killed" "$stage"
    ok "the same weights" cmp "$dir/$stage-bad/$stage.safetensors" "$dir/$stage-killed/$stage.safetensors"
    ok "the same best" cmp "$dir/$stage-bad/$stage.best.safetensors" "$dir/$stage-killed/$stage.best.safetensors"
    ok "the same notes" cmp "$dir/$stage-bad/skipped_batches.tsv" "$dir/$stage-killed/skipped_batches.tsv"
    ok "a run without the bad batch" train --run "$dir/$stage-good" "$@"
    ok "takes it" sh -c "! cmp -s '$(state "$stage-bad" "$stage")' '$(state "$stage-good" "$stage")'"
}
loss=vqgan.model.params.lossconfig.params # of a first stage with a discriminator, whose state goes back too
{ cat test/tiny.txt && printf "$loss.%s\n" "disc_num_layers 2" "disc_ndf 8" "disc_start 8" && echo "vqgan.train.disc_warm_up 4"; } >"$dir/gan.txt"
bad_batch vqgan 17 17 18 "not finite" --vqgan --steps 60 --config "$dir/gan.txt" --bf16-states
# What is bad of the discriminator alone costs it that update; 13 steep gradients in a row become usual.
IMAGEBART_TEST_GRADIENT_DISCRIMINATOR=vqgan:$(seq -s, 46 58)
export IMAGEBART_TEST_GRADIENT_DISCRIMINATOR IMAGEBART_TEST_NAN_DISCRIMINATOR=vqgan:17 IMAGEBART_TEST_SPIKE_DISCRIMINATOR=vqgan:44
discriminator() { run=$1 && shift && train --run "$dir/$run" --vqgan --steps 60 --config "$dir/gan.txt" "$@"; }
ok "bad gradients and losses of the discriminator" discriminator judged
ok "are said" said '^vqgan step 18: discriminator not finite: loss .*, gradient norm -*nan; its update is passed over$'
ok "by what they are" said '^vqgan step 45: discriminator: loss spike: loss 100, .*; its update is passed over$'
ok "but for the last ones" said '^vqgan step 47: discriminator: gradient spike: .*, as others will be without a word'
ok "never gone back from" sh -c "! grep -q 'back to step' '$dir/said'"
steep=$(grep -c 'discriminator: gradient spike, passed over$' "$dir/judged/skipped_batches.tsv")
ok "and noted until they are usual" test "$steep" -ge 5 -a "$steep" -lt 13
ok "every step is in the log" every_step_once judged vqgan 60
begin judged-killed --vqgan --steps 60 --config "$dir/gan.txt"
until_there said "loss spike"
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "killed after them" test "$(step_of "$(state judged-killed vqgan)")" -lt 60
ok "a run goes on" discriminator judged-killed --resume
ok "to the same state" same judged judged-killed vqgan
ok "the same notes" cmp "$dir/judged/skipped_batches.tsv" "$dir/judged-killed/skipped_batches.tsv"
unset IMAGEBART_TEST_GRADIENT_DISCRIMINATOR IMAGEBART_TEST_NAN_DISCRIMINATOR IMAGEBART_TEST_SPIKE_DISCRIMINATOR
ok "without them" discriminator unjudged
ok "the discriminator is another" sh -c "! '$build/pictures' tensors '$(state judged vqgan)' value.loss. '$(state unjudged vqgan)' value.loss."
bad_batch scale1 34 34-35 18 "not finite" --scale 1 --steps 60
bad_batch joint 35 34-35 18 "not finite" --joint --steps 60
bad_batch scale3 94 94-95 48 "loss spike" --scale 3 --steps 60
# From before the bad batch: it is met again, measured against what the state remembers; if it is good now, it is taken.
new_run again
export IMAGEBART_TEST_SPIKE=scale3:94
ok "a spike, with five states" train --run "$dir/again" --scale 3 --steps 60 --keep 5
(cd "$dir/again" && rm scale3.state.safetensors scale3.state-[123].safetensors) && cp -r "$dir/again" "$dir/taken"
ok "the state before it" train --run "$dir/again" --scale 3 --steps 60 --resume
ok "is of step 40" said 'continuing after step 40$'
ok "and meets it again" said '^scale3 step 48: loss spike'
ok "to the same state" same again scale3-bad scale3
ok "the same notes" cmp "$dir/again/skipped_batches.tsv" "$dir/scale3-bad/skipped_batches.tsv"
unset IMAGEBART_TEST_SPIKE
ok "without the spike" train --run "$dir/taken" --scale 3 --steps 60 --resume
ok "nothing is left out" same taken scale3-good scale3
ok "nor noted" test "$(wc -l <"$dir/taken/skipped_batches.tsv")" -eq 1
losses() { awk -v stage=scale1 -v last="$2" '$1 == stage && $2 <= last { print $3 }' "$dir/$1/log.tsv"; }
ok "before it the two runs are one" test "$(losses scale1-bad 17)" = "$(losses scale1-good 17)"
ok "behind it they are not" test "$(losses scale1-bad 18)" != "$(losses scale1-good 18)"
sed 's/^scale.train.flip.*/&\nscale.train.spike 0/' test/tiny.txt >"$dir/calm.txt"
new_run calm
export IMAGEBART_TEST_SPIKE=scale1:94
ok "train.spike 0: no spikes" train --run "$dir/calm" --scale 1 --steps 60 --config "$dir/calm.txt"
ok "at all" test ! -e "$dir/calm/skipped_batches.tsv"
sed 's/^scale.train.flip.*/&\nscale.train.spike 0.01/' test/tiny.txt >"$dir/nervous.txt"
unset IMAGEBART_TEST_SPIKE
new_run nervous
ok "train.spike 0.01" train --run "$dir/nervous" --scale 1 --steps 60 --config "$dir/nervous.txt"
ok "norms count too" grep -q 'gradient spike, passed over' "$dir/nervous/skipped_batches.tsv"
new_run storm
export IMAGEBART_TEST_SPIKE=scale1:94,96,98,100
ok "four loss spikes in a row end the run" fails 'loss spike: loss .*after going back to step 45 3 times; a smaller --lr .*--spike 0' --run "$dir/storm" --scale 1 --steps 60
ok "which goes on as it was told" train --run "$dir/storm" --scale 1 --steps 60 --resume --spike 0
unset IMAGEBART_TEST_SPIKE
new_run three
export IMAGEBART_TEST_NAN=scale1:14,16,18
ok "three bad steps in a row" train --run "$dir/three" --scale 1
ok "are left out" test "$(cut -f 3 "$dir/three/skipped_batches.tsv" | tr '\n' ' ')" = "micro_batches 14-15 16-17 18-19 "
new_run four
export IMAGEBART_TEST_NAN=scale1:14,16,18,20
ok "four end the run" fails "scale1 step 8: not finite: loss nan.*after going back to step 5 3 times; a smaller --lr than 0.003" --run "$dir/four" --scale 1
ok "whose checkpoint is intact" test "$(step_of "$(state four scale1)")" = 5
unset IMAGEBART_TEST_NAN

# ---- gradient spikes without a loss spike: passed over, never the end ----
every=$(seq -s, 80 3 118) # of every other step, behind the 32 to judge by
IMAGEBART_TEST_GRADIENT=scale1:$every
export IMAGEBART_TEST_GRADIENT
new_run steep && new_run steep-killed
ok "gradient spikes" train --run "$dir/steep" --scale 1 --steps 60
ok "are passed over" said '^scale1 step 41: gradient spike: loss .*; the step is passed over$'
ok "soon without a word" test "$(grep -c 'passed over' "$dir/said")" -eq 3
ok "not gone back from" sh -c "! grep -q 'back to step' '$dir/said'"
ok "and all noted" test "$(grep -c 'gradient spike, passed over$' "$dir/steep/skipped_batches.tsv")" -eq 13
ok "every step is in the log" every_step_once steep scale1 60
ok "a stage alone tells its own time" said '^scale1 step 1/60 .* left$'
ok "the steps move nothing" test "$(awk '$1 == "scale1" && $2 == 41 { print $6 }' FS='\t' "$dir/steep/log.tsv")" = 0
begin steep-killed --scale 1 --steps 60
until_there said "passed over"
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "a killed run goes on" train --run "$dir/steep-killed" --scale 1 --steps 60 --resume
ok "to the same state" same steep steep-killed scale1
ok "the same notes" cmp "$dir/steep/skipped_batches.tsv" "$dir/steep-killed/skipped_batches.tsv"
unset IMAGEBART_TEST_GRADIENT
new_run early
export IMAGEBART_TEST_NAN=scale1:6,8,10
ok "bad steps before the first checkpoint" train --run "$dir/early" --scale 1 --save-every 20
ok "do not throw the run back" said '^scale1 step 4: not finite: loss .*; the step is passed over$'
new_run hopeless
IMAGEBART_TEST_NAN=scale1:$(seq -s, 0 200)
ok "nothing but bad steps end it" fails "scale1 step 65: loss nan.*a smaller --lr" --run "$dir/hopeless" --scale 1 --steps 90 --save-every 100
unset IMAGEBART_TEST_NAN
cp -r "$dir/first" "$dir/all" && rm -f "$dir"/all/scale*
export IMAGEBART_TEST_SPIKE=scale2:94,96,98,100,102,104,106,108
ok "--all: loss spikes one after the other" train --run "$dir/all" --all --steps 60
ok "with what it will take" said "^disk: all stages will take about [0-9.]* MiB more in $dir/all, .* free$"
ok "and the time left, of all stages too" said '^vqgan step 31/60 .* left, all stages about [0-9.]* '
ok "are gone back from" test "$(grep -c 'loss spike.*back to step' "$dir/said")" -eq 5
ok "then passed over" said 'loss spike.*the step is passed over'
ok "to the samples" test -s "$dir/all/samples.png"
ok "which are drawn again" train --run "$dir/all" --all --steps 60 --no-wait
ok "after a word for each stage" test "$(grep -c '^[a-z0-9]*: .*, finished after 60 steps: ' "$dir/said")" -eq 4
ok "that says what it is" said "^scale2: x_2 -> x_1, finished after 60 steps: $dir/all/scale2.safetensors$"
ok "and no more" sh -c "! grep -q 'continuing\|disk:' '$dir/said'"
unset IMAGEBART_TEST_SPIKE
ok "options that come too late" train --run "$dir/all" --all --resume --seed 5 --lr 1 --batch 3 --bf16-states --spike 7.5 --store f16
late="--batch 3, --lr 1, --spike 7.5, --seed 5, --bf16-states, --store f16"
ok "are said to" test "$(grep -c "finished after 60 steps: .*.safetensors; $late: without effect$" "$dir/said")" -eq 4
ok "usual values, and those of the recipe" train --run "$dir/all" --all --resume --seed 23 --spike 10 --store f32 --steps 50
ok "are not" sh -c "! grep -q 'without effect' '$dir/said'"

# ---- --all: what a later stage would refuse is refused before the first step ----
mkdir "$dir/flat" && cp "$dir"/data/*/000.png "$dir"/data/*/001.png "$dir/flat" 2>/dev/null
early() { # early WORD ARGUMENTS...
    rm -rf "$dir/early-all"
    fails "$@" --run "$dir/early-all" --all && ! grep -q 'step' "$dir/said" && [ ! -e "$dir/early-all/vqgan.state.safetensors" ]
}
ok "no classes for a model with classes" early "one sub-folder per class" --data "$dir/flat"
sed 's/^scale.*dec_num_tokens 16/scale.model.params.transformer_config.params.dec_num_tokens 17/' test/tiny.txt >"$dir/tokens.txt"
ok "another number of tokens than codes" early "scale1: the network writes 17 token values, the first stage has 16" --config "$dir/tokens.txt"
sed 's/^last.*block_size 65/last.model.params.transformer_config.params.block_size 40/' test/tiny.txt >"$dir/short.txt"
ok "a last scale too short for the grid" early "4[0-9]" --config "$dir/short.txt"
sed 's/input_vocab_size 16/input_vocab_size 2/; s/enc_num_tokens 16/enc_num_tokens 16/' test/tiny.txt >"$dir/few.txt"
ok "label dropout without a token for it" early "label_dropout" --label-dropout 0.1 --config "$dir/few.txt"

# ---- an edited recipe, when the run goes on ----
sed 's/^scale.model.params.scheduler_config.params.lr_max .*/scale.model.params.scheduler_config.params.lr_max 3.0e-3/
     s/^scale.train.flip .*/scale.train.flip false/
     s/^scale.model.params.transformer_config.params.dim .*/scale.model.params.transformer_config.params.dim 48/
     /^scale.data.params/d' test/tiny.txt >"$dir/edited.txt" && echo "scale.train.spike 7" >>"$dir/edited.txt"
new_run edited
ok "a run" train --run "$dir/edited" --scale 1 --steps 10
ok "goes on with its recipe" train --run "$dir/edited" --scale 1 --steps 12 --resume
ok "without a word" sh -c "! grep -q recipe: '$dir/said'"
ok "and with an edited one" train --run "$dir/edited" --scale 1 --steps 14 --resume --config "$dir/edited.txt"
ok "which is said" said '^scale1: recipe: train.flip is false there, true in the run, which stays$'
ok "of each key" said '^scale1: recipe: model.params.transformer_config.params.dim is 48 there, 24 in the run, which stays$'
ok "0.003 is 3.0e-3" sh -c "! grep -q lr_max '$dir/said'"
ok "what counts as a spike may change" said '^scale1: recipe: train.spike is 7 there, not said in the run, which takes it over$'
ok "and has" grep -aq '"train.spike":"7"' "$(state edited scale1)"
ok "an option wins" train --run "$dir/edited" --scale 1 --steps 16 --resume --config "$dir/edited.txt" --spike 0
ok "over it" grep -aq '"train.spike":"0"' "$(state edited scale1)"
ok "nothing else is another run" sh -c "! grep -q 'another run' '$dir/said'"
ok "another seed" train --run "$dir/edited" --scale 1 --steps 17 --resume --seed 4
ok "which is said" said '^scale1: trained with seed 23 so far, from here on with 4: another run than without the change$'
cp -r "$dir/data" "$dir/fewer" && rm "$(find "$dir/fewer" -name '*.png' | sort | head -n 1)"
ok "fewer pictures" train --run "$dir/edited" --scale 1 --steps 18 --resume --data "$dir/fewer"
ok "which are said" said '^scale1: trained on [0-9]* pictures so far, now on [0-9]*: another run than without'
ok "only then, as the seed is only then" sh -c "[ \$(grep -c 'another run' '$dir/said') -eq 1 ]"
first=$(find "$dir/fewer" -name '*.png' | sort | head -n 1) && mv "$first" "${first%.png}-other.png"
ok "as many, but others" train --run "$dir/edited" --scale 1 --steps 19 --resume --data "$dir/fewer"
ok "which are said too" said '^scale1: the [0-9]* pictures are others than those it was trained on so far: another run'
echo "scale.imagebart.temperature 0.5" >>"$dir/edited.txt"
ok "a stage that is finished" train --run "$dir/edited" --scale 1 --steps 19 --resume --seed 5 --batch 2 --data "$dir/data" --config "$dir/edited.txt"
ok "does not go on otherwise" sh -c "grep -q 'finished after 19 steps' '$dir/said' && ! grep -q 'so far\|here on\|takes it over' '$dir/said'"
ok "but keeps what it has" said 'imagebart.temperature is 0.5 there, not said in the run, which is finished and keeps it$'
mv "$dir/fewer" "$dir/moved"
ok "the same elsewhere" train --run "$dir/edited" --scale 1 --steps 20 --resume --data "$dir/moved"
ok "are the same" sh -c "! grep -q 'another run' '$dir/said'"

# ---- damaged checkpoints: the one before ----
damage() { # damage RUN HOW
    file=$(state "$1" scale1)
    case $2 in
        cut) head -c 300000 "$file" >"$file.cut" && mv "$file.cut" "$file" ;;
        flipped) printf '\377\377\377\377' | dd of="$file" bs=1 seek=300000 conv=notrunc 2>/dev/null ;;
        setting) sed -i 's/"train.step":"60"/"train.step":"61"/' "$file" ;;
    esac
}
for how in cut flipped setting; do
    rm -rf "$dir/damaged" && cp -r "$dir/scale1-good" "$dir/damaged" && damage damaged $how
    ok "a newest state that is $how" train --run "$dir/damaged" --scale 1 --steps 60 --resume
    ok "is said" said "scale1.state.safetensors: .*; going on from the one before, .*/scale1.state-1.safetensors$"
    ok "the one before is used" said '^scale1: continuing after step 55$'
    ok "to the same state" same damaged scale1-good scale1
    ok "and the damaged one put aside" test -s "$dir/damaged/scale1.state-damaged.safetensors"
done
damage damaged flipped && cp "$(state damaged scale1)" "$dir/damaged/scale1.state-1.safetensors"
ok "no state is whole" fails "scale1.state-1.safetensors: is damaged: its checksum is .*, expected" --run "$dir/damaged" --scale 1 --steps 60 --resume

# ---- leavings ----
sh -c : &
dead=$!
wait $dead
new_run left
for name in scale1.state.safetensors scale1-000020.png scale10.safetensors vqgan.safetensors joint.best.safetensors \
    loss.svg log.tsv train.tokens val.tokens skipped.txt skipped_batches.tsv psim.txt; do
    : >"$dir/left/$name.tmp$dead-0"
    : >"$dir/left/$name.tmp$$-0"
done
for name in scale1.state-1.safetensors.tmp$dead scale1.state-new.safetensors scale2.state-new.safetensors vqgan.state-new.safetensors; do : >"$dir/left/$name"; done
for name in scale1.tmp.txt notes.txt.tmp$dead-0 scale1.safetensors.tmp${dead}x vqgano.x.tmp$dead-0 train.tokens.part; do : >"$dir/left/$name"; done
: >"$dir/left/vqgan.tmp$dead-0" # no file of ours, though it begins so
cp -r "$dir/left" "$dir/left-before"
ok "a run in a folder of a killed one" train --run "$dir/left" --scale 1 --steps 1
ok "says what it removes" said "temporary files of a killed run removed: 16$"
ok "nothing of the dead" test -z "$(cd "$dir/left" && ls | grep -v 'notes\|tmp[0-9]*x$\|vqgano\|vqgan.tmp' | grep "tmp$dead\|state-new\|part")"
ok "all of the living, and what is not ours" test "$(ls "$dir/left" | grep -c 'tmp')" -eq 17
ok "an output" "$build/sample" emoji -n 1 -o "$dir/left/o.png"
: >"$dir/left/o.png.tmp$dead-3" && : >"$dir/left/o.png.tmp$$-3" && : >"$dir/left/oo.png.tmp$dead-3"
ok "written again" "$build/sample" emoji -n 1 -o "$dir/left/o.png"
ok "removes what a kill left of it" test "$(cd "$dir/left" && ls | grep '^o')" = "o.png
o.png.tmp$$-3
oo.png.tmp$dead-3"
new_run cached
head -c 100 "$dir/first/train.tokens" >"$dir/cached/val.tokens.part" && rm "$dir/cached/train.tokens"
ok "tokens that are whole" train --run "$dir/cached" --scale 1 --steps 1
ok "need no part" test -z "$(ls "$dir/cached" | grep part)"

# ---- one ./train at a time ----
begin alone --vqgan --steps 100000
until_there test -s "$dir/alone/log.tsv"
mv "$dir/said" "$dir/said.first"
holder=$(cut -d ' ' -f 1 "$dir/alone/lock") first=$pid
ok "the lock names the process" test "$holder" = "$pid"
before=$(ls "$dir/alone" | grep -v tmp)
for what in "--vqgan --resume" "--scale 1" "--all" "--vqgan --remap" "--joint" "--schedule psim"; do
    # shellcheck disable=SC2086
    ok "another: $what" fails "alone: another ./train, process $first, trains in this run; --run DIR starts another$" --run "$dir/alone" $what
done
ok "in one line" test "$(wc -l <"$dir/said")" -eq 1
ok "an evaluation is none" train --run "$dir/alone" --vqgan --eval
pid=$first
ok "the first goes on" kill -0 $pid
kill -9 $pid
wait $pid 2>/dev/null
ok "one that was killed keeps nobody out" train --run "$dir/alone" --vqgan --resume --steps 20
ok "and an end leaves no lock" test ! -e "$dir/alone/lock"
ok "a refusal" fails "scale1 exists\|exists: --resume" --run "$dir/first" --scale 1
ok "neither" test ! -e "$dir/first/lock"
mkdir -p "$dir/old"
for run in typo typo/deep/er old/new old; do
    ok "a start that fails, $run" fails "nothing" --run "$dir/$run" --vqgan --init "$dir/nothing"
done
ok "leaves no folder" test ! -e "$dir/typo"
ok "but what was there" test -z "$(ls -A "$dir/old")"
ok "as it was" test -d "$dir/old"
together() { # two in a run that is not there yet; one of them ends well
    for k in 1 2; do "$build/train" --config test/tiny.txt --data "$dir/data" --threads 1 --save-every 1 --run "$dir/both" "$@" >/dev/null 2>"$dir/said$k" & done
    wait %1 && one=0 || one=$?
    wait %2 && two=0 || two=$?
    [ $((one + two)) -eq 1 ]
}
ok "two at once" together --vqgan --steps 40
ok "are one" every_step_once both vqgan 40
ok "which is said" grep -q 'both: another ./train\|both exists\|both.*exists: --resume' "$dir/said1" "$dir/said2"

# ---- curves of any log: drawn, small ----
cp -r "$dir/first" "$dir/curves"
head -n 1 "$dir/first/log.tsv" >"$dir/curves/log.tsv"
awk 'function line(stage, step, loss) { print stage "\t" step "\t" loss "\t" loss "\t" loss "\t0\t1\t9\t\t\t\t" }
    BEGIN {
        n = split("0.1 0.3333333 0 -5 1e-30 1e30 -1e-40 123456.7 inf nan -inf 1e308 1e-320 0.7", value, " ")
        for (k = 1; k <= n; k++) for (i = 1; i <= 300; i++) line("scale" k, i, value[k])
        for (i = 1; i <= 300; i++) line("scale15", i, 0.5 + (i % 2) * 1e-16)
        for (i = 1; i <= 60; i++) line("joint", i, i % 7 == 0 ? "nan" : i % 5 == 0 ? "1e38" : "1e-38")
        m = split("1e30 1e300 4294967295 99999999999999999999 0 -1 7e9x inf nan 5", odd, " ")
        for (k = 1; k <= m; k++) line("scale2", odd[k], 1)
        print "scale3\t5"; print "scale3\t6\t\t\t\t"; print "vqgan\t30"; print "vqgan\t30\t\t\t\t\t\t\t\t"
    }' >>"$dir/curves/log.tsv"
ok "a log of constants, and of what is no number" timeout -s KILL 60 "$build/train" --config test/tiny.txt --data "$dir/data" --threads 1 --run "$dir/curves" --vqgan --resume
ok "is drawn" test "$(grep -c '<clipPath' "$dir/curves/loss.svg")" -eq 17
ok "in little" test "$(wc -c <"$dir/curves/loss.svg")" -lt 200000
ok "where numbers are numbers" sh -c "! sed 's/>[^<]*</></g' '$dir/curves/loss.svg' | grep -q 'nan\|inf'"
ok "and few of them on an axis" awk '/class="mid"/ { x++ } /<clipPath/ { if (x < 2 || x > 24) bad = 1; x = 0 } END { exit bad }' "$dir/curves/loss.svg"
ok "a run goes on behind such lines" timeout -s KILL 60 "$build/train" --config test/tiny.txt --data "$dir/data" --threads 1 --run "$dir/curves" --vqgan --resume --steps 32
{ grep -v '^vqgan.model.params.scheduler\|^vqgan.train' test/tiny.txt && printf 'vqgan.model.params.scheduler_config.params.%s\n' 'lr_start 0' 'lr_max 0' 'lr_min 0' 'warm_up_steps 0' &&
    printf 'vqgan.train.%s\n' 'steps 30' 'l2_weight 0' 'codebook_weight 0' 'flip false'; } >"$dir/still.txt"
mkdir "$dir/same" && for i in 1 2 3 4 5 6 7 8 9; do cp "$dir/data/bar/001.png" "$dir/same/$i.png"; done
ok "a loss that is one constant" timeout -s KILL 60 "$build/train" --config "$dir/still.txt" --data "$dir/same" --threads 1 --run "$dir/still" --vqgan --steps 20
ok "is" test "$(awk '$1 == "vqgan" { print $3 }' "$dir/still/log.tsv" | sort -u | wc -l)" -eq 1
ok "drawn in little" test "$(wc -c <"$dir/still/loss.svg")" -lt 20000

# ---- a state without its weights ----
weights_again() { # weights_again RUN STAGE WORD ARGUMENTS...: --resume of a finished run whose weights are not those of the state
    again=$1 stage=$2 word=$3
    shift 3
    ok "$stage: weights that are $word" train --run "$dir/$again" --resume "$@"
    ok "are said" said "$again/$stage.safetensors: was $word; now it has the weights of step [0-9]*$"
    ok "and written" cmp "$dir/$again/$stage.safetensors" "$dir/first/$stage.safetensors"
}
cp -r "$dir/first" "$dir/no" && rm "$dir/no/vqgan.safetensors" "$dir/no/scale1.safetensors"
ok "a scale without the first stage that the run trained" fails "no/vqgan.safetensors: is missing; --vqgan --resume writes it from .*no/vqgan.state.safetensors$" --run "$dir/no" --scale 2
ok "which is not taken from elsewhere" test ! -e "$dir/no/vqgan.safetensors"
ok "to schedule neither" fails "is missing; --vqgan --resume" --run "$dir/no" --schedule psim
weights_again no vqgan missing --vqgan
weights_again no scale1 missing --scale 1
head -c 30000 "$dir/first/scale1.safetensors" >"$dir/no/scale1.safetensors"
weights_again no scale1 damaged --scale 1
: >"$dir/no/vqgan.safetensors"
weights_again no vqgan damaged --vqgan
train --run "$dir/old" --vqgan --steps 5 >/dev/null
cp "$dir/old/vqgan.safetensors" "$dir/no"
ok "a first stage that is older than its state" fails "no/vqgan.safetensors: is of step 5, .*no/vqgan.state.safetensors of step 30; --vqgan --resume brings it up to date$" --run "$dir/no" --scale 2
weights_again no vqgan "older than the state" --vqgan
rm "$dir/no/vqgan.safetensors" "$dir"/no/scale1.*
ok "--all" train --run "$dir/no" --all
ok "too" said "no/vqgan.safetensors: was missing; now it has"
ok "without a lock at the end" test ! -e "$dir/no/lock" -a -s "$dir/no/samples.png"
ok "before the scales" cmp "$dir/no/scale1.safetensors" "$dir/first/scale1.safetensors"

# ---- full disks: a limit on the size of files, then a small disk ----
quiet_folder() { ! ls "$dir/$1/"*.tmp* "$dir/$1/"*-new* 2>/dev/null; }
limited() { # limited BYTES RUN ARGUMENTS...: begin under a limit that can be raised
    limit=$1 run=$2
    shift 2
    : >"$dir/said"
    prlimit --fsize="$limit": "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 --eval-every 10 --picture-every 100 --threads 1 --run "$dir/$run" "$@" >/dev/null 2>"$dir/said" &
    pid=$!
}
waiting='trying again every 0.05 s'
"$build/lpips" make "$dir/lpips.safetensors" || exit 1
if command -v prlimit >/dev/null; then
    new_run limited
    limited 100000 limited --scale 1 --steps 60
    until_there said "$waiting"
    ok "no room: the run waits" kill -0 $pid
    ok "says what it needs, and where" said "limited/scale1.state-new.safetensors: cannot write.*: File too large; 1.0 MiB needed in $dir/limited, free: .*; $waiting"
    ok "and leaves nothing half-written" quiet_folder limited
    ok "there is room" prlimit --pid $pid --fsize=200000:
    sleep 0.2
    ok "but not enough" prlimit --pid $pid --fsize=600000:
    wait $pid 2>/dev/null
    ok "enough room: the run ends well" test $? -eq 0
    ok "as if nothing had been" same limited scale1-good scale1
    ok "every step is in the log" every_step_once limited scale1 60
    ok "and waits once" test "$(grep -c "$waiting" "$dir/said")" -eq 1

    cp -r "$dir/scale1-good" "$dir/later" && cp "$(state later scale1)" "$dir/before"
    limited 100000 later --scale 1 --steps 70 --resume
    until_there said "$waiting"
    ok "no room later: the checkpoint" cmp "$(state later scale1)" "$dir/before"
    kill -TERM $pid
    wait $pid 2>/dev/null
    ok "a signal ends the waiting" test $? -eq 1
    ok "with a clear line" sh -c "tail -n 1 '$dir/said' | grep -q 'File too large.*; stopped; the checkpoint of step 60 is intact, --resume goes on from it\$'"
    ok "and leaves nothing half-written" quiet_folder later
    limited 100000 later --scale 1 --steps 70 --resume --no-wait
    wait $pid 2>/dev/null
    ok "--no-wait" test $? -eq 1
    ok "says the same at once" sh -c "tail -n 1 '$dir/said' | grep -q 'the checkpoint of step 60 is intact'"
    ok "the checkpoint is" cmp "$(state later scale1)" "$dir/before"
    ok "from which the run" train --run "$dir/later" --scale 1 --steps 70 --resume
    mkdir "$dir/encoding" "$dir/at-once" && cp "$dir/first/vqgan.safetensors" "$dir/encoding" && cp "$dir/first/vqgan.safetensors" "$dir/at-once"
    limited 8000 encoding --scale 1 --steps 60
    until_there said "$waiting"
    ok "no room while pictures are encoded: the run waits" kill -0 $pid
    ok "says for what" said "encoding/train.tokens.part: cannot write: File too large; .*; $waiting"
    ok "there is room" prlimit --pid $pid --fsize=600000:
    wait $pid 2>/dev/null
    ok "the run ends well" test $? -eq 0
    ok "as if nothing had been" same encoding scale1-good scale1
    ok "and keeps no part" test ! -e "$dir/encoding/train.tokens.part"
    limited 8000 at-once --scale 1 --steps 60 --no-wait
    wait $pid 2>/dev/null
    ok "--no-wait while encoding" test $? -eq 1
    ok "says so" sh -c "tail -n 1 '$dir/said' | grep -q 'train.tokens.part: cannot write: File too large.*; stopped; there is no checkpoint yet\$'"
    ok "what was encoded stays" test "$(wc -c <"$dir/at-once/train.tokens.part")" -gt 4000
    ok "for the next start" train --run "$dir/at-once" --scale 1 --steps 60
    ok "which goes on there" said "train.tokens.part: continuing after [0-9]* pictures"
    ok "to the same tokens" cmp "$dir/at-once/train.tokens" "$dir/first/train.tokens"
    mkdir "$dir/copied"
    limited 1000 copied --scale 1 --no-wait --config models/emoji.txt
    wait $pid 2>/dev/null
    ok "no room for the first stage" sh -c "tail -n 1 '$dir/said' | grep -q 'copied/vqgan.safetensors: cannot write: File too large.*; stopped'"
    ok "and leaves nothing half-written" test -z "$(ls "$dir/copied")"

    too_large() { # too_large BYTES FILE COMMAND...: exit status 1, a line that names the file, and nothing in $dir/large
        bytes=$1 file=$2
        shift 2
        rm -rf "$dir/large" && mkdir "$dir/large"
        prlimit --fsize="$bytes" "$build/$@" >/dev/null 2>"$dir/said"
        [ $? -eq 1 ] && tail -n 1 "$dir/said" | grep -q "large/$file: cannot write: File too large\$" && [ -z "$(ls "$dir/large")" ]
    }
    ok "a limit for ./sample" too_large 1000 o.png sample emoji -n 1 --best-of 1 -o "$dir/large/o.png"
    ok "for ./inpaint" too_large 1000 o.png inpaint emoji models/emoji/example.png --half upper --candidates 1 -o "$dir/large/o.png"
    ok "for a conversion" too_large 1000 vqgan.safetensors sample emoji --convert "$dir/large"
    ok "for LPIPS" too_large 1000 lpips.safetensors train --perceptual "$dir/lpips.safetensors" --convert-perceptual "$dir/large/lpips.safetensors"
    cp -r "$dir/scale1-good" "$dir/easy"
    ok "goes on" train --run "$dir/easy" --scale 1 --steps 70 --resume
    ok "as if nothing had been" same later easy scale1
else
    echo "SKIP a limit on the size of files: no prlimit"
fi
if mkdir "$dir/small" && mount -t tmpfs -o size=8m tmpfs "$dir/small" 2>/dev/null; then
    mounted=$dir/small
    mkdir "$dir/small/run" && cp "$dir"/first/*.tokens "$dir/first/vqgan.safetensors" "$dir/small/run"
    begin small/run $long --save-every $((steps - 1))
    until_there test -s "$dir/small/run/log.tsv"
    dd if=/dev/zero of="$dir/small/fill" bs=4096 2>/dev/null
    until_there said "$waiting"
    ok "a full disk" said "No space left on device; 1.0 MiB needed in $dir/small/run, free: 0.0 MiB; $waiting"
    rm "$dir/small/fill"
    wait $pid 2>/dev/null
    ok "that has room again" test $? -eq 0
    ok "holds the same state" same small/run whole scale1
    ok "and every step in the log" every_step_once small/run scale1 $steps
    rm -rf "$dir/small/run"
    ok "--all knows before the first step that a disk is too small" fails \
        "small/run/all: all stages will take about 1[0-9] MiB more, 8.0 MiB free: [0-9.]* MiB are missing (without --no-wait" --run "$dir/small/run/all" --all --no-wait
    ok "and makes nothing" test ! -e "$dir/small/run"
    begin small/all --all --steps 100000
    until_there said 'step 1/'
    kill -INT $pid
    wait $pid 2>/dev/null
    ok "otherwise it says what will come" said "^disk: all stages will take about .* MiB are missing; when the disk is full, training waits until there is room$"
    ok "and goes on" test -e "$dir/small/all/vqgan.state.safetensors"
else
    echo "SKIP a full disk: mounting a small tmpfs needs root"
fi

# ---- crops: several of a picture, encoded once, one of them each epoch ----
"$build/pictures" make "$dir/views" 30 16 40 && "$build/pictures" make "$dir/square" 30 16 || exit 1
{ cat test/tiny.txt && printf '%s.data.prep imagenet\n' vqgan scale; } >"$dir/views.txt"
crops() { run=$1 && shift && train --config "$dir/views.txt" --data "$dir/views" --run "$dir/$run" --scale 1 --steps 24 "$@"; }
begun() { mkdir "$dir/$1" && cp "$dir/first/vqgan.safetensors" "$dir/$1"; }
size() { wc -c <"$dir/$1/train.tokens"; }
for run in eight eight-killed two one squares squares-one threes; do begun $run; done
ok "a scale on random crops" crops eight
ok "eight of each picture, as it says" said '^crops: 8 random ones of each picture, another one each epoch; held-out pictures: the centre$'
n=$(sed -n 's/^scale1: .* million parameters, \([0-9]*\) pictures.*/\1/p' "$dir/said")
ok "memory is planned for them" said '^memory: .*, tokens of the pictures 0.1 MiB; '
ok "all of which are encoded" test "$(size eight)" -eq $((72 + n * (4 + 8 * 2 * 64 * 2)))
begin eight-killed --config "$dir/views.txt" --data "$dir/views" --scale 1 --steps 24
until_there test -s "$dir/eight-killed/train.tokens.part"
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "killed while they are encoded" test ! -e "$dir/eight-killed/train.tokens"
begin eight-killed --config "$dir/views.txt" --data "$dir/views" --scale 1 --steps 24 --resume
until_there test -f "$dir/eight-killed/scale1.state-1.safetensors"
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "and later" test "$(step_of "$(state eight-killed scale1)")" -lt 24
ok "goes on" crops eight-killed --resume --threads 2
ok "to the same state" same eight eight-killed scale1
ok "with the same tokens" cmp "$dir/eight/train.tokens" "$dir/eight-killed/train.tokens"
ok "one crop" crops one --crops 1
ok "goes along with the next scale" said '^next: .* --run .* --crops 1$'
ok "is the centre" test "$(size one)" -eq $((64 + n * (4 + 2 * 64 * 2)))
ok "as of held-out pictures in any case" cmp "$dir/one/val.tokens" "$dir/eight/val.tokens"
ok "which is another run" sh -c "! cmp -s '$dir/one/scale1.safetensors' '$dir/eight/scale1.safetensors'"
cp -r "$dir/one" "$dir/earlier" # of a version that knew no crops, as its state says nothing of them
for file in "$dir"/earlier/scale1.state*; do
    LC_ALL=C sed -i 's/"train.crops":"1",/                  /; s/,"train.checksum":"[0-9a-f]\{16\}"/                                    /' "$file"
done
ok "an earlier run" crops earlier --resume --steps 25
ok "keeps the centre" cmp "$dir/one/train.tokens" "$dir/earlier/train.tokens"
ok "another number of crops" crops one --crops 3 --resume --steps 25
ok "is encoded anew" test "$(size one)" -eq $((72 + n * (4 + 3 * 2 * 64 * 2)))
ok "goes on as it was told" crops one --resume --steps 26
ok "and is not encoded again" sh -c "! grep -q encoding '$dir/said'"
ok "yet another number of crops" crops one --crops 2 --resume --steps 27
ok "is encoded anew too" test "$(size one)" -eq $((72 + n * (4 + 2 * 2 * 64 * 2)))
ok "another seed" crops two --seed 4
ok "which the next command repeats" said '^next: .* --run .* --seed 4$'
ok "has other crops" sh -c "! cmp -s '$dir/eight/train.tokens' '$dir/two/train.tokens'"
ok "the first seed in the same run" train --config "$dir/views.txt" --data "$dir/views" --run "$dir/two" --scale 2 --steps 1
ok "has those it had" cmp "$dir/eight/train.tokens" "$dir/two/train.tokens"
ok "of square pictures there is one crop" crops squares --data "$dir/square"
ok "however many" crops squares-one --data "$dir/square" --crops 1
losses() { awk -F '\t' -v OFS='\t' '{ $8 = ""; print }' "$dir/$1/log.tsv"; } # but for the speed
ok "the run is the same" test "$(losses squares)" = "$(losses squares-one)"
sed '/data.prep/d' "$dir/views.txt" >"$dir/folder.txt"
ok "crops of a preset that has none" fails "train.crops 2: only data.prep imagenet crops at random" --config "$dir/folder.txt" --run "$dir/threes" --scale 1 --crops 2
ok "are refused" test ! -e "$dir/threes/train.tokens"
ok "a crop of each is none" train --config "$dir/folder.txt" --run "$dir/threes" --scale 1 --crops 1 --steps 1
train --vqgan --crops 2
ok "a first stage crops in any case" test $? -eq 2
sed 's/^scale.data.prep.*/&\nscale.train.crops 2/' "$dir/views.txt" >"$dir/pair.txt"
ok "the recipe may say how many" train --config "$dir/pair.txt" --data "$dir/views" --run "$dir/threes" --scale 2 --steps 1
ok "they are" said '^crops: 2 random ones'
in_use() { grep -o '[0-9]* of 16 codes are in use, perplexity [0-9.]*' "$dir/said"; }
ok "codes of all crops" train --config "$dir/views.txt" --data "$dir/views" --run "$dir/eight-codes" --vqgan --steps 5 --remap
eight=$(in_use)
ok "and of one" train --config "$dir/views.txt" --data "$dir/views" --run "$dir/one-codes" --vqgan --steps 5 --remap --crops 1
ok "are not as many" test -n "$eight" -a "$eight" != "$(in_use)"

# ---- the next command, as it is typed ----
mkdir "$dir/it's here" && cp -r "$dir/data" "$dir/it's here/my data"
ok "a first stage" "$build/train" --config test/tiny.txt --vqgan --data "$dir/it's here/my data" --run "$dir/it's here/run" --steps 5
for scale in 1 2 3; do
    cp "$dir/err" "$dir/said"
    ok "scale $scale is next" said "^next: $build/train emoji --scale $scale --config test/tiny.txt --data "
    ok "as it is typed" sh -c "$(sed -n 's/^next: //p' "$dir/said")"
done
cp "$dir/err" "$dir/said"
ok "./sample is last" said "^next: $build/sample "
ok "as it is typed" sh -c "$(sed -n 's/^next: //p' "$dir/said") -n 1 -o '$dir/last.png'"
rm "$dir/it's here/run/"scale2.*
ok "a scale again" "$build/train" --config test/tiny.txt --scale 3 --data "$dir/it's here/my data" --run "$dir/it's here/run" --resume
cp "$dir/err" "$dir/said"
ok "the next one is that which is missing" said "^next: $build/train emoji --scale 2 "

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
