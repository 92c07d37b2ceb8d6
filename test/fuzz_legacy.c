/* fuzz_legacy.c - a file of torch.save before version 1.6, whole: make fuzz */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    return fuzz_open("", 0, data, n);
}
