"""Data sets as they lie on disk, beside Python: LSUN as its LMDB (written by the lmdb module, WebP and JPEG values) trains
and is prepared to the bit as Pillow and OpenCV prepare it in the official code; damaged values are skipped and listed.

    python3 test/test_lsun.py BUILD     BUILD: the folder that holds train and test_data

Needs the modules lmdb and PIL (Debian: python3-lmdb, python3-pil); OpenCV is compared with where it is installed.
"""
import io
import os
import random
import subprocess
import sys
import tempfile

passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAIL", what)


def photograph(seed, width, height):
    """Colours that run into each other, with some noise: what JPEG and WebP are made for."""
    r = random.Random(seed)
    coarse = Image.frombytes("RGB", (9, 7), bytes(r.randrange(256) for _ in range(9 * 7 * 3)))
    noise = Image.frombytes("RGB", (width, height), r.randbytes(width * height * 3))
    return Image.blend(coarse.resize((width, height), Image.BICUBIC), noise, 0.1)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_lmdb(path, values):
    env = lmdb.open(path, map_size=1 << 40)  # as the official scripts: far more than there is
    with env.begin(write=True) as txn:
        for key, value in values:
            txn.put(key.encode(), value)
    env.close()


def lsun(image, size):
    """imagebart/data/lsun.py:38-59 without the flip."""
    image = image.convert("RGB")
    w, h = image.size
    crop = min(w, h)
    left, top = (w - crop) // 2, (h - crop) // 2
    return image.crop((left, top, left + crop, top + crop)).resize((size, size), Image.BICUBIC).tobytes()


def ffhq(image, size):
    """albumentations 0.4.3: SmallestMaxSize, CenterCrop."""
    a = numpy.array(image.convert("RGB"))
    scale = size / min(a.shape[:2])
    h, w = (int(round(n * scale)) for n in a.shape[:2])
    a = cv2.resize(a, (w, h), interpolation=cv2.INTER_LINEAR)
    y, x = (h - size) // 2, (w - size) // 2
    return a[y:y + size, x:x + size].tobytes()


def prepared(preset, size, path):
    run = subprocess.run([build + "/test_data", "--prepare", preset, str(size), path], capture_output=True)
    check(run.returncode == 0, f"--prepare {preset} {path}: {run.stderr.decode()}")
    return run.stdout


def largest_difference(a, b):
    return max(abs(x - y) for x, y in zip(a, b)) if len(a) == len(b) and a else 999


def compare(preset, official, path, values):
    for size in (16, 64):
        ours = prepared(preset, size, path)
        theirs = b"".join(official(Image.open(io.BytesIO(v)), size) for _, v in sorted(values))
        worst = largest_difference(ours, theirs)
        print(f"{preset} {size}: {len(values)} pictures, largest difference {worst} of 255")
        check(worst == 0, f"{preset} {size}: the largest difference is {worst}")
    check(largest_difference(ours[1:], theirs[:-1]) > 0, "another picture compares equal")


def train(*arguments):
    command = [build + "/train", "--config", "test/tiny.txt", "--steps", "8", "--save-every", "4", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_training(folder, values):
    for name, part in (("cat_train", values[:14]), ("cat_val", values[14:16]), ("bed_train", values[16:30]),
                       ("bed_val", values[30:])):
        write_lmdb(f"{folder}/lsun/{name}_lmdb", part)
    for stage in (["--vqgan"], ["--scale", "1"]):
        run = train(*stage, "--data", folder + "/lsun", "--run", folder + "/run")
        check(run.returncode == 0, f"{stage} on LMDBs: {run.stderr[-300:]}")
        check("28 pictures (4 held out)" in run.stderr, f"{stage}: the split of the LMDBs: {run.stderr[:300]}")
        check("damaged pictures skipped: 1;" in run.stderr, f"{stage}: the damaged value is not told")
    with open(folder + "/run/skipped.txt") as f:
        lines = f.read().splitlines()
    check(len(lines) == 1 and "/cat_train_lmdb/data.mdb/zz00\tdamaged JPEG: " in lines[0], f"skipped.txt: {lines}")


def test_broken(folder):
    path = folder + "/lsun/bed_train_lmdb/data.mdb"
    os.truncate(path, os.path.getsize(path) // 4096 * 4096 - 4096)
    run = train("--vqgan", "--data", folder + "/lsun", "--run", folder + "/other")
    check(run.returncode == 1 and run.stderr.count("\n") == 1 and "data.mdb: the LMDB is cut short" in run.stderr,
          f"an LMDB cut short: exit status {run.returncode}, {run.stderr[-300:]}")


def main():
    values = []
    for i in range(32):
        image = photograph(i, 30 + 17 * (i % 7), 40 + 11 * (i % 5))
        kind = ("JPEG", "WEBP", "PNG", "WEBP")[i % 4]
        options = [{"quality": 75 + i % 20}, {"quality": 80}, {}, {"lossless": True}][i % 4]
        if i % 8 == 0:
            options["progressive"] = True
        values.append((f"{i:040x}", encoded(image, kind, **options)))
    with tempfile.TemporaryDirectory() as folder:
        write_lmdb(folder + "/church_outdoor_train_lmdb", values)
        compare("lsun", lsun, folder + "/church_outdoor_train_lmdb", values)
        os.mkdir(folder + "/exported")
        for key, value in values:  # as `data.py export` does: .webp, whatever is inside
            with open(f"{folder}/exported/{key}.webp", "wb") as f:
                f.write(value)
        compare("lsun", lsun, folder + "/exported", values)
        turned = [("turned", encoded(photograph(99, 60, 40), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0"
                                                                         b"\6\0\0\0\0\0\0\0"))]
        write_lmdb(folder + "/turned_lmdb", turned)
        compare("lsun", lsun, folder + "/turned_lmdb", turned)  # EXIF is ignored
        if cv2:
            compare("ffhq", ffhq, folder + "/exported", values)
        else:
            print("skipped: the comparison with OpenCV, which", sys.executable, "does not have")
        os.mkdir(folder + "/lsun")
        values[3] = ("zz00", values[0][1][:-200])
        test_training(folder, values)
        test_broken(folder)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    build = sys.argv[1]
    try:
        import lmdb
        from PIL import Image, features
    except ImportError as e:
        print(f"skipped: {e} ({sys.executable}; Debian: apt-get install python3-lmdb python3-pil)")
        sys.exit(0)
    if "nowebp" in build or "nolmdb" in build or not features.check("webp"):
        print("skipped: this build, or this Python's PIL, was made without WebP or LMDB")
        sys.exit(0)
    try:
        import cv2
        import numpy
    except ImportError:
        cv2 = None
    sys.exit(main())
