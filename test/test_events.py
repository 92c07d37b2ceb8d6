"""What ./train shows of a run: loss.svg, and TensorBoard's event files, read here from their bytes (every checksum too) and,
where TensorBoard is installed, by its own reader.

    python3 test/test_events.py BUILD     BUILD: the folder that holds train and pictures
"""
import glob
import os
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAIL", what)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(data):
    """TFRecord framing; raises where a checksum or a length is wrong."""
    at = 0
    while at < len(data):
        (length,), (crc,) = struct.unpack("<Q", data[at : at + 8]), struct.unpack("<I", data[at + 8 : at + 12])
        payload, (end,) = data[at + 12 : at + 12 + length], struct.unpack("<I", data[at + 12 + length : at + 16 + length])
        if crc != masked(data[at : at + 8]) or end != masked(payload):
            raise ValueError("checksum at byte %d" % at)
        yield payload
        at += 16 + length


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """A protocol buffer as a list of (number, value)."""
    at, out = 0, []
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            size, kind = (8, "<d") if key & 7 == 1 else (4, "<f")
            (value,), at = struct.unpack(kind, data[at : at + size]), at + size
        out.append((key >> 3, value))
    return out


def events(path):
    with open(path, "rb") as f:
        return [dict(fields(r)) for r in records(f.read())]


def values(path):
    """(tag, step, value) of every scalar, and (step, height, width, PNG) of every picture"""
    scalars, pictures = [], []
    for e in events(path):
        for number, value in fields(e.get(5, b"")):
            v = dict(fields(value))
            if 2 in v:
                scalars.append((v[1].decode(), e[2], v[2]))
            else:
                i = dict(fields(v[4]))
                pictures.append((e[2], i[1], i[2], i[4]))
    return scalars, pictures


def train(build, *arguments):
    options = ["--config", "test/tiny.txt", "--save-every", "5", "--eval-every", "10", "--picture-every", "20"]
    r = subprocess.run([build + "/train"] + options + list(arguments), capture_output=True, text=True)
    check(r.returncode == 0, "train %s: %s" % (arguments, r.stderr[-300:]))


def log_lines(run, stage):
    with open(run + "/log.tsv") as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    return {int(r[1]): dict(zip(rows[0], r)) for r in rows[1:] if r[0] == stage}


def test_file(run, stage):
    """One file: version, start, the log's numbers, the picture's bytes."""
    paths = sorted(glob.glob(run + "/events/%s/events.out.tfevents.*" % stage))
    check(len(paths) == 1, "%s: one file of events, not %s" % (stage, paths))
    first = events(paths[0])
    check(first[0][3] == b"brain.Event:2" and first[0][2] == 0, "the version comes first")
    check(dict(fields(first[1][7]))[1] == 1 and first[1][2] == 1, "then a start at step 1")
    check(all(1e9 < e[1] < 1e11 for e in first), "wall times")
    scalars, pictures = values(paths[0])
    log = log_lines(run, stage)
    names = {"hard_or_l1": "l1" if stage == "vqgan" else "hard", "soft_or_l2": "l2" if stage == "vqgan" else "soft"}
    expected = []
    for step in (10, 20, 30):
        for name, text in list(log[step].items())[2:]:
            if not text:  # of a stage or step that has no such number
                continue
            expected.append((names.get(name, name), step, struct.unpack("<f", struct.pack("<f", float(text)))[0]))
    check(scalars == expected and len(expected) >= 30, "%s: the log's numbers: %s" % (stage, scalars[:3]))
    check([p[0] for p in pictures] == [20, 30], "pictures at steps 20 and 30")
    for step, height, width, png in pictures:
        with open("%s/%s-%06d.png" % (run, stage, step), "rb") as f:
            check(png == f.read() and struct.unpack(">II", png[16:24]) == (width, height), "the picture of step %d" % step)
    return paths[0]


def test_damage(path):
    """This reader sees a changed bit."""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    data[len(data) // 2] ^= 4
    try:
        list(records(bytes(data)))
        check(False, "a changed bit is seen")
    except (ValueError, struct.error, IndexError):
        check(True, "a changed bit is seen")


def test_resume(build, run, data):
    """A run that ends at step 20 goes on to 40: a second file, which starts at step 21."""
    train(build, "--data", data, "--run", run, "--vqgan", "--steps", "20")
    train(build, "--data", data, "--run", run, "--vqgan", "--steps", "40", "--resume")
    train(build, "--data", data, "--run", run, "--vqgan", "--steps", "40", "--resume")  # nothing is left
    paths = sorted(glob.glob(run + "/events/vqgan/*"))
    check(len(paths) == 2, "two files after a resume: %s" % paths)
    start = [e[2] for e in events(paths[1]) if 7 in e]
    check(start == [21], "the second starts at step 21: %s" % start)
    steps = [[s for tag, s, v in values(p)[0] if tag == "loss"] for p in paths]
    check(steps == [[10, 20], [30, 40]], "each has its steps: %s" % steps)


def remove_states(run, stage):
    for path in glob.glob(glob.escape(run) + "/%s.state*.safetensors" % stage):
        os.remove(path)


def repeated(run, build, data):
    """A kill after step 25 with a checkpoint at 15 only: the log and the files say 20, then 20 again."""
    folder = run + "/events/scale2"
    paths = glob.glob(folder + "/*")
    options = ["--save-every", "15", "--data", data, "--run", run, "--scale", "2", "--resume"]
    remove_states(run, "scale2")
    train(build, "--data", data, "--run", run, "--scale", "2", "--steps", "15", "--seed", "4")  # a state of step 15
    check(len(glob.glob(folder + "/*")) == len(paths) + 1, "a file for each start")
    train(build, *options, "--steps", "30")
    return folder


def test_svg(run, stages):
    path = run + "/loss.svg"
    check(os.path.getsize(path) < 100000 * len(stages), "a small file")
    root = xml.etree.ElementTree.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    text = ["".join(t.itertext()) for t in root.iter(name + "text")]
    check(root.tag == name + "svg" and text[0] == run, "an SVG with the run's name")
    for stage in stages:
        check(any(t.startswith(stage + " step 30, loss ") for t in text), "a panel for " + stage)
    for word in ("hard", "loss = hard", "loss = soft", "L1", "validation", "validation, EMA", "step", "30"):
        check(word in text, "the word " + word)
    circles = list(root.iter(name + "circle"))
    check(len(circles) >= 3 * len(stages), "points of validation")
    width, height = float(root.get("width")), float(root.get("height"))
    check(all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles), "inside the picture")
    lines = [p for p in root.iter(name + "path") if p.get("class") in ("line", "raw")]
    check(all("nan" not in p.get("d") and "inf" not in p.get("d") for p in lines), "finite lines")
    check(sum(p.get("class") == "raw" and p.get("d").count(" ") >= 30 for p in lines) == len(stages), "a loss a step")


def test_long(build, run, data):
    """A log of 200,000 steps: still small, and whole."""
    train(build, "--data", data, "--run", run, "--vqgan", "--steps", "1")
    with open(run + "/log.tsv", "a") as f:
        for step in range(2, 200001):
            val = "\t".join(["%g" % (2 + 1000 / step)] * 4) if step % 500 == 0 else "\t\t\t"
            f.write("scale1\t%d\t%g\t%g\t%g\t1e-4\t1\t1.0\t%s\n" % (step, 2 + (step * 7919 % 101) / 100, 2, 3, val))
        for step in range(199000, 199501):  # again, from a checkpoint before
            f.write("scale1\t%d\t%g\t2\t3\t1e-4\t1\t1.0\t\t\t\t\n" % (step, 4))
        f.write("scale1\t200001\t9")  # cut short
    remove_states(run, "vqgan")
    train(build, "--data", data, "--run", run, "--vqgan", "--steps", "1")
    check(os.path.getsize(run + "/loss.svg") < 120000, "%d bytes" % os.path.getsize(run + "/loss.svg"))
    with open(run + "/loss.svg") as f:
        check("step 199500, loss 4," in f.read(), "the last whole step, where it was repeated")


def test_tensorboard(run, folder):
    try:
        import logging

        logging.disable(logging.WARNING)
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        print("skipped: TensorBoard's own reader, which is not installed (pip install tensorboard)")
        return
    a = event_accumulator.EventAccumulator(run + "/events/scale1", size_guidance={"images": 0, "scalars": 0})
    a.Reload()
    log = log_lines(run, "scale1")
    got = [(e.step, "%.5g" % e.value) for e in a.Scalars("loss")]
    check(got == [(s, "%.5g" % float(log[s]["loss"])) for s in (10, 20, 30)], "TensorBoard reads the losses: %s" % got)
    check([i.step for i in a.Images("picture")] == [20, 30], "and the pictures")
    b = event_accumulator.EventAccumulator(folder, size_guidance={"scalars": 0})
    b.Reload()
    steps = [e.step for e in b.Scalars("loss")]
    check(steps == [10, 15, 20, 30], "what was repeated is there once: %s" % steps)
    log = log_lines(run, "scale2")
    check(["%.5g" % e.value for e in b.Scalars("loss")] == ["%.5g" % float(log[s]["loss"]) for s in steps], "as the log has it")


def main(build):
    check(crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA, "CRC-32C's known values")
    with tempfile.TemporaryDirectory() as folder:
        data, run = folder + "/data", folder + "/a <run> & more"
        subprocess.run([build + "/pictures", "make", data, "60", "20"], check=True)
        stages = ["vqgan", "scale1", "scale2", "scale3", "joint"]
        for stage in stages:
            arguments = ["--scale", stage[5:]] if stage.startswith("scale") else ["--" + stage]
            train(build, "--data", data, "--run", run, *arguments)
            path = test_file(run, stage)
        test_damage(path)
        test_svg(run, stages)
        test_resume(build, folder + "/resumed", data)
        test_long(build, folder + "/long", data)
        test_tensorboard(run, repeated(run, build, data))


main(sys.argv[1])
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)
