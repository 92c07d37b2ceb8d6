#!/bin/sh
# test_plain.sh BUILD: the programs without kernels/ (make PLAIN=1), which compute by the root's plain loops alone: a tiny
# model learns, is resumed to the same bits, is sampled and inpainted with; the bundled model draws a picture of 64x64.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh

train() {
    "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 --eval-every 10 --picture-every 20 "$@"
}
killed() { # killed STAGE ARGUMENTS...: SIGKILL after the first checkpoint, then resumed to the end
    state=$dir/parts/$1.state.safetensors
    shift
    killed_at "$state" "$build/train" --config test/tiny.txt --data "$dir/data" --save-every 5 --eval-every 10 \
        --picture-every 20 --run "$dir/parts" "$@"
    train --run "$dir/parts" "$@" --resume
}
falls() { # falls LOG STAGE: the mean loss of the last 5 steps is below that of the first 5
    awk -v stage="$2" '$1 == stage { x[++n] = $3 } END { for (i = 1; i <= 5; i++) { a += x[i]; b += x[n - 5 + i] }
        exit n < 20 || !(b < a) }' "$1"
}
picture() { # picture FILE SIDE: is a PNG of that width and height
    [ "$(od -An -tx1 -j 16 -N 8 "$1" | tr -d ' \n')" = "$(printf '%08x%08x' "$2" "$2")" ]
}

"$build/pictures" make "$dir/data" 24 20 || exit 1
for stage in vqgan scale1 scale2 scale3; do
    case $stage in
    vqgan) arguments=--vqgan ;;
    *) arguments="--scale ${stage#scale}" ;;
    esac
    # shellcheck disable=SC2086
    ok "train $stage" train --run "$dir/run" $arguments --steps 20
    ok "$stage learns" falls "$dir/run/log.tsv" $stage
    # shellcheck disable=SC2086
    ok "$stage killed and resumed" killed $stage $arguments --steps 20
    ok "$stage the same weights" cmp "$dir/run/$stage.state.safetensors" "$dir/parts/$stage.state.safetensors"
done
{
    cat test/tiny.txt
    printf 'vqgan.model.params.lossconfig.params.%s\n' "disc_start 3" "disc_num_layers 2" "disc_ndf 8"
} >"$dir/gan.txt"
ok "train with a discriminator" train --run "$dir/gan" --vqgan --config "$dir/gan.txt" --steps 6
ok "sample" "$build/sample" "$dir/run" -n 2 --seed 7 -o "$dir/a.png" --chain "$dir/chain.png"
ok "sample again" "$build/sample" "$dir/run" -n 2 --seed 7 -o "$dir/b.png" --batch 1 --block 1
ok "the same picture" cmp "$dir/a.png" "$dir/b.png"
ok "inpaint" "$build/inpaint" "$dir/run" "$dir/data/bar/001.png" --half upper -n 1 --candidates 2 --chain-length 1 --seed 1 -o "$dir/c.png"
ok "the bundled model" "$build/sample" emoji -n 1 --seed 1 --class food -o "$dir/emoji.png"
ok "draws a picture of 64x64" picture "$dir/emoji.png" 64
refused_late 2 "need kernels/" "$build/sample" emoji -n 1 --weights bf16 -o "$dir/no.png"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
