"""imagebart.py - libimagebart from Python, by ctypes alone: pictures as numpy arrays (count, side, side, 3), or as bytes
where numpy is not installed. Make it with "make lib"; IMAGEBART_LIBRARY names the file if it is not found.

    python3 dev/imagebart.py emoji picture.png class_name=food seed=7     # as ./sample emoji -n 1 --class food --seed 7
"""
import ctypes as c, glob, os, struct, sys, zlib
try:
    import numpy
except ImportError:
    numpy = None

PROGRESS = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_size_t, c.c_size_t, c.c_size_t)
PREVIEW = c.CFUNCTYPE(None, c.c_void_p, c.c_size_t, c.c_size_t, c.POINTER(c.c_uint8))
class Shape(c.Structure):
    _fields_ = [(name, c.c_size_t) for name in "side h w K scales classes".split()]
class Options(c.Structure): # as sampling/libimagebart.h has it
    _fields_ = [("bytes", c.c_size_t), ("count", c.c_size_t), ("seed", c.c_uint64), ("first", c.c_uint64),
                *((name, c.c_char_p) for name in "class_name temperature top_k guidance chain_length".split()),
                ("best_of", c.c_size_t), ("progress", PROGRESS), ("preview", PREVIEW), ("user", c.c_void_p)]

here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
found = os.environ.get("IMAGEBART_LIBRARY") or next(iter(glob.glob(here + "/build/*/libimagebart.so")), "libimagebart.so.1")
lib = c.CDLL(found)
lib.imagebart_error.restype = c.c_char_p
lib.imagebart_close.argtypes = [c.c_void_p]

class Model:
    def __init__(self, name="emoji", weights=None):
        self.handle, self.shape = c.c_void_p(), Shape()
        self.call("open", c.byref(self.handle), name.encode(), weights and weights.encode())
        lib.imagebart_get_shape(self.handle, c.byref(self.shape))
        self.picture, self.grid = (self.shape.side, self.shape.side, 3), (self.shape.h, self.shape.w)
    def close(self):
        self.handle = lib.imagebart_close(self.handle)
    def call(self, name, *arguments):
        if getattr(lib, "imagebart_" + name)(*arguments): raise RuntimeError(lib.imagebart_error().decode())
    def buffers(self, n): # pictures and their tokens
        return (c.c_uint8 * (n * 3 * self.shape.side ** 2))(), (c.c_int32 * (n * self.shape.h * self.shape.w))()
    def arrays(self, n, rgb, tokens):
        if numpy is None: return bytes(rgb), list(tokens)
        return numpy.ctypeslib.as_array(rgb).reshape(n, *self.picture), numpy.ctypeslib.as_array(tokens).reshape(n, *self.grid)
    def options(self, count=1, progress=None, preview=None, **given): # progress(scale, done, of): true cancels
        texts = {k: str(v).encode() if k in "class_name temperature top_k guidance chain_length" else v for k, v in given.items()}
        return Options(c.sizeof(Options), count, progress=PROGRESS(lambda user, *at: bool(progress(*at))) if progress else PROGRESS(),
                       preview=PREVIEW(lambda user, k, scale, rgb: preview(k, scale, rgb)) if preview else PREVIEW(), **texts)
    def sample(self, count=1, **options):
        o, out = self.options(count, **options), self.buffers(count)
        self.call("sample", self.handle, c.byref(o), *out)
        return self.arrays(count, *out)
    def inpaint(self, picture, keep, count=1, **options): # keep: a byte for each pixel, 0 = draw anew
        o, out = self.options(count, **options), self.buffers(count)
        self.call("inpaint", self.handle, c.byref(o), bytes(picture), bytes(keep), *out)
        return self.arrays(count, *out)

def write_png(path, side, rgb):
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + rgb[3 * side * y:3 * side * (y + 1)] for y in range(side))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))

if __name__ == "__main__":
    model, options = Model(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[3:])
    pictures, tokens = model.sample(**{k: int(v) if v.isdigit() else v for k, v in options.items()})
    write_png(sys.argv[2], model.shape.side, bytes(pictures))
