#!/usr/bin/env python3
"""test_validation.py BUILD: the validation losses that ./train reports, computed anew from its run's files.

Pictures are made, a first stage and transitions trained for a few steps by ./train. Then PyTorch, in double and with
the modules of test_torch.py, loads the weights (strict=True) and does the rest by itself: the pictures' preparation,
the reconstruction losses, the tokens, the noise, the posterior and a transition's two losses (SPEC sections 3, 4, 8).
They must be what log.tsv and --eval say: an encoder-decoder scale, the decoder-only one and the joint network, with
the weights as they are and with their EMA. Needs torch; skipped aloud without.
"""

import csv
import os
import re
import struct
import sys
import tempfile
import zlib

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    print("skipped: validation losses beside PyTorch's need torch (pip install torch)")
    sys.exit(0)

from test_torch import Transition, check, finish, load_vqgan, read_safetensors, run, train

SIDE, T, BATCH, STEPS = 16, 3, 4, "12"
TOLERANCE = 1e-5  # relative
W_L1, W_L2 = 0.01, 0.02  # so that the small codebook loss is seen in the sum
CHANGES = [  # to test/tiny.txt: every block of the first stage, all parts of the losses, weights far from their EMA
    ("ch_mult 1,1", "ch_mult 1,2"),
    ("attn_resolutions -", "attn_resolutions 8"),
    ("vqgan.train.steps 30", f"vqgan.train.steps 30\nvqgan.train.l1_weight {W_L1}\nvqgan.train.l2_weight {W_L2}"),
    ("scale.model.params.alpha 1.0", "scale.model.params.alpha 0.5"),
    ("lr_max 3e-3", "lr_max 1e-2\nscale.model.params.scheduler_config.params.lr_min 1e-2"),
]


def agree(what, computed, said, tolerance):
    check(what, abs(computed - said) <= tolerance, f"{computed:.8g}, ./train says {said}")


def agree_log(what, computed, said):
    """log.tsv has six digits."""
    agree(f"{what}, log", computed, float(said), TOLERANCE * abs(computed))


def agree_line(what, computed, said):
    """--eval prints a number of decimals, all of which count."""
    half = 0.5 * 0.1 ** len(said.split(".")[1])
    agree(f"{what}, --eval", computed, float(said), TOLERANCE * abs(computed) + half)


# ---- pictures ----


def write_png(path, picture):
    """picture (SIDE,SIDE,3) of bytes; every row is stored as it is, after a 0."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in picture)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def make_pictures(folder):
    """Noisy checkers in two classes, and the validation split as the network takes it: (B,3,SIDE,SIDE).

    They have the model's size already: preparing them is no more than to bring 0..255 to -1..1."""
    generator, held_out = torch.Generator().manual_seed(1), []
    for split, n in ("train", 12), ("val", 10):
        for label in "ab":
            os.makedirs(f"{folder}/{split}/{label}")
            for i in range(n // 2):
                colour = torch.randint(256, (4, 4, 3), generator=generator).repeat_interleave(4, 0)
                noise = torch.randint(-20, 21, (SIDE, SIDE, 3), generator=generator)
                picture = (colour.repeat_interleave(4, 1) + noise).clamp(0, 255)
                write_png(f"{folder}/{split}/{label}/{i}.png", picture)
                if split == "val":
                    held_out.append(picture.permute(2, 0, 1).double() / 127.5 - 1)
    return torch.stack(held_out)


# ---- what the run has ----


def last_evaluation(folder, stage):
    with open(f"{folder}/log.tsv") as f:
        return [row for row in csv.DictReader(f, delimiter="\t") if row["stage"] == stage and row["val"]][-1]


def read_tokens(path):
    """tokens (n,N) of the pictures as they are, not mirrored; labels (n)"""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    magic, n, h, w, _, flips, _, _ = struct.unpack_from("<8s7Q", data)
    check(f"{path} is a token file", magic == b"ibtokens")
    labels = torch.frombuffer(data, dtype=torch.int32, count=n, offset=64).long()
    tokens = torch.frombuffer(data, dtype=torch.int16, count=n * flips * h * w, offset=64 + 4 * n).long()
    return tokens.reshape(n, flips, h * w)[:, 0], labels


def load_transition(folder, stage, first_stage, vqgan):
    """With the weights that sampling uses, which are the EMA; with those that are trained."""
    weights, meta = read_safetensors(f"{folder}/{stage}.safetensors")
    state, _ = read_safetensors(f"{folder}/{stage}.state.safetensors")
    trained = {"transformer." + name[len("value.") :]: x for name, x in state.items() if name.startswith("value.")}
    kept = {name: x for name, x in weights.items() if name.endswith(".mask") or not name.startswith("transformer.")}
    models = []
    for own in weights, {**kept, **trained}:
        model = Transition(meta, vqgan)
        model.load_state_dict({**first_stage, **own}, strict=True)
        models.append(model.double())
    return models, float(meta["model.params.alpha"])


# ---- the first stage ----


def check_vqgan(vqgan, images, row, line):
    """Of the whole batches, as ./train; returns the tokens (n,N) of all pictures."""
    every, _ = vqgan.nearest(vqgan.encode(images))
    images = images[: len(images) // BATCH * BATCH]
    z = vqgan.encode(images)
    codes, zq = vqgan.nearest(z)
    difference = vqgan.decode(zq) - images
    l1, l2 = difference.abs().mean().item(), difference.square().mean().item()
    codebook = 1.25 * (zq - z).square().mean().item()  # beta = 0.25 on one of two terms of the same value
    used = codes.flatten().bincount().double()
    used = used[used > 0] / used.sum()
    agree_log("vqgan: L1", l1, row["val_part1_ema"])
    agree_log("vqgan: L2", l2, row["val_part2_ema"])
    loss = W_L1 * l1 + W_L2 * l2 + codebook
    agree_log("vqgan: loss", loss, row["val"])
    said = float(row["val"]), W_L1 * float(row["val_part1_ema"]), W_L2 * float(row["val_part2_ema"])
    agree("vqgan: codebook loss", codebook, said[0] - said[1] - said[2], 0.5 * TOLERANCE * sum(said))
    agree_log("vqgan: codes", len(used), row["val_codes"])
    agree_log("vqgan: perplexity", (-(used * used.log()).sum()).exp().item(), row["val_perplexity"])
    said = re.search(r"validation loss ([\d.]+), L1 ([\d.]+), PSNR ([\d.]+) dB", line)
    psnr = 10 * torch.log10(torch.tensor(4 / l2)).item()
    for what, computed, text in zip(("loss", "L1", "PSNR"), (loss, l1, psnr), said.groups()):
        agree_line(f"vqgan: {what}", computed, text)
    return every.flatten(1)


# ---- noise: Philox4x32-10, counter and key (Salmon et al. 2011) ----

WORD = 0xFFFFFFFF
VALIDATION_SEED, RNG_NOISE = 0x76616C6964, 4  # training/second_stage.c, base/base.h


def philox(seed, stream, index):
    c0, c1, c2, c3 = index & WORD, index >> 32, stream & WORD, stream >> 32
    k0, k1 = seed & WORD, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def noised(x, t, beta, K):
    """One step of the forward chain: each token gives way to a uniform one with probability beta."""
    out = x.flatten().clone()
    for i in range(len(out)):
        a, b, c, d = philox(VALIDATION_SEED, RNG_NOISE << 56 | t << 32, i)
        if ((a << 32 | b) >> 11) * 2.0**-53 < beta:
            out[i] = (c << 32 | d) * K >> 64
    return out.view_as(x)


# ---- transitions ----


def losses(model, t, x0, labels):
    """hard, soft: nats per token, over all held-out pictures at scale t"""
    K = model.first_stage_model.quantize.embedding.num_embeddings
    beta = [0.0] + [1 / (T - s + 1) for s in range(1, T + 1)]  # geometric
    alpha = 1 - torch.tensor(beta, dtype=torch.float64)
    alphacum = alpha.cumprod(0)
    x_prev = x_t = x0
    for s in range(1, t + 1):
        x_prev, x_t = x_t, noised(x_t, s, beta[s], K)

    def after(x, kept):  # q(. | x) when a token is still its own with probability `kept`
        return kept * F.one_hot(x, K) + (1 - kept) / K

    q = after(x0, alphacum[t - 1]) * after(x_t, alpha[t])
    q = q / q.sum(-1, keepdim=True)
    log_p = model.transformer(x_prev, x_t, t, labels, alpha).log_softmax(-1)
    hard = F.nll_loss(log_p.flatten(0, 1), x_prev.flatten())
    soft = (torch.xlogy(q, q) - q * log_p).sum(-1).mean()
    return torch.stack([hard, soft])


def check_transition(folder, stage, scales, first_stage, vqgan, held_out, line):
    row = last_evaluation(folder, stage)
    models, a = load_transition(folder, stage, first_stage, vqgan)
    ema, trained = (torch.stack([losses(model, t, *held_out) for t in scales]).mean(0).tolist() for model in models)
    both = lambda part: a * part[1] + (1 - a) * part[0]
    check(f"{stage}: its EMA is another", abs(ema[0] - trained[0]) > 10 * TOLERANCE * ema[0])
    check(f"{stage}: hard and soft are not the same", abs(ema[0] - ema[1]) > 10 * TOLERANCE * ema[0])
    agree_log(f"{stage}: loss", both(trained), row["val"])
    agree_log(f"{stage}: loss with EMA", both(ema), row["val_ema"])
    agree_log(f"{stage}: hard with EMA", ema[0], row["val_part1_ema"])
    agree_log(f"{stage}: soft with EMA", ema[1], row["val_part2_ema"])
    said = re.search(r"hard ([\d.]+) soft ([\d.]+); with EMA: hard ([\d.]+) soft ([\d.]+)", line)
    names = "hard", "soft", "hard with EMA", "soft with EMA"
    for name, computed, text in zip(names, trained + ema, said.groups()):
        agree_line(f"{stage}: {name}", computed, text)


def main():
    build = sys.argv[1]
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        images = make_pictures(f"{scratch}/data")
        folder = train(build, scratch, "plain", CHANGES, STEPS)
        options = ["--config", f"{scratch}/plain.txt", "--data", f"{scratch}/data", "--run", folder]
        run(f"{build}/train", *options, "--joint", "--steps", STEPS)
        evaluate = lambda *stage: run(f"{build}/train", *options, *stage, "--eval")

        vqgan, first_stage = load_vqgan(folder)
        vqgan = vqgan.double()
        tokens = check_vqgan(vqgan, images, last_evaluation(folder, "vqgan"), evaluate("--vqgan"))
        held_out = read_tokens(f"{folder}/val.tokens")
        check("val.tokens", torch.equal(held_out[0], tokens))
        check("the labels of val.tokens", held_out[1].tolist() == [0] * 5 + [1] * 5)
        for stage, scales, *option in (
            ("scale2", [2], "--scale", "2"),
            ("scale3", [3], "--scale", "3"),
            ("joint", [1, 2, 3], "--joint"),
        ):
            check_transition(folder, stage, scales, first_stage, vqgan, held_out, evaluate(*option))
    return finish()


if __name__ == "__main__":
    sys.exit(main())
