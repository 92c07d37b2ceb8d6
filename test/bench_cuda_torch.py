"""bench_cuda_torch.py - the work of bench_cuda.c in PyTorch on the same GPU, as a strong user would write it.

    python3 test/bench_cuda_torch.py -o FILE [WORD...]     FILE is for bench_cuda --beside; with words only the rows whose
                                                           names hold one of them
    python3 test/bench_cuda_torch.py --tiny --device cpu -o FILE    a model of nothing: does the script work?

Transitions: float weights, bf16 autocast, scaled_dot_product_attention, fused AdamW; a training step eager and compiled.
Drawing: bf16, keys and values in buffers allocated once, a position captured in a CUDA graph, eager and compiled, the faster
of the two; the encoder's pass included. First stage: channels last, bf16, host to host as ours, eager, decoding compiled
too. Medians after runs that warm up, everything waited for. A line "name<TAB>seconds" for each row; what this PyTorch or
this machine cannot do is skipped aloud. (PyTorch 2.11 to 2.15.)
"""
import argparse
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import bench_torch_vqgan as stage

FULL = dict(N=256, codes=548, heads=16, train=32, many=64, stage=8, stage_train=4, side=256, down=16, embed=256, entries=1024,
            product=8192, runs=7, nets={"x": (18, (752, 64, 6)), "gpt": (0, (800, 50, 26))})
TINY = dict(N=16, codes=20, heads=2, train=2, many=3, stage=2, stage_train=1, side=32, down=16, embed=256, entries=16,
            product=64, runs=2, nets={"x": (1, (24, 8, 1)), "gpt": (0, (16, 8, 2))})


# ---- Transitions ----

class Attend(nn.Module):
    def __init__(self, dim, heads, head, cross, bias):
        super().__init__()
        inner = heads * head
        self.heads, self.head, self.cross = heads, head, cross
        self.norm = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, self.head).transpose(1, 2)

    def forward(self, x, context, causal):
        h = self.norm(x)
        source = context if self.cross else h
        y = F.scaled_dot_product_attention(self.split(self.q(h)), self.split(self.k(source)), self.split(self.v(source)),
                                           is_causal=causal and not self.cross)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def step(self, x, cache, at, mask):
        h = self.norm(x)
        if not self.cross:
            cache[0].index_copy_(2, at, self.split(self.k(h)))
            cache[1].index_copy_(2, at, self.split(self.v(h)))
        y = F.scaled_dot_product_attention(self.split(self.q(h)), cache[0], cache[1],
                                           attn_mask=None if self.cross else mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, size, dim, head, depth, cross, causal, bias):
        super().__init__()
        self.causal = causal
        self.tokens, self.positions = nn.Embedding(size["codes"], dim), nn.Parameter(torch.zeros(size["N"] + 1, dim))
        kinds = [False, True] if cross else [False]
        self.layers = nn.ModuleList(m for _ in range(depth) for m in
                                    [*(Attend(dim, size["heads"], head, c, bias) for c in kinds), Feed(dim)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids, context=None):
        x = self.tokens(ids) + self.positions[:ids.shape[1]]
        for l in self.layers:
            x = l(x) if isinstance(l, Feed) else l(x, context, self.causal)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self, size, encoder, decoder):
        super().__init__()
        dim, head, depth = decoder
        self.encoder = Stack(size, dim, head, encoder, False, False, False) if encoder else None
        self.decoder = Stack(size, dim, head, depth, bool(encoder), True, not encoder)
        self.logits = nn.Linear(dim, size["codes"])

    def forward(self, ids, x_t):
        context = self.encoder(x_t) if self.encoder else None
        return self.logits(self.decoder(ids, context))


class Bench:
    """Sizes, the device, what was measured."""

    def __init__(self, arguments):
        self.size, self.device = TINY if arguments.tiny else FULL, arguments.device
        self.cuda, self.words, self.out = arguments.device == "cuda", arguments.words, open(arguments.out, "w")

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def ids(self, *shape):
        return torch.randint(self.size["codes"], shape, device=self.device)

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16)

    def median(self, run):
        took = []
        for _ in range(self.size["runs"] + 2):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            took.append(time.perf_counter() - start)
        return statistics.median(took[2:])

    def rows(self, name, *ways):
        """The fastest of the ways, each (what, a function that prepares and gives the work): the row's time."""
        if self.words and not any(w in name for w in self.words):
            return
        found = []
        for what, prepare in ways:
            torch._dynamo.reset()
            try:
                found.append(self.median(prepare()))
                print(f"{name:<20} {what:<10} {1e3 * found[-1]:9.3f} ms", flush=True)
            except Exception as e:  # whatever a compiler may throw
                print(f"skipped: {name}, {what}: {(str(e).strip() or repr(e)).splitlines()[0][:120]}", flush=True)
            if self.cuda:
                torch.cuda.empty_cache()
        if found:
            print(f"{name}\t{min(found):.6g}", file=self.out, flush=True)


def training(b, kind, compiled):
    net, B, N = Net(b.size, *b.size["nets"][kind]).to(b.device), b.size["train"], b.size["N"]
    ids, x_t = b.ids(B, N), b.ids(B, N + 1)
    q = torch.softmax(torch.randn(B, N, b.size["codes"], device=b.device), -1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    average = [p.detach().clone() for p in net.parameters()]

    def loss():
        with b.autocast():
            logits = net(ids, x_t)
        log_p = F.log_softmax(logits.float(), -1)
        return 0.5 * F.kl_div(log_p, q, reduction="sum") / (B * N) + 0.5 * F.nll_loss(log_p.flatten(0, 1), ids.flatten())

    forward = torch.compile(loss) if compiled else loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item()
        assert norm > 0
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1e-4)

    return step


def drawing(b, kind, B, compiled):
    """Encoder, the context's keys and values, N positions; like ours, up to tokens on the host."""
    net, N = Net(b.size, *b.size["nets"][kind]).to(b.device, torch.bfloat16).requires_grad_(False), b.size["N"]
    d, x_t = net.decoder, b.ids(B, N + 1)
    head = d.layers[0].head
    cache = {i: [torch.zeros(B, b.size["heads"], N + (1 if l.cross else 0), head, device=b.device, dtype=torch.bfloat16)
                 for _ in range(2)] for i, l in enumerate(d.layers) if isinstance(l, Attend)}
    ids, at = torch.zeros(B, 1, dtype=torch.long, device=b.device), torch.zeros(1, dtype=torch.long, device=b.device)
    drawn, places = torch.zeros(B, N, dtype=torch.long, device=b.device), torch.arange(N, device=b.device)

    def position():
        x = d.tokens(ids) + d.positions.index_select(0, at)
        mask = (places <= at).view(1, 1, 1, N)
        for i, l in enumerate(d.layers):
            x = l(x) if isinstance(l, Feed) else l.step(x, cache[i], at, mask)
        p = torch.softmax(net.logits(d.norm(x))[:, 0].float(), -1)
        # the least of exponential numbers with rates p: multinomial waits for the GPU, which no graph may
        ids.copy_(torch.argmax(p / torch.empty_like(p).exponential_(), -1, keepdim=True))
        drawn.index_copy_(1, at, ids)
        at.add_(1)

    def begin():
        ids.zero_()
        at.zero_()
        if net.encoder:
            context = net.encoder(x_t)
            for i, l in enumerate(d.layers):
                if isinstance(l, Attend) and l.cross:
                    cache[i][0].copy_(l.split(l.k(context)))
                    cache[i][1].copy_(l.split(l.v(context)))

    run = torch.compile(position) if compiled else position
    replay = run
    with torch.no_grad():
        begin()
        if b.cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            replay = graph.replay

    @torch.no_grad()
    def whole():
        begin()
        for _ in range(N):
            replay()
        return drawn.cpu()

    return whole


# ---- The first stage ----

def network(b, make):
    return make().to(b.device, memory_format=torch.channels_last)


def decoding(b, B, compiled):
    net, grid = network(b, stage.decoder).to(torch.bfloat16), b.size["side"] // b.size["down"]
    book = torch.randn(b.size["entries"], b.size["embed"], device=b.device, dtype=torch.bfloat16)
    tokens = torch.randint(b.size["entries"], (B, grid, grid))
    run = torch.compile(net) if compiled else net

    @torch.inference_mode()
    def work():
        z = book[tokens.to(b.device)].permute(0, 3, 1, 2)  # rows of the codebook are channels: channels last as it is
        return run(z).float().cpu()

    return work


def nearest(z, book):
    """The codes of z (B,D,h,w), as rows of B h w."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, book.shape[1])
    return (book.square().sum(1) - 2 * rows @ book.T).argmin(1)


def encoding(b, B):
    net = network(b, stage.encoder).to(torch.bfloat16)
    book = torch.randn(b.size["entries"], b.size["embed"], device=b.device, dtype=torch.bfloat16)
    images = torch.rand(B, 3, b.size["side"], b.size["side"]) - 0.5

    @torch.inference_mode()
    def work():
        x = images.to(b.device).to(torch.bfloat16, memory_format=torch.channels_last)
        return nearest(net(x), book).cpu()

    return work


def stage_step(b, B):
    encoder, decoder = network(b, stage.encoder), network(b, stage.decoder)
    book = nn.Parameter(torch.randn(b.size["entries"], b.size["embed"], device=b.device))
    parameters = [*encoder.parameters(), *decoder.parameters(), book]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.5, 0.9), fused=True)
    images = torch.rand(B, 3, b.size["side"], b.size["side"]) - 0.5

    def step():
        optimizer.zero_grad(set_to_none=True)
        x = images.to(b.device).to(memory_format=torch.channels_last)
        with b.autocast():
            z = encoder(x).float()
            with torch.no_grad():
                codes = nearest(z, book)
            e = book[codes].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
            codebook = F.mse_loss(e.detach(), z) + 0.25 * F.mse_loss(e, z.detach())
            y = decoder(z + (e - z).detach()).float()
        (F.mse_loss(y, x) + F.l1_loss(y, x) + codebook).backward()
        assert torch.nn.utils.get_total_norm([p.grad for p in parameters]).item() > 0
        optimizer.step()

    return step


# ---- All of it ----

def say_machine(b):
    n = b.size["product"]
    x, y = (torch.randn(n, n, device=b.device, dtype=torch.bfloat16) for _ in range(2))
    t = b.median(lambda: x @ y)
    name = torch.cuda.get_device_name() if b.cuda else "the CPU"
    print(f"PyTorch {torch.__version__} on {name}; a product of {n}x{n} in bf16: {2e-12 * n**3 / t:.1f} TFLOP/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("words", nargs="*")
    b = Bench(parser.parse_args())
    torch.backends.cudnn.benchmark = True
    say_machine(b)
    for kind in b.size["nets"]:
        b.rows(f"train eager {kind}", ("eager", lambda: training(b, kind, False)))
        b.rows(f"train compiled {kind}", ("compiled", lambda: training(b, kind, True)))
        for batch, B in (("one", 1), ("many", b.size["many"])):
            b.rows(f"draw {kind} {batch}", ("eager", lambda: drawing(b, kind, B, False)),
                   ("compiled", lambda: drawing(b, kind, B, True)))
    for batch, B in (("one", 1), ("many", b.size["stage"])):
        b.rows(f"decode {batch}", ("eager", lambda: decoding(b, B, False)))
        b.rows(f"decode compiled {batch}", ("compiled", lambda: decoding(b, B, True)))
    b.rows("encode many", ("eager", lambda: encoding(b, b.size["stage"])))
    b.rows("stage step", ("eager", lambda: stage_step(b, b.size["stage_train"])))


if __name__ == "__main__":
    main()
