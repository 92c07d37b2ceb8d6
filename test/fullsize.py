"""fullsize.py - checkpoint sets of the official models at their full size, with random weights, and what they compute.

    python3 test/fullsize.py MODEL DEST [--scales 1,4] [--no-ema] [--share]
    python3 test/fullsize.py MODEL --scales 1 --list        the tensors, in order: name, dtype, shape

Writes DEST/<official folder>/scaleN.ckpt (joint.ckpt) and DEST/vqgan/vqgan-*.ckpt as the official training leaves them
(SPEC sections 6, 11, 12), and beside each scaleN.ckpt a scaleN.logits.safetensors: tokens in, and the logits that the
few lines of PyTorch below compute from them with the EMA weights (with --no-ema the file has none: the plain ones);
scale 1 adds a decoded picture. test/fullsize.c compares. Weights are drawn so that logits and pictures vary: embeddings
of size 1, matrices that keep the size of what they are given. The plain weights are the EMA weights moved by one place,
so whoever takes the wrong ones is far off. --share: scales 2 to T-1, which have the same shapes, are links to scale 1.

Nothing of the project depends on this script; it needs PyTorch and numpy. Read from the bottom up, or in this order:
the released models, their tensors, random weights, the two transformers and the decoder, files. """
import argparse
import json
import math
import os
import shutil
import struct
import sys
import time
import types
from collections import OrderedDict

import numpy
import torch
import torch.nn.functional as F

N = 256  # tokens of a picture: 16 x 16

# ---- The released models (SPEC, first table) ----

THREE = [0.1517287641763687, 0.23063573241233826, 1]
FIVE = [0.0901111289858818, 0.1041797399520874, 0.13920249044895172, 0.2660215497016907, 1]
GEOMETRIC = [1 / 4, 1 / 3, 1 / 2, 1]
SMALL = {"dim": 752, "enc": 18, "gpt": (26, 800)}
LARGE = {"dim": 1152, "enc": 32, "gpt": (36, 1216)}


def entry(folder, vqgan, betas, codes, book, size, positions=257, residual=False, classes=False, joint=False):
    return dict(size, folder=folder, vqgan=vqgan, betas=betas, codes=codes, book=book, positions=positions,
                residual=residual, classes=classes, joint=joint, T=len(betas), rows=1000 if classes else codes)


MODELS = {
    "ffhq": entry("ffhq_4_scales_geometric", "ffhq", GEOMETRIC, 548, 1024, SMALL, residual=True),
    "ffhq2": entry("ffhq_2_scales_custom", "ffhq", [0.3639524579048157, 1], 548, 1024, LARGE),
    "ffhq-joint": entry("ffhq_joint", "ffhq", GEOMETRIC, 548, 1024, SMALL, residual=True, joint=True),
    "churches": entry("churches_3_scales", "churches", THREE, 1022, 16384, LARGE, positions=258),
    "bedrooms": entry("bedrooms_3_scales", "bedrooms", THREE, 1017, 16384, LARGE),
    "cats": entry("cats_3_scales", "cats", THREE, 1014, 16384, LARGE),
    "imagenet": entry("cin_5_scales_custom", "imagenet", FIVE, 973, 16384, LARGE, positions=258, classes=True),
    "imagenet4": entry("cin_4_scales_geometric", "imagenet", GEOMETRIC, 973, 16384, LARGE, positions=258, classes=True,
                       residual=True),
}

# ---- Tensors: ordered name -> shape, as the official state dicts have them (SPEC section 12) ----


def put(shapes, name, *weight, bias=True):
    shapes[name + ".weight"] = weight
    if bias:
        shapes[name + ".bias"] = weight[:1]


def vqgan_shapes(m):
    s, channels = OrderedDict(), [128, 128, 256, 256, 512]

    def block(name, a, b):
        put(s, name + ".norm1", a)
        put(s, name + ".conv1", b, a, 3, 3)
        put(s, name + ".norm2", b)
        put(s, name + ".conv2", b, b, 3, 3)
        if a != b:
            put(s, name + ".nin_shortcut", b, a, 1, 1)

    def attention(name, c):
        put(s, name + ".norm", c)
        for part in "q", "k", "v", "proj_out":
            put(s, name + "." + part, c, c, 1, 1)

    def middle(side):
        block(side + ".mid.block_1", 512, 512)
        attention(side + ".mid.attn_1", 512)
        block(side + ".mid.block_2", 512, 512)

    put(s, "encoder.conv_in", 128, 3, 3, 3)
    for i, c in enumerate(channels):
        for k in range(2):
            block(f"encoder.down.{i}.block.{k}", channels[max(i - 1, 0)] if k == 0 else c, c)
        for k in range(2 if i == 4 else 0):
            attention(f"encoder.down.4.attn.{k}", 512)
        if i < 4:
            put(s, f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
    middle("encoder")
    put(s, "encoder.norm_out", 512)
    put(s, "encoder.conv_out", 256, 512, 3, 3)
    put(s, "decoder.conv_in", 512, 256, 3, 3)
    middle("decoder")
    for i, c in enumerate(channels):
        for k in range(3):
            block(f"decoder.up.{i}.block.{k}", channels[min(i + 1, 4)] if k == 0 else c, c)
        for k in range(3 if i == 4 else 0):
            attention(f"decoder.up.4.attn.{k}", 512)
        if i > 0:
            put(s, f"decoder.up.{i}.upsample.conv", c, c, 3, 3)
    put(s, "decoder.norm_out", 128)
    put(s, "decoder.conv_out", 3, 128, 3, 3)
    s["quantize.used"] = (m["codes"],)
    s["quantize.embedding.weight"] = (m["book"], 256)
    put(s, "quant_conv", 256, 256, 1, 1)
    put(s, "post_quant_conv", 256, 256, 1, 1)
    return s


X_HEADS, X_HEAD, X_DECODER_DEPTH = 16, 64, 6


def x_shapes(m):
    s, C, inner = OrderedDict(), m["dim"], X_HEADS * X_HEAD
    if m["residual"]:
        s["log_scalors"] = (m["T"],)
    for side, kinds, depth, rows, positions in (("encoder", "af", m["enc"], m["rows"], m["positions"]),
                                                ("decoder", "acf", X_DECODER_DEPTH, m["codes"], N)):
        put(s, side + ".token_emb", rows, C, bias=False)
        put(s, side + ".pos_emb.emb", positions, C, bias=False)
        for i, kind in enumerate(kinds * depth):
            layer = f"{side}.attn_layers.layers.{i}"
            put(s, layer + ".0", C)
            if kind == "f":
                put(s, layer + ".1.net.0.0", 4 * C, C)
                put(s, layer + ".1.net.2", C, 4 * C)
                continue
            for part in "to_q", "to_k", "to_v":
                put(s, layer + ".1." + part, inner, C, bias=False)
            put(s, layer + ".1.to_out", C, inner)
        put(s, side + ".norm", C)
        put(s, side + ".to_logits", rows, C)
    return s


def gpt_shapes(m):
    s, (depth, C), block = OrderedDict(), m["gpt"], 258 if m["classes"] else N
    s["pos_emb"] = (1, block, C)
    put(s, "tok_emb", m["rows"], C, bias=False)
    for i in range(depth):
        name = f"blocks.{i}"
        put(s, name + ".ln1", C)
        put(s, name + ".ln2", C)
        s[name + ".attn.mask"] = (1, 1, block, block)
        for part in "key", "query", "value", "proj":
            put(s, f"{name}.attn.{part}", C, C)
        put(s, name + ".mlp.0", 4 * C, C)
        put(s, name + ".mlp.2", C, 4 * C)
    put(s, "ln_f", C)
    put(s, "head", m["codes"], C, bias=False)
    return s


def is_gpt(m, scale):
    return scale == m["T"] and not m["joint"]


def count(shapes):
    return sum(math.prod(s) for name, s in shapes.items() if not name.endswith((".mask", ".used")))


def check_counts():
    """The numbers of parameters that SPEC section 12 gives."""
    m = MODELS["ffhq"]
    for found, expected in ((count(vqgan_shapes(m)), 72141699), (count(x_shapes(m)), 203214812),
                            (count(gpt_shapes(m)), 201033600)):
        if found != expected:
            sys.exit(f"{found} parameters, SPEC section 12 has {expected}")


# ---- Random weights ----


def draw(m, name, shape, generator):
    if name.endswith("attn.mask"):
        mask = torch.ones(shape).tril()
        if m["classes"]:
            mask[..., :2, :2] = 1
        return mask
    if name == "quantize.used":
        return torch.randperm(m["book"], generator=generator)[:m["codes"]].sort().values
    x = torch.randn(shape, generator=generator)
    if name == "log_scalors":
        return 0.3 * x
    if "emb" in name:
        return x
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    gain = 2 if name.endswith(("to_logits.weight", "head.weight")) else 1
    return x.mul_(gain / math.sqrt(math.prod(shape[1:])))


def random_weights(m, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict((name, draw(m, name, shape, generator)) for name, shape in shapes.items())


# ---- The networks, as functions of a dictionary of weights (SPEC sections 1, 2, 8) ----


def linear(w, name, x):
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)


def attend(q, k, v, heads, visible=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def x_stack(w, side, ids, kinds, depth, context=None):
    n = ids.shape[1]
    x = w[side + ".token_emb.weight"][ids] + w[side + ".pos_emb.emb.weight"][:n]
    visible = torch.ones(n, n, dtype=torch.bool).tril() if side == "decoder" else None
    for i, kind in enumerate(kinds * depth):
        name = f"{side}.attn_layers.layers.{i}.1"
        h = layer_norm(w, name[:-1] + "0", x)
        if kind == "f":
            x = x + linear(w, name + ".net.2", F.gelu(linear(w, name + ".net.0.0", h)))
            continue
        source = context if kind == "c" else h
        h = attend(linear(w, name + ".to_q", h), linear(w, name + ".to_k", source), linear(w, name + ".to_v", source),
                   X_HEADS, visible if kind == "a" else None)
        x = x + linear(w, name + ".to_out", h)
    return layer_norm(w, side + ".norm", x)


def x_logits(m, w, x, x_t, prompt):
    t = prompt[:, 0]
    context = x_stack(w, "encoder", torch.cat([prompt, x_t], 1), "af", m["enc"])
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    logits = linear(w, "decoder.to_logits", x_stack(w, "decoder", shifted, "acf", X_DECODER_DEPTH, context))
    if not m["residual"]:
        return logits
    a = 1 - torch.tensor([0.0] + m["betas"])[t].view(-1, 1, 1)
    stay = torch.log(a * F.one_hot(x_t, m["codes"]) + (1 - a) / m["codes"])
    return logits * w["log_scalors"][t - 1].exp().view(-1, 1, 1) + stay


def gpt_logits(m, w, x, prompt):
    ids = torch.cat([prompt, x[:, :-1]], 1)
    n, P = ids.shape[1], prompt.shape[1]
    h = w["tok_emb.weight"][ids] + w["pos_emb"][:, :n]
    visible = w["blocks.0.attn.mask"][0, 0, :n, :n] > 0
    for i in range(m["gpt"][0]):
        name = f"blocks.{i}"
        y = layer_norm(w, name + ".ln1", h)
        q, k, v = (linear(w, f"{name}.attn.{part}", y) for part in ("query", "key", "value"))
        h = h + linear(w, name + ".attn.proj", attend(q, k, v, 16, visible))
        y = layer_norm(w, name + ".ln2", h)
        h = h + linear(w, name + ".mlp.2", F.gelu(linear(w, name + ".mlp.0", y)))
    return linear(w, "head", layer_norm(w, "ln_f", h))[:, P - 1:]


def conv(w, name, x):
    weight = w[name + ".weight"]
    return F.conv2d(x, weight, w[name + ".bias"], padding=weight.shape[-1] // 2)


def group_norm(w, name, x):
    return F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], 1e-6)


def residual_block(w, name, x):
    h = conv(w, name + ".conv1", F.silu(group_norm(w, name + ".norm1", x)))
    h = conv(w, name + ".conv2", F.silu(group_norm(w, name + ".norm2", h)))
    return h + (conv(w, name + ".nin_shortcut", x) if name + ".nin_shortcut.weight" in w else x)


def picture_attention(w, name, x):
    h = group_norm(w, name + ".norm", x)
    q, k, v = (conv(w, f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
    h = attend(q, k, v, 1).transpose(1, 2).view_as(x)
    return x + conv(w, name + ".proj_out", h)


def decode(w, tokens):
    z = w["quantize.embedding.weight"][w["quantize.used"][tokens]].transpose(1, 2).unflatten(2, (16, 16))
    h = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", z))
    h = residual_block(w, "decoder.mid.block_1", h)
    h = picture_attention(w, "decoder.mid.attn_1", h)
    h = residual_block(w, "decoder.mid.block_2", h)
    for level in range(4, -1, -1):
        for k in range(3):
            h = residual_block(w, f"decoder.up.{level}.block.{k}", h)
            if level == 4:
                h = picture_attention(w, f"decoder.up.4.attn.{k}", h)
        if level > 0:
            h = conv(w, f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2, mode="nearest"))
    return conv(w, "decoder.conv_out", F.silu(group_norm(w, "decoder.norm_out", h)))


# ---- Files ----


def write_safetensors(path, tensors):
    names = {torch.int32: "I32", torch.float32: "F32"}
    head, at, blobs = {}, 0, []
    for name, x in tensors.items():
        blobs.append(x.contiguous().numpy().tobytes())
        head[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def lightning(state):
    """The dictionary around a Lightning 1.4 state dict, with the kinds of values a real one has (SPEC section 11)."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    sys.modules.setdefault("pytorch_lightning", types.ModuleType("pytorch_lightning"))
    sys.modules.setdefault("pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
    sys.modules[module.__name__] = module
    state._metadata = OrderedDict([("", {"version": 1})])
    return {"epoch": 71, "global_step": 269999, "pytorch-lightning_version": "1.4.2", "state_dict": state,
            "callbacks": {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(5.25)}},
            "optimizer_states": [], "lr_schedulers": [{"base_lrs": [1.0], "_last_lr": [numpy.float64(1e-4)]}]}


def write_ckpt(path, obj):
    with open(path, "wb") as f:  # through a stream: the folder in the zip is "archive", as in the official files
        torch.save(obj, f)


def state_shapes(m, scale, ema):
    """The whole ordered list of a scale's file, as name -> (dtype, shape)."""
    s = OrderedDict(sos_token=("int64", (1,)))
    s["alphats"] = s["alphacum"] = ("float32", (m["T"] + 1,))
    for name, shape in vqgan_shapes(m).items():
        s["first_stage_model." + name] = ("int64" if name.endswith("used") else "float32", shape)
    net = gpt_shapes(m) if is_gpt(m, scale) else x_shapes(m)
    for name, shape in net.items():
        s["transformer." + name] = ("float32", shape)
    if ema:
        s["transformer_ema.decay"], s["transformer_ema.num_updates"] = ("float32", ()), ("int32", ())
        for name, shape in net.items():
            if not name.endswith("attn.mask"):
                s["transformer_ema." + name.replace(".", "")] = ("float32", shape)
    return s


def state_dict(m, first_stage, net, ema):
    alpha = 1 - torch.tensor([0.0] + m["betas"])
    state = OrderedDict(sos_token=torch.zeros(1, dtype=torch.int64), alphats=alpha, alphacum=alpha.cumprod(0))
    state.update(("first_stage_model." + name, x) for name, x in first_stage.items())
    if not ema:
        state.update(("transformer." + name, x) for name, x in net.items())
        return state
    state.update(("transformer." + name, x if name.endswith("mask") else x.roll(1)) for name, x in net.items())
    state["transformer_ema.decay"] = torch.tensor(0.9999)
    state["transformer_ema.num_updates"] = torch.tensor(540000, dtype=torch.int32)
    state.update(("transformer_ema." + name.replace(".", ""), x) for name, x in net.items() if not name.endswith("mask"))
    return state


def expectation(m, scale, first_stage, net):
    """Tokens and what the network makes of them; joint: a row for every scale."""
    B = m["T"] if m["joint"] else 2
    g = torch.Generator().manual_seed(1000 + scale)
    x, x_t = torch.randint(m["codes"], (2, B, N), generator=g)
    t = torch.arange(1, B + 1) if m["joint"] else torch.full((B,), scale)
    label = torch.randint(1000, (B,), generator=g)
    prompt = torch.stack([t, label], 1) if m["classes"] else t[:, None]
    logits = gpt_logits(m, net, x, prompt) if is_gpt(m, scale) else x_logits(m, net, x, x_t, prompt)
    tensors = {"in.x": x.int(), "in.x_t": x_t.int(), "in.t": t.int(), "out.logits": logits}
    if m["classes"]:
        tensors["in.label"] = label.int()
    if scale <= 1:
        tensors["out.image"] = decode(first_stage, x[:1])
    return tensors


def write_scale(m, scale, folder, first_stage, ema, seed):
    began, name = time.time(), f"scale{scale}" if scale else "joint"
    shapes = gpt_shapes(m) if is_gpt(m, scale) else x_shapes(m)
    net = random_weights(m, shapes, seed)
    state = state_dict(m, first_stage, net, ema)
    expected = [(k, v) for k, (_, v) in state_shapes(m, scale, ema).items()]
    if [(k, tuple(v.shape)) for k, v in state.items()] != expected:
        sys.exit(f"{name}: the state dict is not what the list of its tensors says")
    write_ckpt(f"{folder}/{name}.ckpt", lightning(state))
    del state
    written = time.time()
    tensors = expectation(m, scale, first_stage, net)
    write_safetensors(f"{folder}/{name}.logits.safetensors", tensors)
    largest = tensors["out.logits"].abs().max().item()
    print(f"{folder}/{name}.ckpt: {count(shapes) / 1e6:.1f} million parameters, "
          f"{os.path.getsize(f'{folder}/{name}.ckpt') / 2**30:.2f} GiB in {written - began:.0f} s; "
          f"logits up to {largest:.1f} in {time.time() - written:.0f} s", flush=True)


def link_scale(m, scale, folder, first_stage, seed):
    """The same weights as scale 1, run as scale `scale`."""
    target = f"{folder}/scale{scale}.ckpt"
    if os.path.exists(target):
        os.remove(target)
    os.link(f"{folder}/scale1.ckpt", target)
    net = random_weights(m, x_shapes(m), seed)
    write_safetensors(f"{folder}/scale{scale}.logits.safetensors", expectation(m, scale, first_stage, net))
    print(f"{target}: a link to scale 1", flush=True)


def write_vqgan(m, first_stage, dest):
    """taming's own file: no prefix, no remap table, and tensors of the training losses."""
    state = OrderedDict((k, x) for k, x in first_stage.items() if k != "quantize.used")
    state["loss.discriminator.main.0.weight"] = torch.randn(64, 3, 4, 4)
    os.makedirs(f"{dest}/vqgan", exist_ok=True)
    write_ckpt(f"{dest}/vqgan/vqgan-{m['vqgan']}.ckpt", lightning(state))


def main():
    p = argparse.ArgumentParser(description="full-size checkpoints with random weights, and their logits")
    p.add_argument("model", choices=MODELS)
    p.add_argument("dest", nargs="?", default="models")
    p.add_argument("--scales", help="e.g. 1,4 (default: all)")
    p.add_argument("--no-ema", action="store_true")
    p.add_argument("--share", action="store_true", help="scales 2..T-1 are links to scale 1")
    p.add_argument("--list", action="store_true", help="print the tensors of the chosen scales, write nothing")
    a = p.parse_args()
    m = MODELS[a.model]
    scales = [0] if m["joint"] else [int(s) for s in a.scales.split(",")] if a.scales else range(1, m["T"] + 1)
    check_counts()
    if a.list:
        for scale in scales:
            for name, (dtype, shape) in state_shapes(m, scale, not a.no_ema).items():
                print(name, dtype, list(shape))
        return
    folder = f"{a.dest}/{m['folder']}"
    os.makedirs(folder, exist_ok=True)
    if m["joint"]:  # not one of the named models: its recipe goes with it
        shutil.copy(os.path.join(os.path.dirname(__file__), "../models/ffhq.txt"), f"{folder}/config.txt")
    first_stage = random_weights(m, vqgan_shapes(m), 1)
    with torch.no_grad():
        write_vqgan(m, first_stage, a.dest)
        for scale in scales:
            if a.share and 1 < scale < m["T"]:
                link_scale(m, scale, folder, first_stage, 11)
            else:
                write_scale(m, scale, folder, first_stage, not a.no_ema, 10 + scale)


if __name__ == "__main__":
    main()
