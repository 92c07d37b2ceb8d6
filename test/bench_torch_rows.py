"""bench_torch_rows.py - the process that times PyTorch for bench_torch.py, which says what the rows are.

A line of standard input is a question, ["kind", arguments...], a line of standard output its answer: [seconds, null], or
[null, why not]. Whatever else is printed, by compilers too, goes to standard error.
"""
import json
import os
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


def official_seconds(what):
    """Seconds for all N tokens, from a few prefix lengths."""
    dim, head, depth = SIZES[what]
    cross, lengths = what == "encoder-decoder", [1, 64, 128, 192, N]
    layers, context = [layer(dim, head, "f32", cross) for _ in range(depth)], torch.rand(1, N + 1, dim) if cross else None
    times = [best(lambda: whole(layers, torch.rand(1, n, dim), head, True, context), 2) for n in lengths]
    return sum((b - a) * (s + t) / 2 for a, b, s, t in zip(lengths, lengths[1:], times, times[1:])) + times[0]


def mean_over_positions(seconds_at):
    """Of all positions POSITIONS[0]..POSITIONS[-1], from the times at a few."""
    times = [seconds_at(p) for p in POSITIONS]
    lines = zip(POSITIONS, POSITIONS[1:], times, times[1:])
    return sum((b - a) * (s + t) / 2 for a, b, s, t in lines) / (POSITIONS[-1] - POSITIONS[0])


def token_seconds(what, format, B, way):
    """(a token, an early token)"""
    dim, head, depth = SIZES[what]
    one_layer = torch.compile(layer_step, dynamic=True) if way == "compiled" else layer_step
    layers = [layer(dim, head, format, what == "encoder-decoder") for _ in range(depth)]
    logits, cache = weight(CODES, dim, format), caches(layers, B, head, FORMATS[format])
    x = torch.rand(B, 1, dim).to(FORMATS[format])
    at = lambda p: best(lambda: step(one_layer, layers, cache, x, head, p, logits))
    return mean_over_positions(at), at(EARLY[0])


def encoder_seconds(what, format):
    dim, head, _ = SIZES[what]
    encoder, x = [layer(dim, head, format, False) for _ in range(ENCODER_DEPTH)], torch.rand(1, N + 1, dim)
    x = x.to(FORMATS[format])
    return best(lambda: whole(encoder, x, head, False), 3)


def training_seconds(what, bf16, way):
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

    work = torch.compile(loss) if way == "compiled" else loss
    return best(lambda: run(work), 2)


def product_seconds(name, bf16):
    """ "linear, forward, bf16          64 x 256 x 256": M x K x N"""
    M, K, N = (int(n) for n in name.split("  ")[-1].split(" x "))
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, w = torch.rand(M, K).to(dtype), torch.rand(N, K).to(dtype)
    return best(lambda: F.linear(x, w), max(5, min(200, int(2e9 / (M * K * N)))))


def in_inference(seconds):
    def run(*arguments):
        with torch.inference_mode():
            return seconds(*arguments)
    return run


KINDS = {
    "version": lambda: f"{torch.__version__}, {torch.get_num_threads()} threads",
    "token": in_inference(token_seconds),
    "encoder": in_inference(encoder_seconds),
    "official": in_inference(official_seconds),
    "product": in_inference(product_seconds),
    "training": training_seconds,
    "stage": lambda name, bf16, way: stage_seconds(name, bf16, way, best),
}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        try:
            torch._dynamo.reset()
            answer = [KINDS[kind](*arguments), None]
        except Exception as e:  # whatever a compiler may throw, or a version lacks
            answer = [None, (str(e).strip() or type(e).__name__).splitlines()[0][:120]]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
