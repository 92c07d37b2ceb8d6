#!/bin/sh
# golden_subset.sh GOLDEN: copies the golden cases that the tests keep (8 MiB) from GOLDEN into test/golden-cases: one
# of each kind, between them class labels, no EMA, a joint model, remapping and none, attention. model.ckpt stays
# behind: model.safetensors holds the same weights.
set -e
from=${1:?usage: dev/golden_subset.sh GOLDEN}
to=$(dirname "$0")/../test/golden-cases
mkdir -p "$to"
for name in schedules gpt_class train_gpt train_x vqgan_noremap x_class; do
    mkdir -p "$to/$name"
    for file in README.txt config.txt io.safetensors model.safetensors schedules.json; do
        [ ! -f "$from/$name/$file" ] || install -m 644 "$from/$name/$file" "$to/$name/$file"
    done
done
du -sh "$to"
