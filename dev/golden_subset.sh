#!/bin/sh
# golden_subset.sh GOLDEN: copies the golden cases that the tests keep (8 MiB) from GOLDEN into test/golden-cases: one
# of each kind, between them class labels, no EMA, a joint model, remapping and none, attention. One case keeps its
# model.ckpt, the others model.safetensors, the same weights. Of the checkpoint encodings the two small ones stay, with
# what is expected of them. Needs python3.
set -e
from=${1:?usage: dev/golden_subset.sh GOLDEN}
to=$(dirname "$0")/../test/golden-cases
mkdir -p "$to"
copy() { # copy CASE FILE...
    name=$1
    shift
    mkdir -p "$to/$name"
    for file in README.txt config.txt io.safetensors "$@"; do
        [ ! -f "$from/$name/$file" ] || install -m 644 "$from/$name/$file" "$to/$name/$file"
    done
}
copy schedules schedules.json
copy gpt_class model.ckpt
for name in train_gpt train_x vqgan_noremap x_class; do copy $name model.safetensors; done
copy ckpt_formats model_half.ckpt model_half_legacy.ckpt
python3 - "$to/ckpt_formats/io.safetensors" <<'EOF'
import json, struct, sys
data = open(sys.argv[1], "rb").read()
n, = struct.unpack("<Q", data[:8])
header, body, kept, out = json.loads(data[8:8 + n]), data[8 + n:], {}, b""
for name, x in sorted(header.items(), key=lambda kv: kv[1].get("data_offsets", [0])[0]):
    if name == "__metadata__":
        kept[name] = x
    elif name.startswith("in.") or "_half" in name:
        begin, end = x["data_offsets"]
        kept[name] = dict(x, data_offsets=[len(out), len(out) + end - begin])
        out += body[begin:end]
text = json.dumps(kept).encode()
text += b" " * (-len(text) % 8)
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + out)
EOF
du -sh "$to"
