#!/bin/sh
# fullsize.sh BUILD DIR [MODEL...]: the official models at their full size, with random weights, one after the other
# (default: ffhq ffhq2 ffhq-joint churches bedrooms cats imagenet imagenet4). For each: test/fullsize.py writes its
# files under DIR, every scale's logits are compared with PyTorch's, ./sample draws a picture, and its peak memory must
# stay below the largest scale's weights + 1 GiB. Needs PyTorch and numpy (PYTHON names the interpreter), 20 GiB of
# disk, up to 13 GiB of memory for PyTorch, and some minutes a model. Files are removed again; the exit status says how
# it went.
build=$(cd "$1" && pwd) || exit 2
dir=$2
shift 2
python=${PYTHON:-python3}
if ! "$python" -c 'import torch, numpy' 2>/dev/null; then
    echo "skipped: fullsize: $python has no PyTorch and numpy; PYTHON=... names one that has (pip install torch numpy)"
    exit 0
fi
here=$(pwd)
export IMAGEBART_DEVICE=cpu
failed=0
mkdir -p "$dir/models" && cp models/*.txt "$dir/models/" || exit 2
[ $# -gt 0 ] || set -- ffhq ffhq2 ffhq-joint churches bedrooms cats imagenet imagenet4

check() { # check WHAT COMMAND...
    what=$1
    shift
    "$@" || {
        failed=$((failed + 1))
        echo "FAIL $what"
    }
}

for model in "$@"; do
    echo "== $model"
    # The largest scale's weights in MiB, and 1 GiB. FFHQ has all its files; of the others, scales of one shape share
    # one.
    case $model in
        ffhq) limit=$((776 + 1024)) options= ;;
        ffhq-joint) limit=$((776 + 1024)) options= ;;
        *) limit=$((2449 + 1024)) options=--share ;;
    esac
    name=$model
    [ "$model" = ffhq-joint ] && name=models/ffhq_joint
    (cd "$dir" && "$python" "$here/test/fullsize.py" "$model" models $options) || exit 1
    cd "$dir" || exit 1
    check "$model: logits" "$build/fullsize" "$name"
    check "$model: sample" "$build/fullsize" --peak $limit "$build/sample" "$name" -n 1 --seed 1 -o "$model.png"
    cd "$here" || exit 1
    rm -rf "$dir"/models/*/ # the recipes stay
done
echo "$failed failed"
[ $failed -eq 0 ]
