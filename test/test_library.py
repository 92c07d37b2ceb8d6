"""test_library.py BUILD: libimagebart by dev/imagebart.py. It draws and completes what ./sample and ./inpaint do, byte by
byte; two models at once in one process give what each gives alone; errors and cancelling, at every step, leave the model
usable; it prints nothing, shows no names but its header's, and shares no variables but those that doc and header name."""
import ctypes, glob, locale, os, re, signal, subprocess, sys, tempfile, threading, warnings

build = os.path.abspath(sys.argv[1])
os.environ["IMAGEBART_LIBRARY"] = build + "/libimagebart.so"
sys.path.insert(0, "dev")
sys.dont_write_bytecode = True
import imagebart
warnings.simplefilter("ignore") # that pictures are no emoji, but where it is looked for

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
def raw(drawn): return [(bytes(picture), tokens.tolist() if hasattr(tokens, "tolist") else tokens) for picture, tokens in drawn]

with tempfile.TemporaryDirectory() as folder:
    mine, theirs, said = folder + "/mine.png", folder + "/theirs.png", folder + "/said"
    def same(box="0 0 64 64"): return subprocess.call([build + "/pictures", "same", mine, theirs, *box.split()]) == 0
    def program(*words): subprocess.check_call([build + "/" + words[0], *words[1:], "-q", "-o", theirs])
    def file(path):
        with open(path, "rb") as f: return f.read()
    printed, stderr = os.open(said, os.O_CREAT | os.O_RDWR), os.dup(2)
    os.dup2(printed, 2)
    sys.stderr = sys.stdout
    model, half = imagebart.Model("emoji"), imagebart.Model("models/emoji", weights="bf16")
    side, shape = model.shape.side, model.shape
    ok("shape", (side, shape.h, shape.w, shape.scales, shape.classes) == (64, 8, 8, 3, 9))
    ok("device: %s" % model.device, model.device == "CPU" and len(model.classes) == 9 and "food" in " ".join(model.classes))

    # ---- As the programs ----
    subprocess.check_call([sys.executable, "dev/imagebart.py", "emoji", mine, "seed=7", "class_name=food", "best_of=2"])
    program("sample", "emoji", "-n", "1", "--seed", "7", "--class", "food", "--best-of", "2")
    ok("as ./sample", same())
    seen = []
    options = dict(seed=3, temperature="0.9,0.8,0.7", top_k=20, chain_length="1,2,1", best_of=1)
    watched = dict(options, previews=1, guesses=1)
    def look(p): seen.append((p.number, p.scale, ctypes.string_at(p.rgb, 12288), p.label, p.bound,
                              p.entropy[:64] if p.entropy else None, p.tokens[:64]))
    drawn = {"f32": raw(model.sample(2, seen=look, **watched)), "bf16": raw(half.sample(2, **options))}
    imagebart.write_png(mine, side, drawn["bf16"][1][0])
    program("sample", "emoji", "-n", "1", "--first", "1", "--seed", "3", "--temperature", "0.9,0.8,0.7", "--top-k", "20",
            "--chain-length", "1,2,1", "--best-of", "1", "--weights", "bf16")
    ok("the second in bf16", same())
    ok("other weights, others", drawn["f32"] != drawn["bf16"])
    ok("pictures of every scale, then the two", sorted(s[:2] for s in seen) == [(k, s) for k in (0, 1) for s in (0, 1, 2, 3)])
    ok("the last is the picture", [s[2] for s in seen if s[:2] in ((1, 1), (1, 0))] == [drawn["f32"][1][0]] * 2)
    ok("classes", all(0 <= s[3] < 9 for s in seen) and len({s[3] for s in seen if s[0] == 1}) == 1)
    ok("guesses of what is finished", all((s[5] is not None) == (s[1] == 0) and (s[4] > 0) == (s[1] == 0) for s in seen))
    ok("entropy in bits", all(0 <= x <= 14 for s in seen if s[5] for x in s[5]) and max(max(s[5]) for s in seen if s[5]) > 1)
    ok("unwatched, the same", raw(model.sample(2, **options)) == drawn["f32"])

    # ---- Two models, really at once: each waits at its first steps until the other is there ----
    again, meeting = {}, threading.Barrier(2)
    def use(name, m):
        steps = [0]
        def step(scale, done, of):
            steps[0] += 1
            if steps[0] <= 20: meeting.wait(60)
        again[name] = raw(m.sample(2, step=step, **options))
    threads = [threading.Thread(target=use, args=pair) for pair in (("f32", model), ("bf16", half))]
    for t in threads: t.start()
    for t in threads: t.join()
    ok("two at once", again == drawn)

    # ---- The first stage ----
    pixels, N = 3 * side * side, shape.h * shape.w
    rgb, tokens = (ctypes.c_uint8 * (2 * pixels))(), (ctypes.c_int32 * (2 * N))()
    model.call("sample", model.handle, None, rgb, tokens)
    decoded, encoded = (ctypes.c_uint8 * (2 * pixels))(), (ctypes.c_int32 * (2 * N))()
    flat = [t for s in seen if s[1] == 0 for t in s[6]]
    model.call("decode", model.handle, (ctypes.c_int32 * (2 * N))(*flat), ctypes.c_size_t(2), decoded)
    pair = [picture for picture, _ in drawn["f32"]]
    ok("decode", bytes(decoded) == b"".join(pair))
    model.call("encode", model.handle, b"".join(pair), ctypes.c_size_t(2), encoded)
    model.call("decode", model.handle, encoded, ctypes.c_size_t(2), decoded)
    far = [sum(abs(a - b) for a, b in zip(bytes(decoded), other)) / len(decoded) for other in (b"".join(pair), pair[1] + pair[0])]
    ok("encode: %s" % far, far[0] < 12 and far[0] < far[1] / 3)

    # ---- Edits: of the model's size, of a file, of a large picture with a mask ----
    picture, keep = pair[0], bytes(int(y >= 32) for y in range(64) for x in range(64))
    imagebart.write_png(folder + "/in.png", side, picture)
    o = imagebart.Options(ctypes.sizeof(imagebart.Options), 1, seed=5, class_name=b"food", best_of=2)
    model.call("inpaint", model.handle, ctypes.byref(o), picture, keep, rgb, None)
    imagebart.write_png(mine, side, bytes(rgb)[:pixels])
    program("inpaint", "emoji", folder + "/in.png", "--half", "upper", "--seed", "5", "--class", "food", "--candidates", "2")
    ok("as ./inpaint", same())
    ok("what is kept stays", bytes(rgb)[6144:pixels] == picture[6144:] and bytes(rgb)[:6144] != picture[:6144])
    edit = dict(seed=5, class_name="food", best_of=2)
    ok("of a file", raw(model.complete(file(folder + "/in.png"), half="upper", paste=0, **edit))[0][0] == bytes(rgb)[:pixels])
    ok("of pixels", raw(model.complete((picture, 64, 64), (keep, 64, 64), paste=0, **edit))[0][0] == bytes(rgb)[:pixels])
    wide, high = 200, 150
    large = bytes((x * 3 + c * 40 + y) % 256 for y in range(high) for x in range(wide) for c in range(3))
    stays = bytes(int(not (40 <= y < 90 and 60 <= x < 120)) for y in range(high) for x in range(wide))
    grey = bytes(255 * k for k in stays for _ in range(3))
    imagebart.write_png(folder + "/large.png", wide, large), imagebart.write_png(folder + "/mask.png", wide, grey)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pasted = raw(model.complete((large, wide, high), (stays, wide, high), **edit))[0][0]
    ok("it is no emoji, which is said", ["unlike all that emoji has learnt" in str(w.message) for w in warned] == [True])
    imagebart.write_png(mine, wide, pasted)
    program("inpaint", "emoji", folder + "/large.png", "--mask", folder + "/mask.png", "--paste-into", folder + "/large.png",
            "--seed", "5", "--class", "food", "--candidates", "2")
    ok("pasted as ./inpaint does", same("0 0 %d %d" % (wide, high)))
    ok("kept pixels of a large one", all(pasted[3 * i:3 * i + 3] == large[3 * i:3 * i + 3] for i, k in enumerate(stays) if k))
    ok("a file with a file's mask", raw(model.complete(file(folder + "/large.png"), file(folder + "/mask.png"), **edit))[0][0] == pasted)
    invert = (bytes(1 - k for k in stays), wide, high)
    ok("a mask the other way", raw(model.complete((large, wide, high), invert, invert=1, **edit))[0][0] == pasted)

    # ---- Errors, and cancelling at any step, also while the class is guessed and the pictures are rated ----
    refused("no model", "no such folder", lambda: imagebart.Model("nope"))
    refused("weights", "expected f32", lambda: imagebart.Model("emoji", weights="f8"))
    refused("device", "expected cpu or cuda", lambda: imagebart.Model("emoji", device="tpu"))
    refused("class", "class \"dog house\"", lambda: model.sample(class_name="dog house"))
    refused("temperature", "3 (one per scale", lambda: model.sample(temperature="1,2"))
    refused("a whole number", "whole number", lambda: model.sample(top_k="1.5"))
    refused("mask", "keeps", lambda: model.complete((picture, 64, 64), (b"\1" * 4096, 64, 64), class_name="food"))
    refused("no class to be told", "keeps no token", lambda: model.complete((picture, 64, 64), (b"\0" * 4096, 64, 64)))
    refused("two masks", "one of mask, half", lambda: model.complete((picture, 64, 64), (keep, 64, 64), half="upper"))
    refused("a foreign mask", "is 8x8", lambda: model.complete((picture, 64, 64), (b"\0" * 64, 8, 8)))
    refused("no picture", "no picture", lambda: model.complete(None, half="upper"))
    refused("half", "expected upper", lambda: model.complete((picture, 64, 64), half="middle"))
    refused("a damaged file", "is", lambda: model.complete(file(folder + "/in.png")[:99], half="upper"))
    def steps_until(stop, **options):
        at, phases = [0], []
        def step(scale, done, of):
            at[0] += 1
            phases.append((scale, done))
            return stop in (at[0], (scale, done))
        model.complete((picture, 64, 64), half="upper", step=step, seed=5, best_of=2, guesses=1, chain_length=1, **options)
        return phases
    phases = steps_until(0)
    ok("steps while the class is guessed: %d" % phases.count((3, 0)), phases.count((3, 0)) > 6)
    ok("steps while it is rated", phases.count(phases[-1]) > 3)
    for stop in [1, 2, 3, 5, 8, len(phases) // 2, phases[-1]]: # how often one is asked differs from run to run
        refused("cancel at step %s of %d" % (stop, len(phases)), "cancelled", lambda: steps_until(stop))
    # ---- A caller's own locale, in which 0.9 is 0,9 ----
    if subprocess.call(["localedef", "-i", "de_DE", "-f", "UTF-8", folder + "/de_DE.UTF-8"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) < 2:
        os.environ["LOCPATH"] = folder
        locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
        points = set()
        def point(*at): points.add(locale.localeconv()["decimal_point"])
        other = imagebart.Model("emoji", weights="bf16")
        ok("the same in German", raw(other.sample(2, step=point, seen=point, **options)) == drawn["bf16"])
        point()
        ok("in which the caller is left: %s" % points, points == {","})
        other.close(), locale.setlocale(locale.LC_ALL, "C")
    else:
        print("skipped: a locale with another decimal point, which localedef would make")

    refused("cancel at a picture", "cancelled", lambda: model.sample(2, seen=lambda p: p.number == 1, **options))
    ok("it goes on", raw(model.sample(2, **options)) == drawn["f32"])
    child = os.fork()
    if not child:
        signal.alarm(300) # should it hang
        os._exit(raw(model.sample(2, **options)) != drawn["f32"])
    ok("in a child of this process", os.waitpid(child, 0)[1] == 0)
    model.close(), half.close()
    refused("a closed model", "model is NULL", lambda: model.sample(**options))
    os.dup2(stderr, 2)
    ok("nothing was printed: %s" % file(said), file(said) == b"")

    # ---- The example of doc/library.md, in C ----
    lines = open("doc/library.md").read().split("\n")
    start = lines.index("    #include <libimagebart.h>")
    code = "\n".join(line[4:] for line in lines[start:lines.index("    }", lines.index("    }", start) + 1) + 1])
    with open(folder + "/food.c", "w") as f: f.write(code)
    subprocess.check_call([os.environ.get("CC", "cc"), "-Wall", "-Wextra", "-Werror", "-I", "sampling", "-o", folder + "/food", folder + "/food.c",
                           "-L", build, "-limagebart"])
    where = dict(os.environ, LD_LIBRARY_PATH=build, IMAGEBART_MODELS=os.path.abspath("models"))
    ok("the example runs", subprocess.call([folder + "/food"], cwd=folder, env=where) == 0)
    program("sample", "emoji", "-n", "1", "--seed", "7", "--class", "food")
    ppm = file(folder + "/food.ppm")
    imagebart.write_png(mine, side, ppm[-pixels:])
    ok("the example's picture", ppm.startswith(b"P6 64 64 255\n") and same())

# ---- Names and variables ----
def names_of(*command): return {line.split()[-1] for line in subprocess.check_output(command, text=True).split("\n") if len(line.split()) > 2}
calls = set(re.findall(r"^IMAGEBART_CALL [^(]*?(\w+)\(", open("sampling/libimagebart.h").read(), re.M))
for name, where in ("libimagebart.so", ("-D",)), ("libimagebart.a", ("-g",)):
    names = names_of("nm", *where, "--defined-only", build + "/" + name)
    ok("%s shows its header's names: %s" % (name, names ^ calls), names == calls and len(calls) >= 10)
ok("it stays loaded, as its threads do", "NODELETE" in subprocess.check_output(["readelf", "-d", build + "/libimagebart.so"], text=True))
# What can be written to: threads (pool, known), memory of large pictures (lock, given_back, taken), packed operands of one
# product in bf16 at a time (shared_a, shared_b, shared_taken), the size of a cache
# (l2_known); the rest is of programs alone.
shared = {"pool", "known", "lock", "given_back", "taken", "shared_a", "shared_b", "shared_taken", "l2_known"}
programs = {"plainly", "looked_for_gpu", "program_name", "line_open", "interrupt_flag", "silent", "last_line", "last_t", "last_repeat",
            "first", "started", "last", "looked", "looked_next", "looked_lock", "_ZL20__cudaFatCubinHandle", "_ZL11cuda_layers"}
objects = glob.glob(build + "/lib/**/*.o", recursive=True)
written = {line.split()[-1].split(".")[0] for line in subprocess.check_output(["objdump", "-t", *objects], text=True).split("\n")
           if re.search(r" O \.(bss|data)\s", line) and "device_stub" not in line} # nvcc's own
ok("variables: %s" % (written - shared - programs), written <= shared | programs and shared <= written)
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
