"""bench_torch.py - the same work in PyTorch: what a strong user would write, and what the official code does.

    python3 test/bench_torch.py bench.tsv

Reads the table that test/bench wrote, times an equivalent model with made-up weights (eager, PyTorch's own threads),
prints both times and their ratio, and adds two columns to the table. A transition at the full FFHQ size:

    a token    keys and values in buffers allocated once, one new position per step: float32, and bfloat16 throughout
    official   the decoder runs over the whole prefix for every token (keys and values of the context included): timed at
               a few lengths, summed over all of them with straight lines in between

int8 has no eager twin: those rows stand beside PyTorch's bfloat16 or float32, whichever is faster.

The first stage at full size, and single convolutions of it, in float32: rows as PyTorch lays them out by default, with
channels last, and for the whole networks compiled too, where torch.compile finds what it needs; the fastest counts.
"""
import sys
import time

import torch
import torch.nn.functional as F

N, HEADS, CODES = 256, 16, 548
SIZES = {"encoder-decoder": (752, 64, 6), "last scale (GPT)": (800, 50, 26)}  # dim, of a head, layers
ENCODER_DEPTH = 18
REPEATS = 7


def weight(out, into, dtype):
    return ((torch.rand(out, into) - 0.5) * 0.05).to(dtype)


def layer(dim, head, dtype, cross):
    """One layer's matrices: self-attention, cross-attention if there is one, feed-forward."""
    inner = HEADS * head
    attention = lambda: [weight(inner, dim, dtype), weight(inner, dim, dtype), weight(inner, dim, dtype),
                         weight(dim, inner, dtype)]
    return dict(attend=attention(), cross=attention() if cross else None, norm=torch.ones(dim, dtype=dtype),
                shift=torch.zeros(dim, dtype=dtype), up=weight(4 * dim, dim, dtype), down=weight(dim, 4 * dim, dtype),
                up_bias=torch.zeros(4 * dim, dtype=dtype), down_bias=torch.zeros(dim, dtype=dtype))


def norm(l, x):
    return F.layer_norm(x, x.shape[-1:], l["norm"], l["shift"])


def split(x, head):
    return x.view(x.shape[0], x.shape[1], HEADS, head).transpose(1, 2)


def attend(q, k, v, causal=False):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def feed(l, x):
    return x + F.linear(F.gelu(F.linear(norm(l, x), l["up"], l["up_bias"])), l["down"], l["down_bias"])


def whole(layers, x, head, causal, context=None):
    """All positions at once: the encoder pass, and a prefix as the official decoder runs it."""
    for l in layers:
        q, k, v, out = l["attend"]
        n = norm(l, x)
        x = x + F.linear(attend(*(split(F.linear(n, w), head) for w in (q, k, v)), causal), out)
        if l["cross"]:
            q, k, v, out = l["cross"]
            x = x + F.linear(attend(split(F.linear(norm(l, x), q), head), split(F.linear(context, k), head),
                                    split(F.linear(context, v), head)), out)
        x = feed(l, x)
    return x


def caches(layers, B, head, dtype):
    shape = (B, HEADS, N + 1, head)
    return [[torch.rand(shape).to(dtype) for _ in range(4)] for _ in layers]


def step(layers, cache, x, head, position, logits):
    """One new position: x (B,1,dim)."""
    for l, (k_kept, v_kept, k_context, v_context) in zip(layers, cache):
        q, k, v, out = l["attend"]
        n = norm(l, x)
        k_kept[:, :, position] = F.linear(n, k).view(-1, HEADS, head)
        v_kept[:, :, position] = F.linear(n, v).view(-1, HEADS, head)
        seen = position + 1
        x = x + F.linear(attend(split(F.linear(n, q), head), k_kept[:, :, :seen], v_kept[:, :, :seen]), out)
        if l["cross"]:
            q, _, _, out = l["cross"]
            x = x + F.linear(attend(split(F.linear(norm(l, x), q), head), k_context, v_context), out)
        x = feed(l, x)
    return F.linear(x, logits)


def best(work, repeats=REPEATS):
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def official_seconds(layers, dim, head, context):
    """Seconds for all N tokens, from a few prefix lengths."""
    lengths = [1, 64, 128, 192, N]
    times = [best(lambda: whole(layers, torch.rand(1, n, dim), head, True, context), 2) for n in lengths]
    return sum((b - a) * (s + t) / 2 for a, b, s, t in zip(lengths, lengths[1:], times, times[1:])) + times[0]


def measure():
    """Name of a row -> seconds."""
    result = {}
    for what, (dim, head, depth) in SIZES.items():
        cross = what == "encoder-decoder"
        for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
            layers, logits = [layer(dim, head, dtype, cross) for _ in range(depth)], weight(CODES, dim, dtype)
            for B in (1, 16):
                cache, x = caches(layers, B, head, dtype), torch.rand(B, 1, dim).to(dtype)
                result[f"{what}, a token, batch {B}, {name}"] = best(
                    lambda: step(layers, cache, x, head, 20, logits), 20)
            if name == "f32":
                context = torch.rand(1, N + 1, dim) if cross else None
                result[f"official {what}"] = official_seconds(layers, dim, head, context)
        if cross:
            encoder = [layer(dim, head, torch.float32, False) for _ in range(ENCODER_DEPTH)]
            result[f"{what}, encoder pass, batch 1"] = best(
                lambda: whole(encoder, torch.rand(1, N + 1, dim), head, False), 3)
    return result


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


def stage_work(name, layout, compiled):
    """A function that does what our row does: "encode, batch 1", "decode, batch 4", "training step, batch 2"."""
    what, B = name.split(", batch ")
    x, z = torch.rand(int(B), 3, 256, 256) - 0.5, torch.rand(int(B), 256, 16, 16) - 0.5
    x, z = x.to(memory_format=layout), z.to(memory_format=layout)
    net = dict(encode=encoder, decode=decoder).get(what, lambda: torch.nn.Sequential(encoder(), decoder()))()
    net = net.to(memory_format=layout)
    run = torch.compile(net) if compiled else net

    def inference():
        with torch.inference_mode():
            run(x if what == "encode" else z)

    def training():
        y = run(x)
        y.backward(y.detach())

    return inference if what in ("encode", "decode") else training


def conv_work(name, layout):
    """"3x3 128->128 at 256x256, forward (0.25)" and the like."""
    kind, channels, _, size, direction, _ = name.replace(",", "").split(" ")
    into, out = (int(c) for c in channels.split("->"))
    side = int(size.split("x")[0])
    make = {"1x1": lambda: torch.nn.Conv2d(into, out, 1), "3x3": lambda: torch.nn.Conv2d(into, out, 3, 1, 1),
            "down": lambda: Down(into, out, 3, 2, 0), "up": lambda: Up(into, out, 3, 1, 1)}
    net = make[kind]().to(memory_format=layout)
    x = torch.rand(1, into, side, side).to(memory_format=layout)
    if direction == "forward":
        def forward():
            with torch.inference_mode():
                net(x)
        return forward
    y = net(x.requires_grad_())
    dy = torch.rand(y.shape).to(memory_format=layout)
    return lambda: torch.autograd.grad(y, [x, net.weight, net.bias], dy, retain_graph=True)


def stage_seconds(name):
    """The best of PyTorch's ways, and which it was."""
    single = "->" in name
    ways = {}
    for layout, fmt in LAYOUTS.items():
        ways[layout] = best(conv_work(name, fmt) if single else stage_work(name, fmt, False), 5 if single else 2)
    if name.endswith("batch 1") and not single:
        try:
            ways["compiled"] = best(stage_work(name, torch.channels_last, True), 2)
        except Exception as e:  # no compiler for it, for instance
            print(f"skipped: torch.compile of {name}: {str(e).splitlines()[0][:80]}")
    way = min(ways, key=ways.get)
    return ways[way], way


def compare_stage(rows):
    """Name -> seconds of our rows' twins; prints the table."""
    ours = {r[1]: float(r[2]) for r in rows if r[0] in ("conv", "vqgan")}
    theirs = {}
    if ours:
        print(f"\nthe first stage beside PyTorch {torch.__version__}, the best of its ways, "
              f"{torch.get_num_threads()} threads")
        print(f"{'':58}{'ours':>11}{'PyTorch':>11}{'ratio':>8}")
    for name, t in ours.items():
        theirs[name], way = stage_seconds(name)
        print(f"{name:58}{t * 1e3:8.2f} ms{theirs[name] * 1e3:8.2f} ms{theirs[name] / t:8.2f}  {way}", flush=True)
    return theirs


def write_table(path, header, rows, seconds, images):
    with open(path, "w") as f:
        print("\t".join(header + ["PyTorch seconds", "ratio"]), file=f)
        for r in rows:
            their = seconds.get(r[1])
            print("\t".join(r + ([f"{their:.6g}", f"{their / float(r[2]):.4g}"] if their else ["", ""])), file=f)
        for name, t, their in images:
            print(f"image\t{name}\t{t:.6g}\t\t\t\t\t{their:.6g}\t{their / t:.4g}", file=f)


def twin(theirs, name):
    """Their time for our row."""
    if name.endswith("int8"):
        return min(theirs[name[:-4] + "bf16"], theirs[name[:-4] + "f32"])
    return theirs.get(name)


def image(seconds, token):
    """A 4-scale image at batch 1: three encoder-decoder scales and the last one; the first stage left out."""
    first, last = SIZES
    return 3 * (seconds[f"{first}, encoder pass, batch 1"] + N * seconds[f"{first}, a token, batch 1, {token}"]
                ) + N * seconds[f"{last}, a token, batch 1, {token}"]


def compare_decoding(rows):
    """Name -> seconds of our rows' twins, and (name, ours, theirs) of whole images; prints the table."""
    ours = {r[1]: float(r[2]) for r in rows if r[0] == "decode"}
    if not ours:
        return {}, []
    with torch.inference_mode():
        theirs = measure()
    print(f"\nbeside PyTorch {torch.__version__}, eager, {torch.get_num_threads()} threads")
    print(f"{'':58}{'ours':>11}{'PyTorch':>11}{'ratio':>8}")
    lines = [(name, t, twin(theirs, name)) for name, t in ours.items() if twin(theirs, name)]
    first, last = SIZES
    official = 3 * (theirs[f"{first}, encoder pass, batch 1"] + theirs[f"official {first}"]) + theirs[f"official {last}"]
    kept = min(image(theirs, "f32"), image(theirs, "bf16"))
    for token in ("f32", "bf16", "int8"):
        t = image(ours, token)
        lines.append((f"image, {token}; PyTorch: keys and values kept, its best", t, kept))
        lines.append((f"image, {token}; PyTorch: the official algorithm", t, official))
    for name, t, their in lines:
        print(f"{name:58}{t * 1e3:8.2f} ms{their * 1e3:8.0f} ms{their / t:8.2f}")
    return {r[1]: twin(theirs, r[1]) for r in rows if r[0] == "decode"}, lines[-6:]


def main(path):
    with open(path) as f:
        header, *rows = [line.rstrip("\n").split("\t") for line in f]
    stage = compare_stage(rows)
    added, images = compare_decoding(rows)
    if not stage and not added:
        sys.exit(f"bench_torch.py: {path} has no rows of the sections decode, conv, vqgan; test/bench -o {path} writes them")
    write_table(path, header, rows, {**stage, **added}, images)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
