/* orientation.c - how a picture was held, as its metadata say: the tag 0x112 of EXIF, or tiff:Orientation in XMP. */
#include "files/decode.h"

#include <string.h>

static int in_range(size_t v) {
    return v >= 1 && v <= 8 ? (int)v : 1;
}

int exif_orientation(const uint8_t *p, size_t n) {
    enum { TAG_ORIENTATION = 0x112, ENTRY = 12, TYPES = 10 };
    static const uint8_t bytes_of[TYPES] = {[3] = 2, [4] = 4, [8] = 2, [9] = 4}; /* of types that are whole numbers */
    if (n < 8 + ENTRY || (memcmp(p, "II*\0", 4) != 0 && memcmp(p, "MM\0*", 4) != 0)) return 0;
    const size_t hi = p[0] == 'I', lo = 1 - hi; /* offsets of a 16-bit number's two bytes */
#define U16(at) ((size_t)p[(at) + hi] << 8 | p[(at) + lo])
#define U32(at) (hi ? U16((at) + 2) << 16 | U16(at) : U16(at) << 16 | U16((at) + 2))
    const size_t ifd = U32(4);
    if (ifd > n - 2) return 0;
    const size_t entries = U16(ifd);
    for (size_t i = 0, at = ifd + 2; i < entries && at <= n - ENTRY; i++, at += ENTRY) {
        if (U16(at) != TAG_ORIENTATION) continue;
        const size_t type = U16(at + 2), bytes = type < TYPES ? bytes_of[type] : 0;
        return in_range(bytes == 2 ? U16(at + 8) : bytes == 4 ? U32(at + 8) : 0);
    }
#undef U16
#undef U32
    return 0;
}

int exif_orientation_prefixed(const uint8_t *p, size_t n) {
    enum { PREFIX = 6 };
    const int prefixed = n >= PREFIX && memcmp(p, "Exif\0\0", PREFIX) == 0;
    return prefixed ? exif_orientation(p + PREFIX, n - PREFIX) : exif_orientation(p, n);
}

/* As an attribute, tiff:Orientation="6", or as an element, <tiff:Orientation>6</tiff:Orientation>. */
int xmp_orientation(const uint8_t *p, size_t n) {
    static const char name[] = "tiff:Orientation";
    enum { NAME = sizeof name - 1 };
    for (size_t at = 0; at + NAME < n; at++) {
        if (p[at] != name[0] || memcmp(p + at, name, NAME) != 0) continue;
        size_t k = at + NAME;
        while (k < n && strchr(" \t\r\n=\"'>", p[k]) && p[k]) k++;
        if (k > at + NAME && k < n && p[k] >= '0' && p[k] <= '9') return in_range((size_t)(p[k] - '0'));
    }
    return 0;
}

/* A line with the profile's name, one with its length, then the bytes in lines of hexadecimal digits. */
int profile_orientation(const char *text, size_t n, int xmp) {
    enum { MOST = 1 << 14 };
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    uint8_t bytes[MOST];
    size_t length = 0, at = 0;
    for (int lines = 0, in_line = 0; at < n && lines < 2; at++) { /* blank lines in front do not count */
        in_line |= text[at] != '\n' && text[at] != ' ';
        if (text[at] == '\n' && in_line) lines++, in_line = 0;
    }
    for (int half = 0; at < n && length < MOST; at++) {
        const char *digit = text[at] ? strchr(digits, text[at]) : NULL;
        if (!digit) continue;
        const uint8_t v = (uint8_t)((digit - digits) % 16);
        bytes[length] = half ? (uint8_t)(bytes[length] | v) : (uint8_t)(v << 4);
        length += (size_t)half;
        half = !half;
    }
    return xmp ? xmp_orientation(bytes, length) : exif_orientation_prefixed(bytes, length);
}
