#!/bin/sh
# test_cuda_programs.sh BUILD PROGRAMS: the programs with --device cuda beside the CPU: training in float gives the same
# losses, with a discriminator and LPIPS too, is the same bit for bit after a pause, and in both precisions can be
# sampled; the same seed gives the same tokens. PROGRAMS: the folder of those that have CUDA, emulated ones or such that
# nvcc built.
build=$(cd "$1" && pwd)
cuda=$(cd "$2" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh

train() { # train PROGRAMS RUN ARGUMENTS...
    program=$1/train run=$2
    shift 2
    "$program" --config test/tiny.txt --data "$dir/data" --save-every 2 --eval-every 4 --picture-every 100 \
        --run "$dir/$run" "$@"
}

near() { # near RUN STAGE TOLERANCE [OTHER]: losses, gradient norms and evaluations as those of the run OTHER, or cpu
    awk -v stage="$2" -v tolerance="$3" 'function off(a, b) { return (a > b ? a - b : b - a) > tolerance * (b > 0 ? b : -b) }
        NR == FNR { if ($1 == stage) for (k = 1; k <= NF; k++) want[$2, k] = $k; next }
        $1 == stage { n++; for (k = 3; k <= NF; k++) if (k != 8 && off($k, want[$2, k])) { print "step " $2 ", column " k ": " $k ", expected " want[$2, k] >"/dev/stderr"; bad = 1 } }
        END { exit bad || n < 4 }' "$dir/${4:-cpu}/log.tsv" "$dir/$1/log.tsv"
}

"$build/pictures" make "$dir/data" 40 20 || exit 1
export IMAGEBART_DEVICE=cpu
train "$build" cpu --vqgan --steps 2 >/dev/null 2>&1 || exit 1
for run in f32 parts bf16; do mkdir "$dir/$run" && cp "$dir/cpu/vqgan.safetensors" "$dir/$run"; done

train "$build" vqgan-cpu --vqgan --steps 4 >/dev/null 2>&1
ok "train the VQGAN in f32" train "$cuda" vqgan-f32 --vqgan --steps 4 --device cuda --precision f32
ok "which says where" grep -q "^device: .*vqgan, f32" "$dir/err"
ok "vqgan: losses of f32" near vqgan-f32 vqgan 1e-3 vqgan-cpu
ok "train the VQGAN in bf16" train "$cuda" vqgan-bf16 --vqgan --steps 2 --device cuda
ok "again" train "$cuda" vqgan-again --vqgan --steps 1 --device cuda
ok "and on" train "$cuda" vqgan-again --vqgan --steps 2 --device cuda --resume
ok "the same bits" cmp "$dir/vqgan-bf16/vqgan.state.safetensors" "$dir/vqgan-again/vqgan.state.safetensors"

# With a discriminator and feature matching, then with LPIPS too, then in the official order. Adam's first steps are as
# large for a gradient that is rounding noise as for any other: where it decides about a relu or a small mean, weights
# move little.
{
    cat test/tiny.txt
    echo "vqgan.model.params.lossconfig.params.disc_start 1"
    echo "vqgan.model.params.lossconfig.params.disc_num_layers 2"
    echo "vqgan.model.params.lossconfig.params.disc_ndf 8"
    echo "vqgan.model.params.lossconfig.params.perceptual_weight 1.0"
    echo "vqgan.train.disc_warm_up 1"
} >"$dir/gan.txt"
gan() { # gan PROGRAMS RUN ARGUMENTS...
    programs=$1 run=$2
    shift 2
    train "$programs" "$run" --vqgan --config "$dir/gan.txt" "$@"
}
"$build/lpips" make "$dir/lpips.safetensors" || exit 1
ok "train with a discriminator on the CPU" gan "$build" gan-cpu --steps 4 --perceptual none
ok "and in f32" gan "$cuda" gan-f32 --steps 4 --perceptual none --device cuda --precision f32
ok "which is there" grep -q "^discriminator: .* trained from step 1 on, seen from step 2 on" "$dir/err"
ok "discriminator: losses of f32" near gan-f32 vqgan 1e-3 gan-cpu
ok "train with LPIPS on the CPU" gan "$build" lpips-cpu --steps 4 --lr 1e-5 --perceptual "$dir/lpips.safetensors"
ok "and in f32" gan "$cuda" lpips-f32 --steps 4 --lr 1e-5 --perceptual "$dir/lpips.safetensors" --device cuda --precision f32
ok "which is there" grep -q "^perceptual loss: LPIPS, weight 1" "$dir/err"
ok "LPIPS: losses of f32" near lpips-f32 vqgan 1e-3 lpips-cpu
for precision in f32 bf16; do
    ok "train with a discriminator in $precision" gan "$cuda" gan-$precision-2 --steps 2 --perceptual none --device cuda --precision $precision
    ok "again" gan "$cuda" gan-$precision-1 --steps 1 --perceptual none --device cuda --precision $precision
    ok "and on" gan "$cuda" gan-$precision-1 --steps 2 --perceptual none --device cuda --precision $precision --resume
    ok "the same bits" cmp "$dir/gan-$precision-2/vqgan.state.safetensors" "$dir/gan-$precision-1/vqgan.state.safetensors"
done
{
    cat "$dir/gan.txt"
    echo "vqgan.model.params.lossconfig.params.disc_loss vanilla"
    echo "vqgan.train.official_order true"
    echo "vqgan.lightning.trainer.accumulate_grad_batches 2"
} >"$dir/in-order.txt"
export IMAGEBART_TEST_NAN_DISCRIMINATOR=vqgan:5 # of the third step
ok "in the official order, with a bad step, on the CPU" gan "$build" order-cpu --config "$dir/in-order.txt" --lr 1e-5 --steps 4 --perceptual none
ok "and in f32" gan "$cuda" order-f32 --config "$dir/in-order.txt" --lr 1e-5 --steps 4 --perceptual none --device cuda --precision f32
unset IMAGEBART_TEST_NAN_DISCRIMINATOR
ok "whose update is passed over" grep -q "^vqgan step 3: discriminator not finite: .*; its update is passed over" "$dir/err"
ok "official order: losses of f32" near order-f32 vqgan 1e-3 order-cpu
{ sed 's/^/vqgan./' test/golden-cases/vqgan_gan/config.txt && echo vqgan.train.steps 1 &&
    printf 'vqgan.model.params.scheduler_config.params.%s\n' 'lr_start 0' 'warm_up_steps 10'; } >"$dir/taken.txt"
ok "train from an official checkpoint" train "$cuda" taken --vqgan --config "$dir/taken.txt" --init test/golden-cases/vqgan_gan/model.safetensors --batch 2 --device cuda
for part in loss.discriminator.main.2. decoder.; do
    ok "$part is from there" "$build/pictures" tensors test/golden-cases/vqgan_gan/model.safetensors $part "$dir/taken/vqgan.state.safetensors" value.$part
done

train "$build" cpu --scale 1 --steps 4 >/dev/null 2>&1 || exit 1
for stage in scale2 scale3; do
    ok "train $stage on the CPU" train "$build" cpu --scale "${stage#scale}" --steps 4
    ok "train $stage in f32" train "$cuda" f32 --scale "${stage#scale}" --steps 4 --device cuda --precision f32
    ok "which says where" grep -q "^device: .*$stage, f32" "$dir/err"
    ok "$stage: losses of f32" near f32 $stage 1e-4
    ok "train $stage in bf16" train "$cuda" bf16 --scale "${stage#scale}" --steps 4 --device cuda
    ok "$stage: losses of bf16" near bf16 $stage 2e-2
done
"$cuda/train" --config test/tiny.txt --data "$dir/data" --save-every 2 --eval-every 4 --picture-every 100 --run "$dir/parts" \
    --scale 2 --steps 4 --device cuda --precision f32 >/dev/null 2>&1 &
pid=$! # the program itself, not a shell around it
while [ ! -f "$dir/parts/scale2.state.safetensors" ] && kill -0 $pid 2>/dev/null; do sleep 0.02; done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
ok "a killed run resumes" train "$cuda" parts --scale 2 --steps 4 --device cuda --precision f32 --resume
ok "and ends with the same bits" cmp "$dir/f32/scale2.state.safetensors" "$dir/parts/scale2.state.safetensors"

not() { ! "$@"; }
sample() { # sample PROGRAMS RUN OUT ARGUMENTS...
    program=$1/sample run=$2 out=$3
    shift 3
    "$program" "$dir/$run" -n 2 --seed 5 -o "$dir/$out" "$@"
}
ok "sample on the CPU" sample "$build" cpu cpu.png
ok "sample in f32" sample "$cuda" cpu f32.png --device cuda
# The same tokens: another one moves colours by tens. Decoded, a float on the edge between two of the 255 steps may fall
# to either side.
ok "the same pictures" "$build/pictures" near "$dir/cpu.png" "$dir/f32.png" 1
ok "sample with options" sample "$build" cpu options-cpu.png --temperature 0.8,1,1.2 --top-k 5 --class bar
ok "the same on the GPU" sample "$cuda" cpu options.png --temperature 0.8,1,1.2 --top-k 5 --class bar --device cuda
ok "the same pictures" "$build/pictures" near "$dir/options-cpu.png" "$dir/options.png" 1
ok "sample in bf16" sample "$cuda" cpu bf16.png --device cuda --weights bf16
ok "inpaint on the CPU" "$build/inpaint" "$dir/cpu" "$dir/cpu.png" --half upper -n 1 --candidates 3 --chain-length 1 --seed 1 -o "$dir/inpaint-cpu.png"
ok "inpaint in f32" "$cuda/inpaint" "$dir/cpu" "$dir/cpu.png" --half upper -n 1 --candidates 3 --chain-length 1 --seed 1 -o "$dir/inpaint.png" --device cuda
ok "the same pictures" "$build/pictures" near "$dir/inpaint-cpu.png" "$dir/inpaint.png" 1

# Moments in bf16: the same numbers round them, so that only what float sums differ by comes between the losses.
for run in states states-cpu states-parts; do mkdir "$dir/$run" && cp "$dir/cpu/vqgan.safetensors" "$dir/$run"; done
ok "moments in bf16 on the CPU" train "$build" states-cpu --scale 2 --steps 4 --bf16-states
ok "moments in bf16" train "$cuda" states --scale 2 --steps 4 --bf16-states --device cuda --precision f32
ok "the same losses" near states scale2 1e-3 states-cpu
train "$cuda" states-parts --scale 2 --steps 2 --bf16-states --device cuda --precision f32 >/dev/null 2>&1
ok "and on" train "$cuda" states-parts --scale 2 --steps 4 --device cuda --precision f32 --resume
ok "a smaller state" test "$(wc -c <"$dir/states/scale2.state.safetensors")" -lt "$(wc -c <"$dir/f32/scale2.state.safetensors")"

mkdir "$dir/guided" && cp "$dir/cpu/vqgan.safetensors" "$dir/guided"
for scale in 1 2 3; do train "$build" guided --scale $scale --steps 2 --label-dropout 0.5 >/dev/null 2>&1; done
ok "guidance on the CPU" sample "$build" guided guided-cpu.png --guidance 2.5,1,0 --class bar --top-k 9
ok "guidance" sample "$cuda" guided guided.png --guidance 2.5,1,0 --class bar --top-k 9 --device cuda
ok "the same pictures" "$build/pictures" near "$dir/guided-cpu.png" "$dir/guided.png" 1
ok "unguided" sample "$cuda" guided unguided.png --class bar --top-k 9 --device cuda
ok "others without" not "$build/pictures" near "$dir/guided.png" "$dir/unguided.png" 1
ok "guidance in inpainting on the CPU" "$build/inpaint" "$dir/guided" "$dir/cpu.png" --half upper -n 1 --candidates 3 --chain-length 1 --seed 1 --guidance 2 --class bar -o "$dir/inpaint-guided-cpu.png"
ok "guidance in inpainting" "$cuda/inpaint" "$dir/guided" "$dir/cpu.png" --half upper -n 1 --candidates 3 --chain-length 1 --seed 1 --guidance 2 --class bar -o "$dir/inpaint-guided.png" --device cuda
ok "the same pictures" "$build/pictures" near "$dir/inpaint-guided-cpu.png" "$dir/inpaint-guided.png" 1

# Where nothing is said: a GPU if there is one; for a run, where it has been.
anywhere() { env -u IMAGEBART_DEVICE "$@"; }
ok "the default is the GPU" anywhere "$cuda/sample" "$dir/cpu" -n 2 --seed 5 -o "$dir/default.png"
ok "which says so and names the other" grep -q "^device: .*; in f32 .*--device cpu: the processor" "$dir/err"
ok "the same picture" cmp "$dir/default.png" "$dir/f32.png"
ok "the CPU if wanted" anywhere "$cuda/sample" "$dir/cpu" -n 2 --seed 5 -o "$dir/wanted.png" --device cpu
ok "which says so and names the other" grep -q "^device: CPU (--device cuda: the GPU)" "$dir/err"
ok "the CPU's picture" cmp "$dir/wanted.png" "$dir/cpu.png"
refused_late 2 "int8 is for --device cpu" anywhere "$cuda/sample" "$dir/cpu" -n 2 --weights int8
ok "a run on the CPU" anywhere "$cuda/train" --config test/tiny.txt --data "$dir/data" --run "$dir/states-cpu" --scale 2 --steps 5 --resume
ok "stays there" grep -q "^device: CPU (--device cuda: the GPU)" "$dir/err"
ok "a run on the GPU" anywhere "$cuda/train" --config test/tiny.txt --data "$dir/data" --run "$dir/states" --scale 2 --steps 5 --resume
ok "stays there" grep -q "^device: .*; scale2, f32 (--device cpu: the processor)" "$dir/err"
ok "it moves if told" train "$cuda" states --scale 2 --steps 6 --resume --device cpu
ok "which is said" grep -q "scale2: trained on cuda in f32 so far, now on cpu in f32: another run" "$dir/err"

refused_late 2 "int8" sample "$cuda" cpu no.png --device cuda --weights int8
refused_late 2 "expected f32, bf16x3 or bf16" train "$cuda" f32 --scale 1 --device cuda --precision f16

# The benchmark works, and its table has a number in every row when PyTorch's are there.
awk 'BEGIN { n = split("train compiled x,train compiled gpt,train eager x,train eager gpt,draw x one,draw x many,draw gpt one,draw gpt many,decode one,decode many,decode compiled many,encode many,stage step", name, ",")
    for (i = 1; i <= n; i++) print name[i] "\t" 0.5 }' >"$dir/beside.tsv"
ok "bench_cuda" "$cuda/bench_cuda" tiny --beside "$dir/beside.tsv"
cp "$dir/out" "$dir/table"
ok "a table of 18 rows" test "$(sed '1,/^requirement/d' "$dir/table" | grep -c '[0-9]\.[0-9]')" = 18
ok "without gaps" not grep -q "no PyTorch\|nan\|inf" "$dir/table"
ok "10 of them required" test "$(sed '1,/^requirement/d' "$dir/table" | grep -c ' [<>] ')" = 10
refused_late 1 "line 1 is not a name" "$cuda/bench_cuda" tiny --beside test/tiny.txt

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
