#!/bin/sh
# aarch64.sh [BUILD]: everything is compiled for 64-bit Arm, warnings being errors; then, as qemu-user computes what such a
# processor would, golden cases, a first stage and a scale that are trained for some steps, and pictures, beside those of
# the programs for this processor in BUILD. Needs Debian's gcc-aarch64-linux-gnu, qemu-user and arm64 libraries:
# .ci/run says which.
build=${1:-build/gcc-native}
cc=aarch64-linux-gnu-gcc march=armv8-a
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
export IMAGEBART_DEVICE=cpu MAKEFLAGS=
for tool in $cc qemu-aarch64; do
    command -v "$tool" >/dev/null || { echo "skipped: there is no $tool" && exit 0; }
done

# where Debian keeps what pkg-config is told of arm64
PKG_CONFIG_LIBDIR=/usr/lib/aarch64-linux-gnu/pkgconfig
export PKG_CONFIG_LIBDIR
arm() { make -s NVCC= HAVE_MPI= CC=$cc MARCH=$march "$@"; } # arm TARGET...
there=$(arm list-folder | tail -n 1)
programs="$there/golden $there/sample $there/inpaint $there/train $there/imagebart"
[ ! -f /usr/include/microhttpd.h ] || programs="$programs $there/serve"
# shellcheck disable=SC2086
ok "compiled for Arm" arm $programs $there/test_images $there/test_data $there/test_gemm $there/libimagebart.so $there/bench
cat "$dir/err"
ok "for Arm indeed" sh -c "$cc -print-file-name=libc.so >/dev/null && od -An -tx1 -j18 -N2 '$there/sample' | grep -q 'b7 00'"
emulated() { # emulated PROGRAM ARGUMENT...
    program=$1
    shift
    timeout -s KILL 240 qemu-aarch64 "$there/$program" "$@"
}

# ---- Golden cases and unit tests ----
sums() { # sums NAME COMMAND...: what it counts is added
    name=$1
    shift
    "$@" >"$dir/log" 2>&1
    line=$(tail -n 1 "$dir/log")
    p=$(expr "$line" : '\([0-9][0-9]*\) passed, 0 failed$')
    if [ -n "$p" ]; then
        passed=$((passed + p))
    else
        failed=$((failed + 1))
        echo "FAIL $name: $line"
        grep FAIL "$dir/log" | head -5
    fi
}
for c in schedules x_class gpt_class train_gpt train_x vqgan_noremap ckpt_formats; do
    sums "golden case $c" emulated golden test/golden-cases/$c
done
sums images emulated test_images

# ---- The row of "make bench" that the compiled loops give: a matrix product has little beside its multiply-adds ----
ok "inner loops of NEON" test/neon_row.sh -o "$dir/table" -std=c11 -D_GNU_SOURCE -I. -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp-simd
ok "a matrix product's" awk -F ': ' '/gemm micro_tile f32/ { found = $2 + 0 } END { exit !(found >= 1 && found < 2) }' "$dir/table"
ok "kept keys in bf16" awk -F ': ' '/kept_dots bf16/ { found = $2 + 0 } END { exit !(found >= 1 && found < 5) }' "$dir/table"

# ---- Training: the same loss; greedy pictures: the same tokens, rounding may shift a colour by one ----
close_to() { awk "BEGIN { a = $1 + 0; b = $2 + 0; d = a - b; exit !(a > 0 && d * d < 1e-6 * a * a) }"; }
loss() { awk -v stage="$2" '$1 == stage && $2 == 4 { print $3 }' "$dir/$1/log.tsv"; }
train() { # train RUN PROGRAM...
    run=$dir/$1
    shift
    "$@" --config test/tiny.txt --data "$dir/data" --run "$run" --vqgan --steps 4 &&
        "$@" --config test/tiny.txt --data "$dir/data" --run "$run" --scale 1 --steps 4
}
"$build/pictures" make "$dir/data" 40 20 || exit 1
ok "trains" train arm emulated train
ok "trains here" train here "$build/train"
for stage in vqgan scale1; do
    ok "$stage: the same loss: $(loss arm $stage) $(loss here $stage)" close_to "$(loss arm $stage)" "$(loss here $stage)"
done
draw="models/emoji -n 1 --seed 1 --best-of 1"
# shellcheck disable=SC2086
{
    ok "draws" emulated sample $draw -o "$dir/arm.png"
    cp "$dir/err" "$dir/said"
    ok "by NEON" grep -q "^processor: NEON, " "$dir/said"
    ok "draws here" "$build/sample" $draw -o "$dir/here.png"
    ok "the same picture" "$build/pictures" near "$dir/arm.png" "$dir/here.png" 2
    ok "with another seed" "$build/sample" $draw --seed 2 -o "$dir/other.png"
    ok "draws another" sh -c "! '$build/pictures' near '$dir/arm.png' '$dir/other.png' 2" # the check can fail
}
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
