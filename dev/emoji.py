#!/usr/bin/python3
"""Draw the picture set that the bundled example models are trained on.

Every emoji of Unicode's list is taken from the Noto Color Emoji font, put on
white, padded to a square and scaled down:

    data/emoji/train/<group>/<codepoints>.png
    data/emoji/val/<group>/<codepoints>.png

<group> is one of the nine groups of emoji-test.txt (smileys, people, animals,
food, travel, activities, objects, symbols, flags); <codepoints> is the full
sequence in hexadecimal, joined by "-", e.g. 1f9d1-200d-1f373.png.  The tenth
group of that file, "Component" (four bare hair styles), is drawn too and put
into people.  People come without skin tones, in the font's yellow; with
--skin-tones all of them are drawn, and are half of the set.

Needs, on Debian:
    apt install python3-fonttools python3-pil fonts-noto-color-emoji unicode-data

The output depends only on the two input files and on the Pillow release.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
from collections import Counter

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"

# Heading in emoji-test.txt -> folder.
GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Component": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
FOLDERS = list(dict.fromkeys(GROUPS.values()))

VAL_PERCENT = 5
VS16 = 0xFE0F                               # "show me as a picture"
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)

# Some emoji have one code point as long as both people share a skin tone, and
# are spelled person + ZWJ + person when the tones differ.  It is the same
# picture, so both spellings must fall on the same side of the split.
SAME_PICTURE = {
    (0x1F469, 0x200D, 0x1F91D, 0x200D, 0x1F469): (0x1F46D,),  # women holding hands
    (0x1F469, 0x200D, 0x1F91D, 0x200D, 0x1F468): (0x1F46B,),  # woman and man
    (0x1F468, 0x200D, 0x1F91D, 0x200D, 0x1F468): (0x1F46C,),  # men
    (0x1F9D1, 0x200D, 0x2764, 0x200D, 0x1F48B, 0x200D, 0x1F9D1): (0x1F48F,),  # kiss
    (0x1F9D1, 0x200D, 0x2764, 0x200D, 0x1F9D1): (0x1F491,),   # couple with heart
    (0x1FAF1, 0x200D, 0x1FAF2): (0x1F91D,),                   # handshake
}


def die(text):
    sys.exit("emoji.py: " + text)


try:
    from fontTools.ttLib import TTFont
except ImportError:
    die("the Python module fontTools is missing (Debian package python3-fonttools)")
try:
    from PIL import Image
except ImportError:
    die("the Python module PIL is missing (Debian package python3-pil)")


# ---------------------------------------------------------------- the list

def read_sequences(path):
    """The (folder, code points) pairs of emoji-test.txt, in file order."""
    out = []
    folder = None
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.startswith("# group:"):
                name = line.split(":", 1)[1].strip()
                if name not in GROUPS:
                    die(f"{path}: unknown group '{name}'")
                folder = GROUPS[name]
            body = line.split("#", 1)[0]
            if ";" not in body:
                continue
            points, status = body.split(";")
            if status.strip() in ("fully-qualified", "component"):
                out.append((folder, tuple(int(p, 16) for p in points.split())))
    return out


def split_key(points):
    """The sequence without skin tones and VS16: what the split looks at."""
    bare = tuple(p for p in points if p != VS16 and p not in SKIN_TONES)
    return SAME_PICTURE.get(bare, bare) or points   # a lone skin tone stays


def file_stem(points):
    return "-".join(f"{p:04x}" for p in points)


def is_val(points):
    """5 % of the emoji, picked by a hash, so the order does not matter."""
    digest = hashlib.sha256(file_stem(split_key(points)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VAL_PERCENT


# ---------------------------------------------------------------- the font

class EmojiFont:
    """Finds the colour bitmap of a code point sequence.

    A sequence becomes glyphs through cmap, then the font's GSUB ligatures
    join them to one glyph, whose PNG lies in CBDT.
    """

    def __init__(self, path):
        font = TTFont(path)
        for tag in ("cmap", "GSUB", "CBDT", "CBLC"):
            if tag not in font:
                die(f"{path}: no {tag} table; this needs the bitmap (CBDT) build of "
                    "Noto Color Emoji, as in Debian's fonts-noto-color-emoji")
        self.cmap = font.getBestCmap()
        self.lookups = self._ccmp_lookups(font["GSUB"].table)
        self.bitmaps = font["CBDT"].strikeData[0]       # glyph name -> bitmap

    @staticmethod
    def _ccmp_lookups(gsub):
        """The ligature lookups of the 'ccmp' feature, in order, each as
        {first glyph: [(following glyphs, result), ...]}."""
        indices = sorted({i for record in gsub.FeatureList.FeatureRecord
                          if record.FeatureTag == "ccmp"
                          for i in record.Feature.LookupListIndex})
        lookups = []
        for i in indices:
            table = {}
            for sub in gsub.LookupList.Lookup[i].SubTable:
                if sub.LookupType == 7:                 # extension: unwrap
                    sub = sub.ExtSubTable
                if sub.LookupType != 4:     # only for sequences not in the font
                    continue
                for first, ligatures in sub.ligatures.items():
                    table.setdefault(first, []).extend(
                        (tuple(lig.Component), lig.LigGlyph) for lig in ligatures)
            if table:
                lookups.append(table)
        return lookups

    def glyphs(self, points):
        """The glyph names a sequence is drawn with; None if one is unknown."""
        # The font has no glyph for VS16 and its ligatures are spelled without
        # it (it is used only in cmap format 14), so it is dropped first.
        names = [self.cmap.get(p) for p in points if p != VS16 or p in self.cmap]
        if None in names:
            return None
        for table in self.lookups:
            done, i = [], 0
            while i < len(names):
                glyph, used = names[i], 1
                # The first ligature that fits wins; fonts list long ones first.
                for rest, result in table.get(names[i], ()):
                    if tuple(names[i + 1:i + 1 + len(rest)]) == rest:
                        glyph, used = result, 1 + len(rest)
                        break
                done.append(glyph)
                i += used
            names = done
        return names

    def png(self, points):
        """The PNG bytes for a sequence; None if it is not one glyph."""
        names = self.glyphs(points)
        if not names or len(names) != 1 or names[0] not in self.bitmaps:
            return None
        return self.bitmaps[names[0]].imageData


def draw(png, size):
    """A font bitmap on white, padded to a square, scaled to size x size."""
    glyph = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(glyph, ((side - glyph.width) // 2,
                                   (side - glyph.height) // 2))
    return square.convert("RGB").resize((size, size), Image.LANCZOS)


# ---------------------------------------------------------------- main

def main():
    ap = argparse.ArgumentParser(
        description="Draw the emoji picture set from the Noto Color Emoji font.")
    ap.add_argument("--out", default="data/emoji", help="folder to write (default %(default)s)")
    ap.add_argument("--size", type=int, default=64, help="picture side in pixels (default %(default)s)")
    ap.add_argument("--font", default=FONT, help="default %(default)s")
    ap.add_argument("--emoji-test", default=EMOJI_TEST, help="default %(default)s")
    ap.add_argument("--skin-tones", action="store_true", help="every skin tone of people too: twice as many pictures")
    ap.add_argument("--force", action="store_true", help="replace an existing --out folder")
    args = ap.parse_args()

    for path, package in ((args.font, "fonts-noto-color-emoji"),
                          (args.emoji_test, "unicode-data")):
        if not os.path.isfile(path):
            die(f"{path} not found (Debian package {package})")
    if args.size < 1:
        die("--size must be at least 1")
    out = args.out.rstrip("/")
    if not out:
        die("--out must name a folder of its own")
    if os.path.lexists(out):
        if not args.force:
            die(f"{out} exists already; give --force to replace it")
        # Replace only what an earlier run wrote, never somebody's own folder.
        if os.path.islink(out) or not os.path.isdir(out) \
                or set(os.listdir(out)) - {"train", "val"}:
            die(f"{out} does not look like the output of this script; not replacing it")

    font = EmojiFont(args.font)
    sequences = read_sequences(args.emoji_test)
    if not sequences:
        die(f"{args.emoji_test}: no emoji found in it")

    # Everything goes to a temporary folder, renamed when complete.
    work = f"{out}.tmp{os.getpid()}"
    counts, toned = Counter(), 0
    missing, twins = [], []
    seen = set()
    try:
        for part in ("train", "val"):
            for folder in FOLDERS:
                os.makedirs(os.path.join(work, part, folder))
        for folder, points in sequences:
            if not args.skin_tones and set(points) & set(SKIN_TONES):
                toned += 1
                continue
            png = font.png(points)
            if png is None:
                missing.append(points)
                continue
            # A few flags share one picture (Norway and Bouvet Island, ...):
            # the first one stays, so that no picture is on both sides.
            picture = draw(png, args.size)
            digest = hashlib.sha256(picture.tobytes()).digest()
            if digest in seen:
                twins.append(points)
                continue
            seen.add(digest)
            part = "val" if is_val(points) else "train"
            picture.save(os.path.join(work, part, folder, file_stem(points) + ".png"),
                         optimize=True)
            counts[part, folder] += 1
        if os.path.isdir(out):
            shutil.rmtree(out)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)

    print(f"{'group':<12}{'train':>7}{'val':>6}{'all':>7}")
    for folder in FOLDERS:
        t, v = counts["train", folder], counts["val", folder]
        print(f"{folder:<12}{t:>7}{v:>6}{t + v:>7}")
    t = sum(counts["train", f] for f in FOLDERS)
    v = sum(counts["val", f] for f in FOLDERS)
    print(f"{'all':<12}{t:>7}{v:>6}{t + v:>7}")
    print(f"{len(sequences)} sequences in the list, {toned} with a skin tone, {len(missing)} not in the font, "
          f"{len(twins)} left out as exact copies of another picture")
    for title, some in (("not in the font", missing), ("copies", twins)):
        if some:
            print(f"{title}: " + " ".join(file_stem(p) for p in some))


if __name__ == "__main__":
    main()
