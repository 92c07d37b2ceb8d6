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

Every way of every row is timed by another process, which is killed, with the compilers that it started, after LIMIT seconds:
a compiler may take for ever, and no signal ends a product that waits for its threads. What was killed is said; the other
ways count.
"""
import json
import os
import select
import signal
import subprocess
import sys
import time

SIZES = ("encoder-decoder", "last scale (GPT)")
FORMATS = ("f32", "bf16", "int8")
LIMIT = 120  # seconds for one way of a row, its compilation included


class Worker:
    """A process that times one thing after the other; another takes its place when it was killed or ended."""

    def __init__(self, limit):
        self.process, self.limit = None, limit

    def start(self):
        self.process = subprocess.Popen([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                                                      "bench_torch_rows.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True)

    def stop(self):
        if self.process:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own: compilers too
            except ProcessLookupError:
                pass
            self.process.wait()
            self.process.stdin.close(), self.process.stdout.close()
        self.process = None

    def ask(self, what, kind, *arguments):
        """The answer, or None, which is said: what failed, ended or took longer than the limit."""
        if not self.process:
            self.start()
        why, answer, end = None, b"", time.monotonic() + self.limit
        try:
            self.process.stdin.write(json.dumps([kind, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: nothing comes
        while not why and not answer.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
                why = f"not done after {self.limit:g} s"
            else:
                part = os.read(self.process.stdout.fileno(), 65536)
                answer += part
                why = None if part else "PyTorch's process ended"
        if why:
            self.stop()
        else:
            value, why = json.loads(answer)
        if why:
            print(f"skipped: {what}: {why}", flush=True)
            return None
        return value

    def fastest(self, what, kind, arguments, ways):
        """The least of what the ways give; None: none gave anything."""
        found = [self.ask(f"{what}, {way}", kind, *arguments, way) for way in ways]
        return min((f for f in found if f is not None), default=None)


def measure(worker, wanted):
    """Name of a row -> seconds, for the rows that `wanted` says."""
    result = {}
    for what in SIZES:
        for format in FORMATS:
            for B in (1, 16):
                names = [f"{what}, {a} token, batch {B}, {format}" for a in ("a", "an early")]
                if any(map(wanted, names)):
                    times = worker.fastest(names[0], "token", (what, format, B), ("eager", "compiled"))
                    result.update(zip(names, times or []))
            name = f"{what}, encoder pass, batch 1, {format}"
            if what == "encoder-decoder" and format != "int8" and wanted(name):
                result[name] = worker.ask(name, "encoder", what, format)
        if wanted(f"official {what}"):
            result[f"official {what}"] = worker.ask(f"official {what}", "official", what)
    return {name: t for name, t in result.items() if t}


def in_format(name):
    """The row's name without its format, which of PyTorch's it goes with: (name, is it bf16?)"""
    for format in (", bf16x3", ", bf16"):
        if format in name:
            return name.replace(format, "", 1), format == ", bf16"
    return name, False


def named(name, bf16):
    return " ".join(name.split()) + (", bf16" if bf16 else "")


def stage_ways(name):
    """The ways in which PyTorch does a row of the first stage or of convolutions."""
    whole, training = "->" not in name, name.startswith("training step")
    if training:
        print(f"skipped: {name}, compiled: it compiles for longer than all the rest takes", flush=True)
    return ["rows", "channels last"] + (["compiled"] if whole and name.endswith("batch 1") and not training else [])


def beside(title, ours, seconds):
    """compare, with seconds(name without format, bf16), which is asked once for both f32 and bf16x3."""
    asked, theirs = {}, {}
    for name in ours:
        key = in_format(name)
        if key not in asked:
            asked[key] = seconds(*key)
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
    parts = [theirs.get(n) for n in (f"{first}, encoder pass, batch 1, f32", f"official {first}", f"official {last}")]
    official = 3 * (parts[0] + parts[1]) + parts[2] if all(parts) else None
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
            if B == 1 and official:
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
    worker = Worker(LIMIT)
    version = worker.ask("PyTorch", "version")
    if not version:
        sys.exit(1)
    print(f"\nbeside PyTorch {version}", flush=True)
    lines, images = [], []
    if ours("decode"):
        theirs = measure(worker, wanted)
        lines += compare("decoding", ours("decode"), theirs)
        images = [] if words else image_rows(ours("decode"), theirs)
        compare("images of four scales", {name: t for name, t, _ in images}, {name: their for name, _, their in images})
    steps = {name: t for name, t in ours("train").items() if name.endswith("whole step")}
    if ours("gemm"):
        lines += beside("products", ours("gemm"), lambda name, bf16: worker.ask(named(name, bf16), "product", name, bf16))
    if steps:
        lines += beside("training", steps, lambda name, bf16: worker.fastest(
            named(name, bf16), "training", (name.split(", batch")[0], bf16), ("eager", "compiled")))
    if ours("conv", "vqgan"):
        lines += beside("the first stage", ours("conv", "vqgan"), lambda name, bf16: worker.fastest(
            named(name, bf16), "stage", (name, bf16), stage_ways(name)))
    worker.stop()
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
