#!/usr/bin/env python3
"""test_torch.py BUILD: what ./train and ./sample --convert write is what the official PyTorch classes load.

The modules below have the official parameter names (SPEC sections 1, 2, 8 and 12), nothing else of the official code.
Each file of a freshly trained model, and its conversions to F32 and BF16, is loaded with load_state_dict(strict=True):
no name missing, none too many; then the transitions' logits must be those that our C code computed from the same file,
within 1e-4. Needs torch; skipped aloud without.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    print("skipped: reading our files with PyTorch needs torch (pip install torch)")
    sys.exit(0)

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def read_safetensors(path):
    """tensors by name, __metadata__; safetensors is a length, a JSON table, the numbers."""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    (length,) = struct.unpack_from("<Q", data)
    table = json.loads(data[8 : 8 + length])
    meta, out = table.pop("__metadata__", {}), {}
    for name, x in table.items():
        begin, end = (8 + length + offset for offset in x["data_offsets"])
        out[name] = torch.frombuffer(data[begin:end], dtype=DTYPES[x["dtype"]]).reshape(x["shape"])
    return out, meta


# ---- the encoder-decoder ----


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        inner = 64 * heads
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x, context, causal):
        q, k, v = (
            y.unflatten(-1, (self.heads, 64)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU()), nn.Identity(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x, context, causal):
        return self.net(x)


class Side(nn.Module):
    """Encoder ("af" per layer) or decoder ("acf"), pre-norm."""

    def __init__(self, order, depth, dim, heads, tokens, length):
        super().__init__()
        self.order = order * depth
        self.token_emb = nn.Embedding(tokens, dim)
        self.pos_emb = nn.Module()
        self.pos_emb.emb = nn.Embedding(length, dim)
        self.attn_layers = nn.Module()
        self.attn_layers.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(dim), FeedForward(dim) if kind == "f" else Attention(dim, heads)])
            for kind in self.order
        )
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, tokens)

    def forward(self, ids, context=None):
        x = self.token_emb(ids) + self.pos_emb.emb.weight[: ids.shape[1]]
        for kind, (norm, block) in zip(self.order, self.attn_layers.layers):
            y = norm(x)
            x = x + block(y, context if kind == "c" else y, kind == "a" and context is not None)
        return self.norm(x)


class XTransformer(nn.Module):
    def __init__(self, p, kind, prompt):
        super().__init__()
        number = lambda key: int(p[key])
        self.kind, self.prompt = kind, prompt
        if kind != "XTransformer":
            rows = (number("n_scales"), number("dec_max_seq_len"))
            self.log_scalors = nn.Parameter(torch.zeros(rows if kind == "FineScaledXTransformer" else rows[:1]))
        for name, order in ("enc", "af"), ("dec", "acf"):
            side = Side(
                order,
                number(name + "_depth"),
                number("dim"),
                number(name + "_heads"),
                number(name + "_num_tokens"),
                number(name + "_max_seq_len"),
            )
            setattr(self, {"enc": "encoder", "dec": "decoder"}[name], side)
        if p.get("tie_token_emb") == "true":
            self.decoder.token_emb = self.encoder.token_emb

    def forward(self, x, xt, t, label, alphats):
        start = [torch.full_like(x[:, :1], t)] + ([] if label is None else [label[:, None]])
        context = self.encoder(torch.cat(start + [xt], 1))
        sos = torch.zeros_like(x[:, :1])
        logits = self.decoder.to_logits(self.decoder(torch.cat([sos, x[:, :-1]], 1), context))
        if self.kind in ("ScaledXTransformer", "ResidualScaledXTransformer"):
            logits = logits * self.log_scalors[t - 1].exp()
        if self.kind == "FineScaledXTransformer":
            logits = logits * self.log_scalors[t - 1, : x.shape[1], None].exp()
        if "Residual" in self.kind:
            K = logits.shape[-1]
            logits = logits + (alphats[t] * F.one_hot(xt, K) + (1 - alphats[t]) / K).log()
        return logits


# ---- the decoder-only network ----


class Block(nn.Module):
    def __init__(self, dim, heads, length):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.Module()
        for name in ("key", "query", "value", "proj"):
            setattr(self.attn, name, nn.Linear(dim, dim))
        self.attn.register_buffer("mask", torch.full((1, 1, length, length), -1.0))  # must come from the file
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y, L = self.ln1(x), x.shape[1]
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.attn.query, self.attn.key, self.attn.value)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.attn.mask[:, :, :L, :L] == 0, -math.inf)
        x = x + self.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, p):
        super().__init__()
        dim, length, K = int(p["n_embd"]), int(p["block_size"]), int(p["vocab_size"])
        self.pos_emb = nn.Parameter(torch.zeros(1, length, dim))
        self.tok_emb = nn.Embedding(int(p.get("input_vocab_size", K)), dim)
        self.blocks = nn.ModuleList(Block(dim, int(p["n_head"]), length) for _ in range(int(p["n_layer"])))
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, K, bias=False)

    def forward(self, x, xt, t, label, alphats):
        ids = torch.cat([torch.full_like(x[:, :1], t)] + ([] if label is None else [label[:, None]]) + [x], 1)[:, :-1]
        y = self.tok_emb(ids) + self.pos_emb[:, : ids.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.head(self.ln_f(y))[:, -x.shape[1] :]


# ---- the first stage ----


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(a, b, size=3):
    return nn.Conv2d(a, b, size, padding=size // 2)


class Resnet(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(a), conv(a, b), norm(b), conv(b, b)
        if a != b:
            self.nin_shortcut = conv(a, b, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (conv(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))
        weight = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).view_as(x))


def middle(c):
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = Resnet(c, c), Attn(c), Resnet(c, c)
    return mid


def level(a, b, blocks, attention):
    out = nn.Module()
    out.block = nn.ModuleList(Resnet(a if i == 0 else b, b) for i in range(blocks))
    out.attn = nn.ModuleList(Attn(b) for _ in range(blocks if attention else 0))
    return out


class Vqgan(nn.Module):
    def __init__(self, p, used):
        super().__init__()
        d = {key.split(".", 1)[1]: value for key, value in p.items() if key.startswith("ddconfig.")}
        ch, blocks, z, embed = int(d["ch"]), int(d["num_res_blocks"]), int(d["z_channels"]), int(p["embed_dim"])
        width = [ch * int(m) for m in d["ch_mult"].split(",")]
        side = [int(d["resolution"]) >> i for i in range(len(width))]
        attends = [str(s) in d["attn_resolutions"].split(",") for s in side]
        last = len(width) - 1

        enc = self.encoder = nn.Module()
        enc.conv_in, enc.mid, enc.norm_out, enc.conv_out = (
            conv(int(d["in_channels"]), ch),
            middle(width[-1]),
            norm(width[-1]),
            conv(width[-1], z),
        )
        enc.down = nn.ModuleList(
            level(width[i - 1] if i else ch, width[i], blocks, attends[i]) for i in range(len(width))
        )
        dec = self.decoder = nn.Module()
        dec.conv_in, dec.mid, dec.norm_out, dec.conv_out = (
            conv(z, width[-1]),
            middle(width[-1]),
            norm(width[0]),
            conv(width[0], int(d["out_ch"])),
        )
        dec.up = nn.ModuleList(
            level(width[min(i + 1, last)], width[i], blocks + 1, attends[i]) for i in range(len(width))
        )
        for i in range(last):
            enc.down[i].downsample = nn.Module()
            enc.down[i].downsample.conv = nn.Conv2d(width[i], width[i], 3, stride=2)
            dec.up[i + 1].upsample = nn.Module()
            dec.up[i + 1].upsample.conv = conv(width[i + 1], width[i + 1])
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(int(p["n_embed"]), embed)
        if used is not None:
            self.quantize.register_buffer("used", torch.zeros_like(used, dtype=torch.int64))
        self.quant_conv, self.post_quant_conv = conv(z, embed, 1), conv(embed, z, 1)

    @staticmethod
    def blocks(level, x):
        for i, block in enumerate(level.block):
            x = block(x)
            if len(level.attn):
                x = level.attn[i](x)
        return x

    @staticmethod
    def ends(side, x):
        return side.conv_out(F.silu(side.norm_out(x)))

    def encode(self, x):
        """pictures (B,3,H,W) -> latents (B,embed_dim,h,w), before the quantizer"""
        enc = self.encoder
        x = enc.conv_in(x)
        for level in enc.down:
            x = self.blocks(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = enc.mid.block_2(enc.mid.attn_1(enc.mid.block_1(x)))
        return self.quant_conv(self.ends(enc, x))

    def nearest(self, z):
        """the codes (B,h,w) nearest to latents, and their vectors as latents"""
        book = self.quantize.embedding.weight
        codes = torch.cdist(z.movedim(1, -1), book).argmin(-1)
        return codes, book[codes].movedim(-1, 1)

    def decode(self, z):
        dec = self.decoder
        x = dec.conv_in(self.post_quant_conv(z))
        x = dec.mid.block_2(dec.mid.attn_1(dec.mid.block_1(x)))
        for level in reversed(dec.up):
            x = self.blocks(level, x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.ends(dec, x)


# ---- a transition's file: the official DenoisingModel ----


class Transition(nn.Module):
    def __init__(self, meta, vqgan):
        super().__init__()
        prefix = "model.params.transformer_config."
        kind = meta[prefix + "target"].rsplit(".", 1)[1]
        p = {key[len(prefix + "params.") :]: value for key, value in meta.items() if key.startswith(prefix + "params.")}
        T = int(meta["model.params.n_scales"])
        prompt = 2 if meta.get("model.params.conditioner_config.target", "").endswith("ClassProvider") else 1
        self.register_buffer("sos_token", torch.ones(1, dtype=torch.int64))
        self.register_buffer("alphats", torch.zeros(T + 1))
        self.register_buffer("alphacum", torch.zeros(T + 1))
        self.first_stage_model = vqgan
        self.transformer = GPT(p) if kind == "GPT" else XTransformer(p, kind, prompt)


passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAIL {what} {detail}")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"FAIL {' '.join(command)}: exit status {done.returncode}\n     {done.stderr.strip()[-300:]}")
        print(f"{passed} passed, {failed + 1} failed")
        sys.exit(1)
    return done.stdout


def finish():
    print(f"{passed} passed, {failed} failed")
    return failed != 0


def load_vqgan(folder):
    state, meta = read_safetensors(f"{folder}/vqgan.safetensors")
    prefix = "model.params."
    vqgan = Vqgan({k[len(prefix) :]: v for k, v in meta.items() if k.startswith(prefix)}, state.get("quantize.used"))
    vqgan.load_state_dict(state, strict=True)
    if "quantize.used" in state:
        used = state["quantize.used"]
        check(f"{folder}: used is int64 and rises", used.dtype == torch.int64 and (used.diff() > 0).all())
    return vqgan, {"first_stage_model." + name: x for name, x in state.items()}


def check_scale(folder, t, vqgan, first_stage, said, dtype):
    state, meta = read_safetensors(f"{folder}/scale{t}.safetensors")
    what = f"{folder} scale {t}"
    stored = {x.dtype for name, x in state.items() if name.startswith("transformer.") and not name.endswith(".mask")}
    check(f"{what} is stored as {dtype}", stored == {dtype}, str(stored))
    model = Transition(meta, vqgan)
    try:
        model.load_state_dict({**first_stage, **state}, strict=True)
    except RuntimeError as error:
        return check(what, False, str(error))
    check(f"{what}: the start token", model.sos_token.item() == 0)
    check(f"{what}: alphacum", torch.allclose(model.alphats.cumprod(0), model.alphacum, atol=1e-6))
    label = said.get(f"label{t}")
    with torch.no_grad():
        logits = model.transformer(
            said[f"x{t}"].long(), said[f"xt{t}"].long(), t, None if label is None else label.long(), model.alphats
        )
    error = (logits - said[f"logits{t}"]).abs().max().item()
    check(f"{what}: logits", error <= 1e-4, f"differ by {error}")
    check(f"{what}: logits say something", said[f"logits{t}"].std() > 0.01)


def check_model(build, folder, dtype, T=3):
    run(f"{build}/logits", folder, f"{folder}/logits.safetensors")
    said, _ = read_safetensors(f"{folder}/logits.safetensors")
    try:
        vqgan, first_stage = load_vqgan(folder)
    except RuntimeError as error:
        return check(f"{folder}/vqgan.safetensors", False, str(error))
    for t in range(1, T + 1):
        check_scale(folder, t, vqgan, first_stage, said, dtype)


def train(build, scratch, name, changes, steps="4"):
    """A model of three scales by a changed test/tiny.txt; the first stage is trained once."""
    recipe, folder = f"{scratch}/{name}.txt", f"{scratch}/{name}"
    with open("test/tiny.txt") as f:
        text = f.read()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    with open(recipe, "w") as f:
        f.write(text)
    options = ["--config", recipe, "--data", f"{scratch}/data", "--run", folder, "--steps", steps]
    if os.path.isdir(f"{scratch}/plain"):
        os.mkdir(folder)
        shutil.copy(f"{scratch}/plain/vqgan.safetensors", folder)
    else:
        run(f"{build}/train", *options, "--vqgan")
    for t in (1, 2, 3):
        run(f"{build}/train", *options, "--scale", str(t))
    return folder


def main():
    build = sys.argv[1]
    torch.set_num_threads(2)
    kind = "x_transformer.ResidualScaledXTransformer"
    with tempfile.TemporaryDirectory() as scratch:
        run(f"{build}/pictures", "make", f"{scratch}/data", "20", "20")
        plain = train(build, scratch, "plain", [])
        check_model(build, plain, torch.float32)
        for store, dtype in ("f32", torch.float32), ("bf16", torch.bfloat16):
            folder = f"{scratch}/{store}"
            os.mkdir(folder)
            run(f"{build}/sample", plain, "--convert", folder, "--store", store)
            check_model(build, folder, dtype)
        check_model(
            build,
            train(
                build,
                scratch,
                "tied",
                [("tie_token_emb false", "tie_token_emb true"), (kind, "x_transformer.FineScaledXTransformer")],
            ),
            torch.float32,
        )
        remapped, used = f"{scratch}/remapped", f"{scratch}/used"
        shutil.copytree(plain, remapped, ignore=shutil.ignore_patterns("scale*", "*.state.*", "*.tokens"))
        options = ["--config", f"{scratch}/plain.txt", "--data", f"{scratch}/data", "--run", remapped, "--steps", "1"]
        run(f"{build}/train", *options, "--vqgan", "--remap")
        for t in (1, 2, 3):
            run(f"{build}/train", *options, "--scale", str(t))
        check_model(build, remapped, torch.float32)
        os.mkdir(used)
        run(f"{build}/sample", remapped, "--convert", used)
        check_model(build, used, torch.float32)
        K = [read_safetensors(f"{folder}/vqgan.safetensors")[0]["quantize.used"].numel() for folder in (remapped, used)]
        check("fewer codes are in use", K[0] == K[1] < 16, str(K))
        # without what can be derived: not for PyTorch until converted
        compact = train(
            build,
            scratch,
            "compact",
            [
                ("scale.data.params", "scale.imagebart.compact true\nscale.data.params"),
                ("tie_token_emb false", "tie_token_emb true"),
            ],
        )
        names = [name for t in (1, 3) for name in read_safetensors(f"{compact}/scale{t}.safetensors")[0]]
        check(
            "compact files",
            not [name for name in names if "mask" in name or name == "transformer.decoder.token_emb.weight"],
        )
        os.mkdir(f"{scratch}/whole")
        run(f"{build}/sample", compact, "--convert", f"{scratch}/whole")
        check_model(build, f"{scratch}/whole", torch.float32)
        check_model(
            build,
            train(build, scratch, "five", [("n_unmasked 2", "n_unmasked 5"), (kind, "x_transformer.XTransformer")]),
            torch.float32,
        )
    return finish()


if __name__ == "__main__":
    sys.exit(main())
