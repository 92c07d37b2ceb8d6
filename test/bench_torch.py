"""bench_torch.py - the same work in PyTorch: what a strong user would write, and what the official code does.

    python3 test/bench_torch.py bench.tsv

Reads the table that test/bench wrote, times an equivalent model with made-up weights (eager, PyTorch's own threads),
prints both times and their ratio, and adds two columns to the table. A transition at the full FFHQ size:

    a token    keys and values in buffers allocated once, one new position per step: float32, and bfloat16 throughout
    official   the decoder runs over the whole prefix for every token (keys and values of the context included): timed at
               a few lengths, summed over all of them with straight lines in between

int8 has no eager twin: those rows stand beside PyTorch's bfloat16 or float32, whichever is faster.
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


def training_seconds(what):
    """A step at batch 4: forward, losses (hard and soft, half each), backward, AdamW (fused), EMA."""
    dim, head, depth = SIZES[what]
    cross, B = what == "encoder-decoder", 4
    decoder, logits = [layer(dim, head, torch.float32, cross) for _ in range(depth)], weight(CODES, dim, torch.float32)
    encoder = [layer(dim, head, torch.float32, False) for _ in range(ENCODER_DEPTH)] if cross else []
    tensors = lambda v: sum((tensors(x) for x in v), []) if isinstance(v, list) else [v] if v is not None else []
    values = [logits] + sum((tensors(list(l.values())) for l in encoder + decoder), [])
    for v in values:
        v.requires_grad_()
    averages = [v.detach().clone() for v in values]
    optimizer = torch.optim.AdamW(values, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    x, context = torch.rand(B, N, dim), torch.rand(B, N + 1, dim)
    target, posterior = torch.randint(CODES, (B * N,)), torch.full((B * N, CODES), 1 / CODES)

    def loss():
        seen = whole(encoder, context, head, False) if cross else None
        p = F.log_softmax(F.linear(whole(decoder, x, head, True, seen), logits).flatten(0, 1), -1)
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


def main(path):
    with open(path) as f:
        header, *rows = [line.rstrip("\n").split("\t") for line in f]
    ours = {r[1]: float(r[2]) for r in rows if r[0] == "decode"}
    if not ours:
        sys.exit(f"bench_torch.py: {path} has no rows of the section \"decode\"; test/bench -o {path} writes it")
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
    added = {r[1]: twin(theirs, r[1]) for r in rows if r[0] == "decode"}
    with open(path, "w") as f:
        print("\t".join(header + ["PyTorch seconds", "ratio"]), file=f)
        for r in rows:
            their = added.get(r[1])
            print("\t".join(r + ([f"{their:.6g}", f"{their / float(r[2]):.4g}"] if their else ["", ""])), file=f)
        for name, t, their in lines[-6:]:
            print(f"image\t{name}\t{t:.6g}\t\t\t\t\t{their:.6g}\t{their / t:.4g}", file=f)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
