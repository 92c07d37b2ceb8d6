/* fuzz_pickle.c - the pickle machine: the input is the object of a file of torch.save before version 1.6, whose
 * preamble is right, so that no checksum stands between the fuzzer and the machine: make fuzz */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static const char preamble[] = "\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\2M\xe9\3."
                                   "\x80\2}U\rlittle_endian\x88s.";
    return fuzz_open(preamble, sizeof preamble - 1, data, n);
}
