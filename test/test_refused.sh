#!/bin/sh
# test_refused.sh BUILD: what make, test/golden and scripts of test/ are asked wrongly is refused in one line, before anything
# is compiled or computed; what make planted leaves out is said.
build=$(cd "$1" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. test/lib.sh
unset MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL NVCC PTXSIM CUDA_PTX_ORDERS CUDA_PTX_PARTS FAULTS STEPS BUILT

refused() { # refused STATUS WORD COMMAND...: with one line, on stderr alone, that holds WORD
    refused_late "$@"
    ok "in one line" test "$(cat "$dir/out" "$dir/err" | wc -l)" = 1
}
planted() { EMULATION=false OBJECTS='' LIBRARIES='' PTX='' test/planted.sh "$@"; }
only_ptx=$(awk '/^fault:/ { fault = $2 } /^emulation: *green/ { print fault; exit }' test/planted.txt)

# ---- make ----
none=$dir/none
refused 2 "no such fault: bogus; test/planted.txt" make planted NVCC= FAULTS="attention-barrier bogus"
refused 2 "PTXSIM=$none needs nvcc" make planted NVCC= PTXSIM="$none"
for target in planted test-cuda-ptx; do
    refused 2 "PTXSIM=$none: there is no build.sh" make $target NVCC=cat PTXSIM="$none"
done
refused 2 "no such order: bogus; expected some of: plain reverse" make test-cuda-ptx CUDA_PTX_ORDERS="plain bogus"
refused 2 "no such step: bogus; expected some of: test memcheck" make on-gpu STEPS="test bogus"
refused 2 "BUILT=$none.tar.xz: it is not there" make on-gpu BUILT="$none.tar.xz"
refused 2 "NVCC=$none/nvcc: no such program" make NVCC="$none/nvcc"

# ---- Scripts ----
refused 1 "no such fault: bogus; test/planted.txt" planted "$dir" bogus
ok "a fault is named that only the PTX shows" test -n "$only_ptx"
refused_late 1 "nothing is left" planted "$dir" "$only_ptx"
cp "$dir/out" "$dir/said"
ok "it is skipped aloud" grep -q "^skipped: 1 that only the PTX shows: $only_ptx$" "$dir/said"
ok "and that the PTX is not tried" grep -q "^nvcc's PTX is not tried" "$dir/said"
echo x >"$dir/bad.tar.xz"
refused 1 "BUILT=$dir/bad.tar.xz: cannot be unpacked" test/on_gpu.sh "$dir/bad.tar.xz"

# ---- One layer: what make check asks before it runs any ----
if [ -x "$build/test_layers_double" ]; then
    ok "layers, or how they begin" "$build/test_layers_double" --has gelu conv
    "$build/test_layers_double" --has gelu bogus >"$dir/said"
    ok "another is refused" test $? -eq 1
    ok "and named, with the list" grep -q "^no such layer: bogus; there are conv, group_norm, " "$dir/said"
fi

# ---- test/golden ----
cases=test/golden-cases/schedules
for arguments in "--device wrong $cases" "$cases --device wrong"; do
    # shellcheck disable=SC2086
    refused 2 "--device wrong: expected cpu or cuda" "$build/golden" $arguments
done
refused 2 "unknown option --bogus" "$build/golden" --bogus $cases
refused 2 "--precision bf17: expected" "$build/golden" $cases --precision bf17
refused 2 "--precision bf16 is for --device cpu" "$build/golden" --precision bf16 --device cuda $cases
refused 2 "expected a folder" "$build/golden" --selftest
ok "options in any order" "$build/golden" $cases --device cpu
ok "are obeyed" "$build/golden" test/golden-cases/gpt_class --selftest
cp "$dir/out" "$dir/said"
ok "all of them" grep -q "^selftest: expectations made NaN" "$dir/said"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
