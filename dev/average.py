#!/usr/bin/python3
"""average.py A.safetensors B.safetensors W OUT: (1-W) A + W B of two files that ./train stored as f16.

Two points of one training run often average to a better model than either: it keeps what both know."""
import json
import struct
import sys


def read(path):
    data = open(path, "rb").read()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + n]), data[:8 + n], data[8 + n:]


a, b, w, out = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
header, head, x = read(a)
other, _, y = read(b)
mixed = bytearray(x)
for name, entry in header.items():
    if entry.get("dtype") == "F16":
        (begin, end), (first, last) = entry["data_offsets"], other[name]["data_offsets"]
        half = "<%de" % ((end - begin) // 2)
        pairs = zip(struct.unpack(half, x[begin:end]), struct.unpack(half, y[first:last]))
        mixed[begin:end] = struct.pack(half, *((1 - w) * p + w * q for p, q in pairs))
open(out, "wb").write(head + bytes(mixed))
