#!/usr/bin/python3
"""Write models/imagenet-classes.txt: the 1000 ImageNet classes and their names.

A class is a synset of WordNet 3.0: "n02099601" is the noun at byte 2099601 of
WordNet's data.noun, whose line there lists the synset's words. Label k of a
class-conditional ImageNet model is synset k in sorted order, so each line is

    n02099601 golden retriever

with all words of the synset, commas between. WordNet's licence asks that its
notice, the head of data.noun, goes with every copy: it comes first, as comments.

Needs a list of the 1000 synsets, one a line (the PyPI package timm has one:
timm/data/_info/imagenet_synsets.txt), and data.noun of WordNet 3.0
(Debian: apt-get install wordnet-base):

    dev/imagenet_names.py imagenet_synsets.txt /usr/share/wordnet/data.noun
"""

import argparse
import os
import re

OUT = os.path.join(os.path.dirname(__file__), "..", "models", "imagenet-classes.txt")


def notice(nouns):
    """The lines before the first synset: each begins with two blanks and its number."""
    for line in nouns.decode("ascii").splitlines():
        if not line.startswith("  "):
            return
        yield "# " + re.sub(r"^\s*\d+ ?", "", line).rstrip()


def words(nouns, synset):
    """data.noun: offset, file number, "n", hexadecimal word count, then word and lexical id by turns."""
    begin = int(synset[1:])
    fields = nouns[begin : nouns.index(b"\n", begin)].decode("ascii").split(" ")
    assert fields[0] == synset[1:] and fields[2] == "n", f"{synset} is not a noun of this WordNet"
    return [word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synsets")
    parser.add_argument("nouns")
    parser.add_argument("--out", default=OUT)
    args = parser.parse_args()
    with open(args.synsets) as f:
        synsets = sorted(set(f.read().split()))
    assert len(synsets) == 1000 and all(re.fullmatch(r"n\d{8}", s) for s in synsets), "expected 1000 synsets"
    with open(args.nouns, "rb") as f:
        nouns = f.read()
    with open(args.out, "w") as f:
        f.write(
            "# The classes of ImageNet, in the order of their labels; names from WordNet 3.0, whose notice follows.\n#\n"
        )
        f.writelines(line.rstrip() + "\n" for line in notice(nouns))
        f.writelines(f"{synset} {', '.join(words(nouns, synset))}\n" for synset in synsets)


if __name__ == "__main__":
    main()
