"""Writes data_tables.h: what Pillow and OpenCV make of small pictures, for test_images.c.

    pip install pillow opencv-python-headless numpy
    python3 test/data_tables.py > test/data_tables.h

Pillow 9.5 with OpenCV 4.8 and Pillow 13.0 with OpenCV 5.0 print the same. New Pillow resizes rows first where that is
cheaper (height shrinks more than width), old Pillow and we never; no case below has such a shape.
"""
import cv2
import numpy as np
from PIL import Image

# (source height, width, target height, width)
FULL = [(7, 11, 5, 4), (7, 11, 13, 17), (8, 12, 4, 6), (5, 6, 5, 9), (9, 3, 4, 3), (1, 1, 2, 3), (3, 2, 1, 1)]
HASHED = [(257, 129, 64, 32), (1024, 1024, 256, 256), (100, 75, 256, 192), (333, 500, 256, 384), (31, 33, 32, 32),
          (64, 64, 32, 32), (2, 300, 1, 7), (190, 191, 191, 190)]


def picture(H, W):
    """The same formula as in test_images.c: noise, with a region of pure black and white to provoke overshoot."""
    y, x, c = np.meshgrid(np.arange(H), np.arange(W), np.arange(3), indexing="ij")
    v = (y * 7919 + x * 104729 + c * 1299709 + 12345).astype(np.uint32)
    v = v * np.uint32(2654435761)
    v ^= v >> np.uint32(15)
    v = v * np.uint32(2246822519)
    v ^= v >> np.uint32(13)
    v = (v >> np.uint32(8)) & np.uint32(255)
    return np.where((x + y) % 5 < 2, np.where(v < 128, 0, 255), v).astype(np.uint8)


def fnv(a):
    h = 0xCBF29CE484222325
    for b in a.tobytes():
        h = (h ^ b) * 0x100000001B3 & (2**64 - 1)
    return h


def linear(a, H, W):
    return cv2.resize(a, (W, H), interpolation=cv2.INTER_LINEAR)


def bicubic(a, H, W):
    return np.array(Image.fromarray(a).resize((W, H), Image.BICUBIC))


def main():
    print("/* Written by data_tables.py: pixels by Pillow (bicubic) and OpenCV (linear). */")
    print("static const uint8_t resize_pixels[] = {")
    rows, at = [], 0
    for H, W, h, w in FULL:
        for name, f in (("FILTER_LINEAR", linear), ("FILTER_BICUBIC", bicubic)):
            out = f(picture(H, W), h, w).reshape(-1)
            for i in range(0, out.size, 24):
                print("    " + ", ".join(str(v) for v in out[i:i + 24]) + ",")
            rows.append(f"    {{{H}, {W}, {h}, {w}, {name}, {at}, 0}},")
            at += out.size
    for H, W, h, w in HASHED:
        for name, f in (("FILTER_LINEAR", linear), ("FILTER_BICUBIC", bicubic)):
            rows.append(f"    {{{H}, {W}, {h}, {w}, {name}, -1, 0x{fnv(f(picture(H, W), h, w)):016x}u}},")
    print("};\n/* at: first of the pixels above, or -1: only their 64-bit FNV-1a hash is kept */")
    print("static const struct {\n    size_t H, W, h, w;\n    Filter filter;\n    int at;\n    uint64_t hash;")
    print("} resize_cases[] = {")
    print("\n".join(rows))
    print("};")


if __name__ == "__main__":
    main()
