"""bench_torch.py - the same work in PyTorch: what a strong user would write, and what the official code does.

    python3 test/bench_torch.py bench.tsv            every row of the sections gemm, decode, train, conv and vqgan
    python3 test/bench_torch.py bench.tsv int8 ...   only rows whose names hold one of the words, and no images

Reads the table that test/bench wrote, times an equivalent model with made-up weights (PyTorch's own threads), prints both
times and their ratio, and adds two columns to the table. A transition at the full FFHQ size:

    a token    keys and values in buffers allocated once, one new position per step, at the same positions as ours: eager and
               with the layers compiled (torch.compile), the faster of the two. float32; bfloat16 throughout; int8: weights
               in int8 with a factor per row (torch._weight_int8pack_mm), the rest bfloat16.
    official   the decoder runs over the whole prefix for every token (keys and values of the context included): timed at
               a few lengths, summed over all of them with straight lines in between
    training   a step at batch 4, eager and compiled, the faster of the two; bf16: under autocast, weights in float32
    gemm       F.linear of matrices that lie as a linear layer's

The first stage and its convolutions are bench_torch_vqgan.py's. Beside rows in bf16x3, which are as exact as float32 but for
3e-5, stands PyTorch's float32. What this PyTorch cannot do is skipped aloud.
"""
import sys
import time

import torch
import torch.nn.functional as F

from bench_torch_vqgan import stage_seconds

N, HEADS, CODES = 256, 16, 548
SIZES = {"encoder-decoder": (752, 64, 6), "last scale (GPT)": (800, 50, 26)}  # dim, of a head, layers
ENCODER_DEPTH = 18
REPEATS = 7
EARLY, POSITIONS = [20], [1, 64, 128, 192, 255]  # timed; in between, straight lines
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}  # type of activations


def weight(out, into, format):
    """A matrix; in int8 with the factors of its rows."""
    w = (torch.rand(out, into) - 0.5) * 0.05
    if format != "int8":
        return w.to(FORMATS[format])
    scale = w.abs().amax(1) / 127
    return (w / scale[:, None]).round().to(torch.int8), scale.to(torch.bfloat16)


def linear(x, w, bias=None):
    if not isinstance(w, tuple):
        return F.linear(x, w, bias)
    y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), *w).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def layer(dim, head, format, cross):
    """One layer's matrices: self-attention, cross-attention if there is one, feed-forward."""
    inner, dtype = HEADS * head, FORMATS[format]
    attention = lambda: [weight(inner, dim, format), weight(inner, dim, format), weight(inner, dim, format),
                         weight(dim, inner, format)]
    return dict(attend=attention(), cross=attention() if cross else None, norm=torch.ones(dim, dtype=dtype),
                shift=torch.zeros(dim, dtype=dtype), up=weight(4 * dim, dim, format),
                down=weight(dim, 4 * dim, format), up_bias=torch.zeros(4 * dim, dtype=dtype),
                down_bias=torch.zeros(dim, dtype=dtype))


def norm(l, x):
    return F.layer_norm(x, x.shape[-1:], l["norm"], l["shift"])


def split(x, head):
    return x.view(x.shape[0], x.shape[1], HEADS, head).transpose(1, 2)


def attend(q, k, v, causal=False):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def feed(l, x):
    return x + linear(F.gelu(linear(norm(l, x), l["up"], l["up_bias"])), l["down"], l["down_bias"])


def whole(layers, x, head, causal, context=None):
    """All positions at once: the encoder pass, and a prefix as the official decoder runs it."""
    for l in layers:
        q, k, v, out = l["attend"]
        n = norm(l, x)
        x = x + linear(attend(*(split(linear(n, w), head) for w in (q, k, v)), causal), out)
        if l["cross"]:
            q, k, v, out = l["cross"]
            x = x + linear(attend(split(linear(norm(l, x), q), head), split(linear(context, k), head),
                                    split(linear(context, v), head)), out)
        x = feed(l, x)
    return x


def caches(layers, B, head, dtype):
    shape = (B, HEADS, N + 1, head)
    return [[torch.rand(shape).to(dtype) for _ in range(4)] for _ in layers]


def layer_step(l, cache, x, head, position):
    """One layer at one new position: x (B,1,dim)."""
    k_kept, v_kept, k_context, v_context = cache
    q, k, v, out = l["attend"]
    n = norm(l, x)
    k_kept[:, :, position] = linear(n, k).view(-1, HEADS, head)
    v_kept[:, :, position] = linear(n, v).view(-1, HEADS, head)
    seen = position + 1
    x = x + linear(attend(split(linear(n, q), head), k_kept[:, :, :seen], v_kept[:, :, :seen]), out)
    if l["cross"]:
        q, _, _, out = l["cross"]
        x = x + linear(attend(split(linear(norm(l, x), q), head), k_context, v_context), out)
    return feed(l, x)


def step(one_layer, layers, cache, x, head, position, logits):
    for l, kept in zip(layers, cache):
        x = one_layer(l, kept, x, head, position)
    return linear(x, logits)


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


def mean_over_positions(seconds_at):
    """Of all positions POSITIONS[0]..POSITIONS[-1], from the times at a few."""
    times = [seconds_at(p) for p in POSITIONS]
    lines = zip(POSITIONS, POSITIONS[1:], times, times[1:])
    return sum((b - a) * (s + t) / 2 for a, b, s, t in lines) / (POSITIONS[-1] - POSITIONS[0])


def token_seconds(what, format, B):
    """(a token, an early token), eager or compiled, whichever is faster; None: PyTorch cannot."""
    dim, head, depth = SIZES[what]
    cross = what == "encoder-decoder"
    found = []
    torch._dynamo.reset()
    for way, one_layer in (("eager", layer_step), ("compiled", torch.compile(layer_step, dynamic=True))):
        try:
            layers, logits = [layer(dim, head, format, cross) for _ in range(depth)], weight(CODES, dim, format)
            cache, x = caches(layers, B, head, FORMATS[format]), torch.rand(B, 1, dim).to(FORMATS[format])
            at = lambda p: best(lambda: step(one_layer, layers, cache, x, head, p, logits), REPEATS)
            found.append((mean_over_positions(at), at(EARLY[0])))
            print(f"# {what}, batch {B}, {format}, {way}: {1e3 * found[-1][0]:.2f} ms a token", flush=True)
        except Exception as e:  # whatever a compiler may throw
            print(f"skipped: {what}, batch {B}, {format}, {way}: {str(e).strip().splitlines()[0][:120]}", flush=True)
    return min(found) if found else None


def measure(wanted):
    """Name of a row -> seconds, for the rows that `wanted` says."""
    result = {}
    for what, (dim, head, depth) in SIZES.items():
        cross = what == "encoder-decoder"
        for format in FORMATS:
            for B in (1, 16):
                names = [f"{what}, {a} token, batch {B}, {format}" for a in ("a", "an early")]
                times = token_seconds(what, format, B) if any(map(wanted, names)) else None
                result.update(zip(names, times) if times else [])
            name = f"{what}, encoder pass, batch 1, {format}"
            if cross and format != "int8" and wanted(name):
                encoder = [layer(dim, head, format, False) for _ in range(ENCODER_DEPTH)]
                x = torch.rand(1, N + 1, dim).to(FORMATS[format])
                result[name] = best(lambda: whole(encoder, x, head, False), 3)
        if wanted(f"official {what}"):
            layers = [layer(dim, head, "f32", cross) for _ in range(depth)]
            context = torch.rand(1, N + 1, dim) if cross else None
            result[f"official {what}"] = official_seconds(layers, dim, head, context)
    return result


def training_seconds(what, bf16):
    """A step at batch 4: forward, losses (hard and soft, half each), backward, AdamW (fused), EMA. bf16: by autocast."""
    dim, head, depth = SIZES[what]
    cross, B = what == "encoder-decoder", 4
    decoder, logits = [layer(dim, head, "f32", cross) for _ in range(depth)], weight(CODES, dim, "f32")
    encoder = [layer(dim, head, "f32", False) for _ in range(ENCODER_DEPTH)] if cross else []
    tensors = lambda v: sum((tensors(x) for x in v), []) if isinstance(v, list) else [v] if v is not None else []
    values = [logits] + sum((tensors(list(l.values())) for l in encoder + decoder), [])
    for v in values:
        v.requires_grad_()
    averages = [v.detach().clone() for v in values]
    optimizer = torch.optim.AdamW(values, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    x, context = torch.rand(B, N, dim), torch.rand(B, N + 1, dim)
    target, posterior = torch.randint(CODES, (B * N,)), torch.full((B * N, CODES), 1 / CODES)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            seen = whole(encoder, context, head, False) if cross else None
            raw = F.linear(whole(decoder, x, head, True, seen), logits)
        p = F.log_softmax(raw.float().flatten(0, 1), -1)
        return 0.5 * F.nll_loss(p, target) + 0.5 * F.kl_div(p, posterior, reduction="batchmean")

    def run(work):
        work().backward()
        optimizer.step()
        torch._foreach_lerp_(averages, values, 1e-4)
        optimizer.zero_grad(set_to_none=True)

    seconds = best(lambda: run(loss), 2)
    try:
        compiled = torch.compile(loss)
        return min(seconds, best(lambda: run(compiled), 2))
    except Exception as error:  # no compiler for its code, or none of this version
        print(f"skipped: torch.compile of a training step: {str(error).splitlines()[0]}")
        return seconds


def product_seconds(name, bf16):
    """ "linear, forward, bf16          64 x 256 x 256": M x K x N"""
    M, K, N = (int(n) for n in name.split("  ")[-1].split(" x "))
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, w = torch.rand(M, K).to(dtype), torch.rand(N, K).to(dtype)
    return best(lambda: F.linear(x, w), max(5, min(200, int(2e9 / (M * K * N)))))


def in_format(name):
    """The row's name without its format, which of PyTorch's it goes with: (name, is it bf16?)"""
    for format in (", bf16x3", ", bf16"):
        if format in name:
            return name.replace(format, "", 1), format == ", bf16"
    return name, False


def beside(title, ours, seconds):
    """compare, with seconds(name without format, bf16), which is asked once for both f32 and bf16x3."""
    asked, theirs = {}, {}
    for name in ours:
        key = in_format(name)
        if key not in asked:
            try:
                asked[key] = seconds(*key)
            except Exception as e:  # whatever a version lacks
                print(f"skipped: {name}: {str(e).strip().splitlines()[0][:120]}", flush=True)
                asked[key] = None
        theirs[name] = asked[key]
    return compare(title, ours, theirs)


def twin(theirs, name):
    """Their time for our row. An encoder pass in int8 has no twin but the faster of the other formats."""
    if name not in theirs and name.endswith(", bf16x3"):
        return theirs.get(name[:-6] + "f32")
    if name not in theirs and "encoder pass" in name:
        return min((t for n, t in theirs.items() if "encoder pass" in n), default=None)
    return theirs.get(name)


def image(seconds, format, B):
    """B 4-scale images: three encoder-decoder scales and the last one; the first stage left out. An encoder pass of a
    batch, bound by arithmetic, counts as B passes of one."""
    first, last = SIZES
    needed = [f"{what}, a token, batch {B}, {format}" for what in SIZES]
    encoder = twin(seconds, f"{first}, encoder pass, batch 1, {format}")
    if not encoder or not all(n in seconds for n in needed):
        return None
    return 3 * (B * encoder + N * seconds[f"{first}, a token, batch {B}, {format}"]
                ) + N * seconds[f"{last}, a token, batch {B}, {format}"]


def image_rows(ours, theirs):
    """(name, our seconds, theirs): beside the same format, beside PyTorch's best, beside the official algorithm."""
    first, last = SIZES
    official = 3 * (theirs[f"{first}, encoder pass, batch 1, f32"] + theirs[f"official {first}"]
                    ) + theirs[f"official {last}"]
    rows = []
    for B in (1, 16):
        possible = {f: image(theirs, f, B) for f in FORMATS if image(theirs, f, B)}
        for format in ("f32", "bf16x3", "bf16", "int8"):
            t = image(ours, format, B)
            if not t or not possible:
                continue
            same = "f32" if format == "bf16x3" else format
            if same in possible:
                rows.append((f"batch {B} image, {format}; PyTorch: {'the same' if same == format else same}", t, possible[same]))
            rows.append((f"batch {B} image, {format}; PyTorch: its best", t, min(possible.values())))
            if B == 1:
                rows.append((f"batch 1 image, {format}; PyTorch: official algorithm", t, official))
    return rows


def compare(title, ours, theirs):
    """Prints a table of the rows that have a twin; gives them as (name, our seconds, theirs)."""
    lines = [(name, t, twin(theirs, name)) for name, t in ours.items() if twin(theirs, name)]
    print(f"{title:58}{'ours':>11}{'PyTorch':>14}{'ratio':>8}")
    for name, t, their in lines:
        print(f"{name:58}{t * 1e3:8.2f} ms{their * 1e3:11.2f} ms{their / t:8.2f}", flush=True)
    return lines


def main(path, words):
    with open(path) as f:
        header, *rows = [line.rstrip("\n").split("\t") for line in f]
    wanted = lambda name: not words or any(w in name for w in words)
    ours = lambda *sections: {r[1]: float(r[2]) for r in rows if r[0] in sections and wanted(r[1])}
    print(f"\nbeside PyTorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    lines, images = [], []
    if ours("decode"):
        with torch.inference_mode():
            theirs = measure(wanted)
        lines += compare("decoding", ours("decode"), theirs)
        images = [] if words else image_rows(ours("decode"), theirs)
        compare("images of four scales", {name: t for name, t, _ in images}, {name: their for name, _, their in images})
    steps = {name: t for name, t in ours("train").items() if name.endswith("whole step")}
    if ours("gemm"):
        with torch.inference_mode():
            lines += beside("products", ours("gemm"), product_seconds)
    if steps:
        lines += beside("training", steps, lambda name, bf16: training_seconds(name.split(", batch")[0], bf16))
    if ours("conv", "vqgan"):
        lines += beside("the first stage", ours("conv", "vqgan"), lambda name, bf16: stage_seconds(name, best, bf16)[0])
    if not lines:
        sys.exit(f"bench_torch.py: {path} has no rows of the sections gemm, decode, train, conv, vqgan; test/bench -o {path} "
                 "writes them")
    added = {name: their for name, _, their in lines}
    with open(path, "w") as f:
        print("\t".join(header[:7] + ["PyTorch seconds", "ratio"]), file=f)
        for r in rows:
            their = added.get(r[1])
            print("\t".join(r[:7] + ([f"{their:.6g}", f"{their / float(r[2]):.4g}"] if their else ["", ""])), file=f)
        for name, t, their in images:
            print(f"image\t{name}\t{t:.6g}\t\t\t\t\t{their:.6g}\t{their / t:.4g}", file=f)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
