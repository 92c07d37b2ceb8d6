"""bench_cuda_torch.py - the work of bench_cuda.c in PyTorch on the same GPU: bf16 autocast, scaled_dot_product_attention,
fused AdamW; a training step at batch 32, and decoding with keys and values kept, captured in a CUDA graph, at batch 1 and 64.

    python3 test/bench_cuda_torch.py
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

N, CODES, HEADS, BATCH, RUNS = 256, 548, 16, 32, 7


class Attend(nn.Module):
    def __init__(self, dim, head, cross):
        super().__init__()
        inner = HEADS * head
        self.head, self.cross = head, cross
        self.norm = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], HEADS, self.head).transpose(1, 2)

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
    def __init__(self, dim, head, depth, cross, causal):
        super().__init__()
        self.causal = causal
        self.tokens, self.positions = nn.Embedding(CODES, dim), nn.Parameter(torch.zeros(N + 1, dim))
        kinds = [False, True] if cross else [False]
        self.layers = nn.ModuleList(m for _ in range(depth) for m in [*(Attend(dim, head, c) for c in kinds), Feed(dim)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids, context=None):
        x = self.tokens(ids) + self.positions[:ids.shape[1]]
        for l in self.layers:
            x = l(x) if isinstance(l, Feed) else l(x, context, self.causal)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self, encoder, decoder):
        super().__init__()
        dim, head, depth = decoder
        self.encoder = Stack(dim, head, encoder, False, False) if encoder else None
        self.decoder = Stack(dim, head, depth, bool(encoder), True)
        self.logits = nn.Linear(dim, CODES)

    def forward(self, ids, x_t):
        context = self.encoder(x_t) if self.encoder else None
        return self.logits(self.decoder(ids, context))


def median(run):
    took = []
    for i in range(RUNS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])


def training(what, net):
    ids, x_t = (torch.randint(CODES, (BATCH, n), device="cuda") for n in (N, N + 1))
    q = torch.softmax(torch.randn(BATCH, N, CODES, device="cuda"), -1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    average = [p.detach().clone() for p in net.parameters()]

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = net(ids, x_t)
        log_p = F.log_softmax(logits.float(), -1)
        loss = 0.5 * F.kl_div(log_p, q, reduction="sum") / (BATCH * N) + 0.5 * F.nll_loss(log_p.flatten(0, 1), ids.flatten())
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item()
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1e-4)

    t = median(step)
    print(f"{what:<18} PyTorch, training step, batch {BATCH}: {1e3 * t:8.2f} ms, {BATCH / t:6.1f} pictures/s")


@torch.no_grad()
def decoding(what, net, B):
    net = net.to(torch.bfloat16)
    d, head = net.decoder, net.decoder.layers[0].head
    cache = {i: [torch.randn(B, HEADS, N + (1 if l.cross else 0), head, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
             for i, l in enumerate(d.layers) if isinstance(l, Attend)}
    ids, at = torch.zeros(B, 1, dtype=torch.long, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    places = torch.arange(N, device="cuda")

    def step():
        x = d.tokens(ids) + d.positions.index_select(0, at)
        mask = (places <= at).view(1, 1, 1, N)
        for i, l in enumerate(d.layers):
            x = l(x) if isinstance(l, Feed) else l.step(x, cache[i], at, mask)
        p = torch.softmax(net.logits(d.norm(x))[:, 0].float(), -1)
        ids.copy_(torch.multinomial(p, 1))
        at.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def whole():
        at.zero_()
        for _ in range(N):
            graph.replay()

    t = median(whole)
    print(f"{what:<18} PyTorch, decoding, batch {B:2}: {1e3 * t / N:8.3f} ms a position, {B * N / t:8.0f} tokens/s")


for what, encoder, decoder in (("encoder-decoder", 18, (752, 64, 6)), ("last scale (GPT)", 0, (800, 50, 26))):
    training(what, Net(encoder, decoder).cuda())
    for batch in (1, 64):
        decoding(what, Net(encoder, decoder).cuda(), batch)
