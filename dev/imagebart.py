"""imagebart.py - libimagebart from Python, by ctypes alone: pictures as numpy arrays (height, width, 3), or as bytes where
numpy is not installed. Make it with "make lib"; IMAGEBART_LIBRARY names the file if it is not found.

    python3 dev/imagebart.py emoji picture.png class_name=food seed=7     # as ./sample emoji -n 1 --class food --seed 7
"""
import ctypes as c, glob, math, os, struct, sys, warnings, zlib
try:
    import numpy
except ImportError:
    numpy = None

def structure(*fields): # as sampling/libimagebart.h has it
    return type("Structure", (c.Structure,), {"_fields_": [(name, kind) for kind, names in fields for name in names.split()]})
TEXTS = "class_name temperature top_k guidance chain_length"
STEP = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_size_t, c.c_size_t, c.c_size_t)
Shape = structure((c.c_size_t, "side h w K scales classes"))
Picture = structure((c.c_size_t, "number scale width height"), (c.POINTER(c.c_uint8), "rgb alpha"), (c.POINTER(c.c_int32), "tokens"),
                    (c.c_int32, "label"), (c.c_double, "bound"), (c.POINTER(c.c_float), "entropy"),
                    (c.c_void_p, "profile"), (c.c_size_t, "profile_bytes"), (c.POINTER(c.c_int32), "chain"), (c.c_char_p, "note"))
PICTURE = c.CFUNCTYPE(c.c_int, c.c_void_p, c.POINTER(Picture))
Options = structure((c.c_size_t, "bytes count"), (c.c_uint64, "seed first"), (c.c_char_p, TEXTS), (c.c_size_t, "best_of"),
                    (c.c_void_p, "progress preview user"), (STEP, "step"), (PICTURE, "picture"), (c.c_int, "previews guesses chains"))
Image = structure((c.c_char_p, "data"), (c.c_size_t, "bytes width height"))
Edit = structure((c.c_size_t, "bytes"), (Image, "image mask"), (c.c_char_p, "half"), (c.c_size_t, "window outside extend"),
                 (c.c_int, "invert official paste"))

here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
found = os.environ.get("IMAGEBART_LIBRARY") or next(iter(glob.glob(here + "/build/*/libimagebart.so")), "libimagebart.so.1")
lib = c.CDLL(found)
lib.imagebart_error.restype = lib.imagebart_class_name.restype = lib.imagebart_device.restype = c.c_char_p

def array(at, *shape): # a copy
    raw = c.string_at(at, c.sizeof(at._type_) * math.prod(shape))
    return numpy.frombuffer(raw, at._type_).reshape(shape) if numpy else raw
def encoded(x): return None if x is None else str(x).encode()
def given(x): # an image: bytes of a file, or (pixels, width, height)
    return Image(x, len(x)) if isinstance(x, bytes) else Image(bytes(x[0]), 0, *x[1:]) if x else Image()

class Model:
    def __init__(self, name="emoji", weights=None, device=None):
        self.handle, self.shape = c.c_void_p(), Shape()
        self.call("open_on", c.byref(self.handle), encoded(name), encoded(weights), encoded(device))
        lib.imagebart_get_shape(self.handle, c.byref(self.shape))
        self.device = lib.imagebart_device(self.handle).decode()
        self.classes = [lib.imagebart_class_name(self.handle, c.c_size_t(k)).decode() for k in range(self.shape.classes)]
    def close(self):
        lib.imagebart_close(self.handle)
        self.handle = None
    def call(self, name, *arguments):
        if getattr(lib, "imagebart_" + name)(*arguments): raise RuntimeError(lib.imagebart_error().decode())
    def draw(self, call, *edit, step=None, seen=None, **options): # step(scale, done, of), seen(Picture): true cancels
        pictures, s, notes = [], self.shape, set()
        def picture(user, p):
            if p[0].note: notes.add(p[0].note.decode())
            if p[0].scale == 0: pictures.append((array(p[0].rgb, p[0].height, p[0].width, 3), array(p[0].tokens, s.h, s.w)))
            return bool(seen and seen(p[0]))
        o = Options(c.sizeof(Options), step=STEP(lambda user, *at: bool(step and step(*at))), picture=PICTURE(picture),
                    **{k: encoded(v) if k in TEXTS else v for k, v in options.items()})
        self.call(call, self.handle, c.byref(o), *edit)
        for note in notes: warnings.warn(note, stacklevel=3) # what of an edit's files was left out; a kept part unlike all learnt
        return pictures
    def sample(self, count=1, **options): # a list of (picture, tokens)
        return self.draw("sample", None, None, count=count, **options)
    def complete(self, image, mask=None, half=None, window=0, outside=0, extend=0, invert=0, paste=1, **options): # the same
        e = Edit(c.sizeof(Edit), given(image), given(mask), encoded(half), window, outside, extend, invert, 0, paste)
        return self.draw("complete", c.byref(e), **options)

def write_png(path, width, rgb):
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height = len(rgb) // (3 * width)
    rows = b"".join(b"\0" + rgb[3 * width * y:3 * width * (y + 1)] for y in range(height))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))

if __name__ == "__main__":
    model, options = Model(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[3:])
    [(picture, tokens)] = model.sample(**{k: int(v) if v.isdigit() else v for k, v in options.items()})
    write_png(sys.argv[2], model.shape.side, bytes(picture))
