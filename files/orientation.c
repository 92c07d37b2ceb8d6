/* orientation.c - how a picture was held, as its metadata say. */
#include "files/decode.h"

#include <string.h>

int exif_orientation(const uint8_t *p, size_t n) {
    enum { TAG_ORIENTATION = 0x112, TYPE_SHORT = 3, ENTRY = 12 };
    if (n < 8 || (memcmp(p, "II*\0", 4) != 0 && memcmp(p, "MM\0*", 4) != 0)) return 1;
    int hi = p[0] == 'I', lo = 1 - hi; /* offsets of a 16-bit number's two bytes */
#define U16(at) ((unsigned)p[(at) + (size_t)hi] << 8 | p[(at) + (size_t)lo])
    size_t ifd = p[0] == 'I' ? (size_t)U16(6) << 16 | U16(4) : (size_t)U16(4) << 16 | U16(6);
    if (ifd > n - 2) return 1;
    size_t entries = U16(ifd);
    for (size_t i = 0, at = ifd + 2; i < entries && at <= n - ENTRY && n >= ENTRY; i++, at += ENTRY)
        if (U16(at) == TAG_ORIENTATION && U16(at + 2) == TYPE_SHORT)
            return U16(at + 8) >= 1 && U16(at + 8) <= 8 ? (int)U16(at + 8) : 1;
#undef U16
    return 1;
}
