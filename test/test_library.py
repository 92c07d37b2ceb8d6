"""test_library.py BUILD: libimagebart by dev/imagebart.py. It draws and completes what ./sample and ./inpaint do, byte by
byte; two models at once in one process give what each gives alone; errors and cancelling leave the model usable."""
import ctypes, os, re, subprocess, sys, tempfile, threading

build = os.path.abspath(sys.argv[1])
os.environ["IMAGEBART_LIBRARY"] = build + "/libimagebart.so"
sys.path.insert(0, "dev")
sys.dont_write_bytecode = True
import imagebart

passed = failed = 0
def ok(what, right):
    global passed, failed
    passed, failed = passed + bool(right), failed + (not right)
    if not right: print("FAIL", what)
def refused(what, word, call):
    try:
        call()
        ok(what + ": it worked", False)
    except RuntimeError as e:
        ok("%s: %s" % (what, e), word in str(e))
def raw(x): return bytes(x)

with tempfile.TemporaryDirectory() as folder:
    mine, theirs = folder + "/mine.png", folder + "/theirs.png"
    def same(box="0 0 64 64"): return subprocess.call([build + "/pictures", "same", mine, theirs, *box.split()]) == 0
    def program(*words): subprocess.check_call([build + "/" + words[0], *words[1:], "-q", "-o", theirs])
    model, half = imagebart.Model("emoji"), imagebart.Model("models/emoji", weights="bf16")
    side, shape = model.shape.side, model.shape
    ok("shape", (side, shape.h, shape.w, shape.scales, shape.classes) == (64, 8, 8, 3, 9))

    subprocess.check_call([sys.executable, "dev/imagebart.py", "emoji", mine, "seed=7", "class_name=food", "best_of=2"])
    program("sample", "emoji", "-n", "1", "--seed", "7", "--class", "food", "--best-of", "2")
    ok("as ./sample", same())
    drawn, seen = {}, []
    options = dict(seed=3, temperature="0.9,0.8,0.7", top_k=20, chain_length="1,2,1", best_of=1)
    for name, m in (("f32", model), ("bf16", half)):
        drawn[name] = m.sample(2, preview=lambda k, scale, rgb: seen.append((k, scale, bytes(rgb[:12288]))), **options)
    imagebart.write_png(mine, side, raw(drawn["bf16"][0])[12288:])
    program("sample", "emoji", "-n", "1", "--first", "1", "--seed", "3", "--temperature", "0.9,0.8,0.7", "--top-k", "20",
            "--chain-length", "1,2,1", "--best-of", "1", "--weights", "bf16")
    ok("the second in bf16", same())
    ok("previews of two pictures", {s[:2] for s in seen} == {(k, s) for k in (0, 1) for s in (1, 2, 3)})
    ok("the last is the picture", [s for s in seen if s[:2] == (1, 1)][0][2] == raw(drawn["f32"][0])[12288:])
    ok("the first stage", raw(drawn["f32"][0]) != raw(drawn["bf16"][0]))

    again = {}
    threads = [threading.Thread(target=lambda n=n, m=m: again.__setitem__(n, m.sample(2, **options)))
               for n, m in (("f32", model), ("bf16", half))]
    for t in threads: t.start()
    for t in threads: t.join()
    ok("two at once", all(raw(again[n][0]) == raw(drawn[n][0]) for n in drawn))

    rgb, tokens = model.buffers(2)
    keep = bytes(int(y >= 32) for y in range(64) for x in range(64))
    picture = raw(drawn["f32"][0])[:12288]
    flat = [int(t) for row in drawn["f32"][1] for t in (row.flatten() if hasattr(row, "flatten") else [row])]
    model.call("decode", model.handle, (ctypes.c_int32 * len(flat))(*flat), ctypes.c_size_t(2), rgb)
    ok("decode", raw(rgb) == raw(drawn["f32"][0]))
    model.call("encode", model.handle, raw(rgb), ctypes.c_size_t(2), tokens)
    model.call("decode", model.handle, tokens, ctypes.c_size_t(2), rgb)
    far = [sum(abs(a - b) for a, b in zip(raw(rgb), other)) / len(rgb)
           for other in (raw(drawn["f32"][0]), raw(drawn["f32"][0])[12288:] + picture)]
    ok("encode: %s" % far, far[0] < 12 and far[0] < far[1] / 3)
    imagebart.write_png(folder + "/in.png", side, picture)
    out = model.inpaint(picture, keep, seed=5, class_name="food", best_of=2)[0]
    imagebart.write_png(mine, side, raw(out))
    program("inpaint", "emoji", folder + "/in.png", "--half", "upper", "--seed", "5", "--class", "food", "--candidates", "2")
    ok("as ./inpaint", same())
    ok("what is kept stays", raw(out)[6144:] == picture[6144:] and raw(out)[:6144] != picture[:6144])

    refused("no model", "no such folder", lambda: imagebart.Model("nope"))
    refused("weights", "expected f32", lambda: imagebart.Model("emoji", weights="f8"))
    refused("class", "class \"dog house\"", lambda: model.sample(class_name="dog house"))
    refused("temperature", "3 (one per scale", lambda: model.sample(temperature="1,2"))
    refused("a whole number", "whole number", lambda: model.sample(top_k="1.5"))
    refused("mask", "keeps", lambda: model.inpaint(picture, b"\1" * 4096, class_name="food"))
    refused("cancel", "cancelled", lambda: model.sample(4, progress=lambda scale, done, of: scale == 2, **options))
    ok("it goes on", raw(model.sample(2, **options)[0]) == raw(drawn["f32"][0]))
    model.close(), half.close()

if os.path.exists(build + "/libimagebart.a"):
    names = subprocess.check_output(["nm", "-g", "--defined-only", build + "/libimagebart.a"], text=True).split("\n")
    names = {line.split()[-1] for line in names if len(line.split()) == 3}
    calls = set(re.findall(r"^IMAGEBART_CALL [^(]*?(\w+)\(", open("sampling/libimagebart.h").read(), re.M))
    ok("no other names than the header's: %s" % names.symmetric_difference(calls), names == calls and len(calls) >= 10)
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
