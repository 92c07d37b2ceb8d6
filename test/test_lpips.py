#!/usr/bin/env python3
"""test_lpips.py BUILD: LPIPS and its gradient with VGG16 at full size, random weights, against PyTorch within 1e-4.

The module below has the official names (taming-transformers' LPIPS); its weights go to our code as PyTorch saves them:
torchvision's VGG16 and LPIPS's lin layers in two .pth files, both inside a VQGAN's .ckpt, and that converted by ./train.
Needs torch; skipped aloud without.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    print("skipped: LPIPS beside PyTorch needs torch (pip install torch)")
    sys.exit(0)

WIDTH, DEPTH = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)


class Lpips(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scaling_layer = nn.Module(), nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        number, channels = 0, 3
        for s, (width, depth) in enumerate(zip(WIDTH, DEPTH)):
            layers = nn.Sequential()
            if s:
                layers.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for _ in range(depth):
                conv = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.normal_(conv.weight, 0, (2 / (9 * channels)) ** 0.5)
                nn.init.normal_(conv.bias, 0, 0.1)
                layers.add_module(str(number), conv)
                layers.add_module(str(number + 1), nn.ReLU())
                number, channels = number + 2, width
            setattr(self.net, f"slice{s + 1}", layers)
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            nn.init.uniform_(lin.model[1].weight, 0, 1)
            setattr(self, f"lin{s}", lin)

    def taps(self, x):
        x = (x - self.scaling_layer.shift) / self.scaling_layer.scale
        for s in range(5):
            x = getattr(self.net, f"slice{s + 1}")(x)
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, x, y):
        pairs = zip(range(5), self.taps(x), self.taps(y))
        return sum(F.conv2d((a - b) ** 2, getattr(self, f"lin{s}").model[1].weight).mean((2, 3)) for s, a, b in pairs)


def write_safetensors(path, tensors):
    table, data = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().numpy().tobytes()
        table[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(table).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header + data)


def read_safetensors(path):
    with open(path, "rb") as f:
        data = bytearray(f.read())
    (length,) = struct.unpack_from("<Q", data)
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    return {
        name: torch.frombuffer(data[slice(*(8 + length + o for o in x["data_offsets"]))], dtype=torch.float32).reshape(
            x["shape"]
        )
        for name, x in table.items()
    }


passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAIL {what} {detail}")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    check(" ".join(command), done.returncode == 0, done.stderr.strip()[-300:])
    return done


def write_weights(model, scratch):
    state = model.state_dict()
    lins = {name: x for name, x in state.items() if name.startswith("lin")}
    vgg = {"features." + name.split(".", 2)[2]: x for name, x in state.items() if name.startswith("net.")}
    vgg["classifier.6.bias"] = torch.zeros(1000)  # there are others, which are not looked at
    torch.save(vgg, f"{scratch}/vgg16.pth", _use_new_zipfile_serialization=False)  # as old as the real one
    torch.save(lins, f"{scratch}/vgg.pth")
    inside = {"loss.perceptual_loss." + name: x for name, x in state.items()}
    torch.save({"state_dict": inside, "epoch": 1, "global_step": 2}, f"{scratch}/vqgan.ckpt")


def gradient(model, x, y):
    y = y.detach().clone().requires_grad_()
    loss = model(x, y).sum()
    loss.backward()
    return loss.item(), y.grad


def draw(model, shape):
    """Pairs of pictures and LPIPS's gradient, in double. Among millions of relus and pools some are always so near their
    kink that rounding decides on which side; then the gradient jumps by a percent, in exact arithmetic too. Taken are
    pictures whose gradient stays when their pixels move by as much as rounding does."""
    x = torch.rand((3 * shape[0],) + shape[1:]) * 2 - 1
    y = 0.7 * x + 0.3 * (torch.rand(x.shape) * 2 - 1)
    exact = model.double()
    _, g = gradient(exact, x.double(), y.double())
    steady = torch.ones(len(x), dtype=torch.bool)
    for _ in range(2):
        _, moved = gradient(exact, x.double(), y.double() + 4e-7 * torch.randn(y.shape, dtype=torch.float64))
        steady &= (moved - g).abs().amax((1, 2, 3)) <= 2e-5 * g.abs().amax((1, 2, 3))
    chosen = steady.nonzero()[: shape[0], 0]
    check(f"{shape}: pictures away from kinks", len(chosen) == shape[0], f"only {len(chosen)}")
    loss, g = gradient(exact, x[chosen].double(), y[chosen].double())
    return x[chosen], y[chosen], loss / len(chosen), g / len(chosen)


def compare(build, scratch, model, files, shape):
    x, y, loss, g = draw(model, shape)
    write_safetensors(f"{scratch}/pair", {"x": x, "xrec": y})
    if run(f"{build}/lpips", "run", files, f"{scratch}/pair", f"{scratch}/out").returncode:
        return
    said, what = read_safetensors(f"{scratch}/out"), f"{os.path.basename(files)} {tuple(shape)}"
    error = abs(said["loss"].item() - loss) / loss
    check(f"{what}: loss", error <= 1e-4 and loss > 0.01, f"{said['loss'].item()}, PyTorch {loss}")
    worst = ((said["dxrec"] - g).abs().max() / g.abs().max()).item()
    check(f"{what}: gradient", worst <= 1e-4, f"differs by {worst}")
    print(f"{what}: loss within {error:.1e}, gradient within {worst:.1e}")


def main():
    build = sys.argv[1]
    torch.manual_seed(1)
    torch.set_num_threads(2)
    model = Lpips().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        write_weights(model, scratch)
        two = f"{scratch}/vgg16.pth,{scratch}/vgg.pth"
        compare(build, scratch, model, two, (2, 3, 64, 64))
        compare(build, scratch, model, f"{scratch}/vqgan.ckpt", (1, 3, 37, 50))
        run(f"{build}/train", "--convert-perceptual", f"{scratch}/lpips.safetensors", "--perceptual", two)
        compare(build, scratch, model, f"{scratch}/lpips.safetensors", (1, 3, 32, 32))
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
