#!/bin/sh
# test_precision.sh BUILD: ./train --precision and ./sample --weights on a CPU, in bf16x3 and in bf16: both stages learn, with a
# discriminator and LPIPS too, near what f32 learns, to the same bits after a pause and for any number of threads; a run
# keeps its precision, and says when it gets another; pictures do not depend on batch, block or threads.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh

"$build/pictures" make "$dir/data" 40 20 || exit 1
"$build/lpips" make "$dir/lpips.safetensors" || exit 1
{
    sed 's/attn_resolutions -/attn_resolutions 8/' test/tiny.txt
    printf 'vqgan.model.params.lossconfig.params.%s\n' 'disc_start 3' 'disc_num_layers 2' 'disc_ndf 8' 'perceptual_weight 0.1'
    echo 'vqgan.train.disc_warm_up 2'
} >"$dir/config.txt"
train() { # train RUN ARGUMENTS...
    run=$1
    shift
    "$build/train" --config "$dir/config.txt" --data "$dir/data" --run "$dir/$run" --save-every 5 --eval-every 10 "$@"
}
near() { # near RUN STAGE STEPS MOST: the losses of so many first steps are those of the run in f32, but for MOST of them
    awk -v stage="$2" -v steps="$3" -v most="$4" 'FNR == 1 { file++ } $1 == stage && $2 <= steps { x[file, $2] = $3; n++ }
        END { for (i = 1; i <= steps; i++) { d = x[1, i] - x[2, i]; if (d < 0) d = -d; if (!(d <= most * x[1, i])) exit 1 }
            exit n != 2 * steps }' "$dir/f32/log.tsv" "$dir/$1/log.tsv"
}
falls() { # falls RUN STAGE: the mean loss of the last 5 steps is below that of the first 5
    awk -v stage="$2" '$1 == stage { x[++n] = $3 } END { for (i = 1; i <= 5; i++) { a += x[i]; b += x[n - 5 + i] }
        exit n < 20 || !(b < a) }' "$dir/$1/log.tsv"
}

killed() { # killed RUN STAGE ARGUMENTS...: by SIGKILL after its second checkpoint, with one thread; goes on with two
    run=$1 stage=$2
    shift 2
    killed_at "$dir/$run/$stage.state-1.safetensors" "$build/train" --config "$dir/config.txt" --data "$dir/data" \
        --run "$dir/$run" --save-every 5 --eval-every 10 --threads 1 "$@"
    train "$run" --resume --threads 2 "$@"
}

first="--vqgan --perceptual $dir/lpips.safetensors"
# shellcheck disable=SC2086
ok "a first stage in f32" train f32 $first
for t in 1 3; do ok "scale $t in f32" train f32 --scale $t; done
for precision in bf16x3 bf16; do
    most=0.001 # of a loss
    [ $precision = bf16 ] && most=0.05
    for stage in vqgan scale1 scale3; do
        arguments=$first
        [ $stage = vqgan ] || arguments="--scale ${stage#scale}"
        # shellcheck disable=SC2086
        ok "$stage in $precision" train $precision $arguments --precision $precision
        ok "as is said" grep -q "^processor: .*; products in $precision" "$dir/err"
        ok "its state too" grep -aq "\"train.device\":\"cpu $precision\"" "$dir/$precision/$stage.state.safetensors"
        ok "it learns" falls $precision $stage
        ok "at first as f32" near $precision $stage 3 $most
        # shellcheck disable=SC2086
        ok "killed, it goes on, in the same precision" killed killed-$precision $stage $arguments --precision $precision
        ok "to the same bits" cmp "$dir/$precision/$stage.state.safetensors" "$dir/killed-$precision/$stage.state.safetensors"
        for run in $precision killed-$precision; do cp "$dir/f32/vqgan.safetensors" "$dir/$run/vqgan.safetensors"; done
    done
    ok "tokens are those of f32" cmp "$dir/f32/train.tokens" "$dir/$precision/train.tokens"
    cp -r "$dir/$precision" "$dir/other"
    ok "another precision from here on" train other --scale 1 --steps 32 --resume --precision f32
    ok "is said" grep -q "^scale1: trained on cpu in $precision so far, now on cpu in f32: another run" "$dir/err"
    rm -r "$dir/other"
done
ok "what was trained in f32" train f32 --scale 1 --steps 32 --resume --precision bf16
ok "may go on in bf16, which is said" grep -q '^scale1: trained on cpu in f32 so far, now on cpu in bf16: another run' "$dir/err"
refused_late 2 "expected f32, bf16x3 or bf16" train f32 --scale 1 --precision f16

# ---- drawing: alike for any batch, block and threads ----
draw() { # draw OUT ARGUMENTS...
    out=$1
    shift
    "$build/sample" "$dir/f32" -n 3 --seed 5 --chain "$dir/$out.png" -o "$dir/$out-last.png" "$@"
}
ok "scale 2" train f32 --scale 2
for weights in f32 bf16x3 bf16 int8; do
    products=$weights
    [ $weights = int8 ] && products=bf16
    ok "draw in $weights" draw $weights --weights $weights
    ok "as it says" grep -q "^processor: .*; weights in $weights, products in $products" "$dir/err"
    ok "one by one" draw one --weights $weights --batch 1 --block 1 --threads 1
    ok "the same picture" cmp "$dir/$weights.png" "$dir/one.png"
    ok "complete in $weights" "$build/inpaint" "$dir/f32" "$dir/data/bar/001.png" --half upper --seed 1 --weights $weights -o "$dir/$weights-half.png"
done
ok "bf16x3 draws what f32 does" "$build/pictures" near "$dir/f32.png" "$dir/bf16x3.png" 1

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
