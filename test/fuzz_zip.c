/* fuzz_zip.c - a zip archive of torch.save, whole: make fuzz */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    return fuzz_open("", 0, data, n);
}
