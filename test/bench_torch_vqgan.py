"""bench_torch_vqgan.py - the first stage at full size, and single convolutions of it, in PyTorch: what test/bench_torch.py
puts beside the rows of the sections conv and vqgan. In float32 and bfloat16 (training: float32 weights under autocast): as PyTorch lays images out by default, with channels
last, and the whole networks compiled too, where torch.compile finds what it needs; the fastest counts.
"""
import torch
import torch.nn.functional as F

# ---- The first stage: the official network (ch 128, ch_mult 1,1,2,2,4, attention at 16x16, z 256) ----

MULT = (1, 1, 2, 2, 4)
LAYOUTS = {"rows": torch.contiguous_format, "channels last": torch.channels_last}


class Block(torch.nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.GroupNorm(32, into, 1e-6), torch.nn.GroupNorm(32, out, 1e-6)
        self.conv1, self.conv2 = torch.nn.Conv2d(into, out, 3, 1, 1), torch.nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = torch.nn.Conv2d(into, out, 1) if into != out else torch.nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(torch.nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm = torch.nn.GroupNorm(32, C, 1e-6)
        self.q, self.k, self.v, self.out = [torch.nn.Conv2d(C, C, 1) for _ in range(4)]

    def forward(self, x):
        n = self.norm(x)
        q, k, v = [f(n).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Down(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Up(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def mid(C):
    return [Block(C, C), Attention(C), Block(C, C)]


def encoder():
    layers, C = [torch.nn.Conv2d(3, 128, 3, 1, 1)], 128
    for i, m in enumerate(MULT):
        for _ in range(2):
            layers.append(Block(C, 128 * m))
            C = 128 * m
            layers += [Attention(C)] if i == 4 else []
        layers += [Down(C, C, 3, 2, 0)] if i < 4 else []
    layers += mid(C) + [torch.nn.GroupNorm(32, C, 1e-6), torch.nn.SiLU(), torch.nn.Conv2d(C, 256, 3, 1, 1)]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(256, 256, 1))


def decoder():
    C = 128 * MULT[-1]
    layers = [torch.nn.Conv2d(256, 256, 1), torch.nn.Conv2d(256, C, 3, 1, 1)] + mid(C)
    for i in reversed(range(5)):
        for _ in range(3):
            layers.append(Block(C, 128 * MULT[i]))
            C = 128 * MULT[i]
            layers += [Attention(C)] if i == 4 else []
        layers += [Up(C, C, 3, 1, 1)] if i > 0 else []
    return torch.nn.Sequential(*layers, torch.nn.GroupNorm(32, C, 1e-6), torch.nn.SiLU(),
                               torch.nn.Conv2d(C, 3, 3, 1, 1))


def stage_work(name, layout, compiled, bf16):
    """A function that does what our row does: "encode, batch 1", "decode, batch 4", "training step, batch 2"."""
    what, B = name.split(", batch ")
    x, z = torch.rand(int(B), 3, 256, 256) - 0.5, torch.rand(int(B), 256, 16, 16) - 0.5
    x, z = x.to(memory_format=layout), z.to(memory_format=layout)
    net = dict(encode=encoder, decode=decoder).get(what, lambda: torch.nn.Sequential(encoder(), decoder()))()
    net = net.to(memory_format=layout)
    if bf16 and what in ("encode", "decode"):
        net, x, z = net.to(torch.bfloat16), x.to(torch.bfloat16), z.to(torch.bfloat16)
    run = torch.compile(net) if compiled else net

    def inference():
        with torch.inference_mode():
            run(x if what == "encode" else z)

    def training():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = run(x)
        y.backward(y.detach())

    return inference if what in ("encode", "decode") else training


def conv_work(name, layout, bf16):
    """"3x3 128->128 at 256x256, forward (0.25)" and the like."""
    kind, channels, _, size, direction, _ = name.replace(",", "").split(" ")
    into, out = (int(c) for c in channels.split("->"))
    side = int(size.split("x")[0])
    make = {"1x1": lambda: torch.nn.Conv2d(into, out, 1), "3x3": lambda: torch.nn.Conv2d(into, out, 3, 1, 1),
            "down": lambda: Down(into, out, 3, 2, 0), "up": lambda: Up(into, out, 3, 1, 1)}
    dtype = torch.bfloat16 if bf16 else torch.float32
    net = make[kind]().to(dtype).to(memory_format=layout)
    x = torch.rand(1, into, side, side).to(dtype).to(memory_format=layout)
    if direction == "forward":
        def forward():
            with torch.inference_mode():
                net(x)
        return forward
    y = net(x.requires_grad_())
    dy = torch.rand(y.shape).to(dtype).to(memory_format=layout)
    return lambda: torch.autograd.grad(y, [x, net.weight, net.bias], dy, retain_graph=True)


def stage_seconds(name, bf16, way, best_of):
    """One way's best time; best_of(work, repeats) times."""
    if "->" in name:
        return best_of(conv_work(name, LAYOUTS[way], bf16), 5)
    layout = LAYOUTS["channels last" if way == "compiled" else way]
    return best_of(stage_work(name, layout, way == "compiled", bf16), 2)
