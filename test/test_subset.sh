#!/bin/sh
# The files that get CUDA twins, and the header, are written in the common subset of C11 and C++17.
passed=0 failed=0
CXX=${CXX:-g++}
if ! command -v "$CXX" >/dev/null; then
    echo "no C++ compiler: $CXX; the C++ half of this check needs one"
    failed=1
else
    for file in imagebart.h kernels/gemm.c kernels/stream.c kernels/conv.h kernels/conv.c kernels/winograd.c vqgan.h vqgan_layers.c vqgan.c training/discriminator.c training/perceptual.c kernels/transformer.h kernels/device.h kernels/device.cu kernels/layers.cu kernels/attention.cu transformer.cu kernels/decode.cu kernels/optimizer.cu; do
        if "$CXX" -std=c++17 -D_GNU_SOURCE -I. -x c++ -fsyntax-only -Wall -Wextra -Wno-unknown-pragmas \
            -Wno-missing-field-initializers -Wno-pragma-once-outside-header "$file"; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "FAIL $file is not C++17"
        fi
    done
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
