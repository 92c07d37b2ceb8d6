"""test_page.py ADDRESS FOLDER: the page of ./serve as one uses it, in headless Chromium. FOLDER/work has ./sample, ./inpaint
and models/. Positions of pointers are checked from the outside: a marked pixel is looked for on the canvas, and clicked."""
import base64
import random
import struct
import subprocess
import sys
import time
import zlib

from browser import Browser

passed = failed = 0


def ok(what, good, found=""):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print("FAIL %s: %s" % (what, found))


# ---- PNG files of 8 bits ----


def profile(name):
    """An ICC profile of that name with the primaries of Display P3 and sRGB's curve"""
    def number(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    parts = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(4 - len(name) % 4))]
    for tag, xyz in ((b"rXYZ", (0.5151, 0.2412, -0.0011)), (b"gXYZ", (0.2920, 0.6922, 0.0419)), (b"bXYZ", (0.1571, 0.0666, 0.7841))):
        parts.append((tag, b"XYZ \0\0\0\0" + number(*xyz)))
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        parts.append((tag, b"para\0\0\0\0\0\3\0\0" + number(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    table, data = struct.pack(">I", len(parts)), b""
    for tag, content in parts:
        table += tag + struct.pack(">II", 132 + 12 * len(parts) + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s12s4s28s12s48s", 128 + len(table + data), b"", 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"", b"acsp", b"",
                       number(0.9642, 1, 0.8249), b"")
    return head + table + data


def profile_in(png):
    at = png.find(b"iCCP")
    return None if at < 0 else zlib.decompress(png[png.index(b"\0", at) + 2:at + 4 + struct.unpack(">I", png[at - 4:at])[0]])


def write_png(path, width, height, pixels, channels, icc=None):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(pixels[y * width * channels:(y + 1) * width * channels]) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + (chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)) if icc else b"") + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def read_png(data):
    """(width, height, channels, bytes)"""
    at, packed = 8, b""
    while at < len(data):
        n, kind = struct.unpack(">I4s", data[at:at + 8])
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", data[at + 8:at + 18])
        if kind == b"IDAT":
            packed += data[at + 8:at + 8 + n]
        at += 12 + n
    assert depth == 8
    c = {0: 1, 2: 3, 6: 4}[colour]
    raw, row, out = zlib.decompress(packed), bytes(width * c), b""
    for y in range(height):
        kind, line = raw[y * (width * c + 1)], bytearray(raw[y * (width * c + 1) + 1:(y + 1) * (width * c + 1)])
        for i in range(len(line)):
            a, b, d = line[i - c] if i >= c else 0, row[i], row[i - c] if i >= c else 0
            p = abs(b - d), abs(a - d), abs(a + b - 2 * d)
            paeth = a if p[0] <= p[1] and p[0] <= p[2] else b if p[1] <= p[2] else d
            line[i] = (line[i] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        row = bytes(line)
        out += row
    return width, height, c, out


# ---- The page ----

address, folder = sys.argv[1:3]
work = folder + "/work"
page = Browser(folder + "/profile")


def blob(expression):
    """The bytes of a Blob of the page"""
    text = page.js("""const bytes = new Uint8Array(await (await %s).arrayBuffer()); let text = "";
        for (const b of bytes) text += String.fromCharCode(b); return btoa(text);""" % expression)
    return base64.b64decode(text)


def set_field(selector, text):
    page.js("const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'));"
            " e.dispatchEvent(new Event('change'));", selector, text)


def command_gives(command, result, expected):
    """The command line that the page shows, run where it says, writes the same bytes."""
    done = subprocess.run(command, shell=True, cwd=work, capture_output=True, check=False)
    with open(work + "/" + result, "rb") as f:
        ok("the same bytes: " + command, f.read() == expected, done.stderr[-200:])


def on_canvas(x, y):
    """Where the picture's point x, y lies on the screen"""
    return page.js("""const r = canvas.getBoundingClientRect(), s = view.scale * r.width / canvas.width;
        return [r.left + (arguments[0] - view.x) * s, r.top + (arguments[1] - view.y) * s];""", x, y)


def painted():
    return page.value("edit.mask.reduce((a, b) => a + b, 0)")


def stroke(kind, *points):
    places = [tuple(on_canvas(*p)) for p in points]
    page.pointer((kind, [places[0], "down"] + places[1:] + ["up"]))


def test_sample():
    set_field("#sample-count", "2")
    page.click("#sample-class")
    page.type("#sample-class", "foo\ue007")
    ok("a class is found by a part of its name", page.value("$('sample-class').value") == "food", page.value("$('sample-class').value"))
    set_field("#sample-seed", "7")
    page.js("document.querySelector('#sample details').open = true")
    set_field("#sample-best_of", "1")
    set_field("#sample-temperature", "constant")
    page.js("const e = document.querySelector('#sample .numbers [inputmode=decimal]'); e.value = '0,8'; e.oninput();")
    shown = page.value("$('sample-command').firstChild.textContent")
    ok("the command line", shown == "./sample emoji -n 2 --seed 7 --class food --temperature 0.8 --best-of 1", shown)
    page.js("""window.seen = []; window.states = [];
        const look = () => { const r = runs[0]; if (r) seen.push(r.fraction), states.push([r.state, Object.keys((r.pictures[0] || { previews: {} }).previews).length]);
            if (!r || !isOver(r)) setTimeout(look, 10); }; look();""")
    page.click("#sample-run")
    ok("pictures", page.wait("runs[0] && runs[0].state === 'done'"), page.value("$('says').textContent"))
    ok("previews before the end", page.value("states.some(([s, n]) => s === 'running' && n)"))
    ok("progress goes forward", page.value("seen.every((x, i) => !i || x >= seen[i - 1]) && seen.at(-1) <= 1"))
    ok("a grid of two", page.value("document.querySelectorAll('#sample-results figure img').length") == 2)
    ok("a preview of every scale", page.value("Object.keys(runs[0].pictures[1].previews).length") == 3)
    set_field("#sample-count", "1")
    page.click("#sample-run")
    page.wait("runs[0].job.count === 1 && runs[0].state === 'done'")
    command_gives(page.value("runs[0].line.firstChild.textContent"), "samples.png", blob("runs[0].pictures[0].blob"))
    ok("picture 0 of two is the one of one", page.js("""const of = async (r) => new Uint8ClampedArray(await createImageBitmap(r.pictures[0].blob).then((b) => {
        const c = document.createElement('canvas').getContext('2d'); c.drawImage(b, 0, 0); return c.getImageData(0, 0, 64, 64).data; }));
        return String(await of(runs[0])) === String(await of(runs[1]));"""))


def test_wrong_fields():
    set_field("#sample-seed", "1.5")
    before = page.value("runs.length")
    page.click("#sample-run")
    ok("a wrong seed is marked", page.value("$('sample-seed').getAttribute('aria-invalid') === 'true' && document.activeElement === $('sample-seed')"))
    set_field("#sample-seed", "7")
    set_field("#sample-class", "nonsense")
    page.click("#sample-run")
    ok("what the server refuses is marked", page.wait("$('sample-class').getAttribute('aria-invalid') === 'true'"))
    said = page.value("document.body.innerText").split("nonsense")
    ok("and said once", len(said) == 2 + ("nonsense" in page.value("$('sample-command').innerText")), said)
    ok("no card is left of it", page.value("runs.length") == before)
    page.js("for (const r of runs.slice(0, arguments[0])) removeRun(r)", page.value("runs.length") - before)
    set_field("#sample-class", "food")


def test_cancel():
    set_field("#sample-count", "16")
    set_field("#sample-best_of", "4")
    page.click("#sample-run")
    page.wait("runs[0].state === 'running' && runs[0].scaleFraction[3] > 0")
    said = page.js("runs[0].cancel.click(); return runs[0].text.textContent")
    ok("cancel answers at once", said == "Cancelling …", said)
    ok("cancelled", page.wait("runs[0].state === 'cancelled'", 5), page.value("runs[0].state"))
    ok("the server is free", page.js("return (await call('api/health')).running") == 0)


def test_viewer():
    page.js("runs[1].pictures[0].open.click()")
    ok("enlarged", page.value("$('viewer').open && $('viewer-picture').naturalWidth === 64"))
    page.click("#viewer-play")
    ok("from noise to the picture", page.wait("$('viewer-picture').src.includes('scale=2')"))
    ok("to be saved", page.value("$('viewer-save').download").startswith("imagebart-emoji-7-0"))
    page.keys("\ue00c")
    page.wait("!$('viewer').open")
    page.js("await readSettings(new File([runs[2].pictures[1].blob], 'x.png'))")
    ok("a picture's settings", page.value("jobOf(sampleForm).seed === 7 && jobOf(sampleForm).temperature === 0.8"), page.value("$('says').textContent"))


def open_file(path):
    name = path.split("/")[-1]
    page.js("edit.about = ''")
    page.type("#edit-open", path)
    ok("opened", page.wait("edit.about.startsWith('%s') && !isDrawing" % name), page.value("$('says').textContent"))


def test_edit():
    W, H = 100, 80
    colours = random.Random(1)
    pixels = [v for _ in range(W * H) for v in (*colours.choices(range(256), k=3), colours.choice((255, 255, 128, 7)))]
    write_png(work + "/image.png", W, H, pixels, 4, profile(b"Display P3"))
    page.click("#tab-edit")
    open_file(work + "/image.png")
    set_field("#brush-size", "10")
    stroke("mouse", (40, 40), (60, 40))
    area = painted()
    ok("a stroke of 20 by 10", 250 < area < 310, area)
    ok("tokens are tinted", page.value("edit.cells.reduce((a, b) => a + b, 0)") > 0)
    stroke("mouse", (50, 60), (50, 60))
    two = painted()
    page.keys("\ue009", "z")
    ok("undo", painted() == area, (painted(), area))
    page.keys("\ue009", "y")
    ok("redo", painted() == two)
    page.click("#invert")
    ok("invert", painted() == W * H - two)
    page.click("#undo")
    page.click("#undo")
    stroke("mouse", (20, 20), (21, 20))
    ok("a stroke cuts what was undone", page.value("$('redo').disabled && edit.changes.length === 2"))
    page.click("#tool-eraser")
    stroke("mouse", (20, 20), (21, 20))
    ok("the eraser", painted() == area, (painted(), area))
    page.click("#tool-brush")
    stroke("mouse", (90, 20), (90, -5), (60, -5), (60, 20))
    ok("out of the canvas and back", page.value("edit.mask[20 * 100 + 60] === 1 && edit.stroke === null && edit.changes.length === 4"))
    page.click("#undo")
    page.js("document.querySelector('#edit details').open = true; $('inpaint-best_of').closest('details').open = true")
    for field, value in (("count", "1"), ("seed", "3"), ("best_of", "2"), ("class", "food")):
        set_field("#inpaint-" + field, value)
    page.click("#edit-run")
    ok("edited", page.wait("edit.after !== null"), page.value("$('says').textContent"))
    ok("what is said of it", page.js("const s = await call(`api/jobs/${edit.run.id}`); return (s.note === null) === ($('edit-remark').textContent === '') && $('edit-remark').textContent.slice(1, -1) === (s.note || '').slice(1)"), page.value("$('edit-remark').textContent"))
    ok("one order", page.value("[...$('edit-candidates').querySelectorAll('img')].map((i) => i.src).join() === [...edit.run.grid.querySelectorAll('img')].map((i) => i.src).join()"))
    result, mask = blob("edit.run.pictures[0].blob"), page.value("Array.from(edit.mask)")
    w, h, c, got = read_png(result)
    ok("its own size", (w, h, c) == (W, H, 4), (w, h, c))
    ok("its own colours", profile_in(result) == profile(b"Display P3"))
    place = next(i for i in range(W * H) if pixels[4 * i + 3] == 255 and not mask[i] and max(pixels[4 * i:4 * i + 3]) - min(pixels[4 * i:4 * i + 3]) > 90)
    seen = page.js("""const seen = async (blob) => { const b = await createImageBitmap(blob), c = document.createElement('canvas').getContext('2d');
            c.drawImage(b, -(arguments[0] % b.width), -Math.floor(arguments[0] / b.width)); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); };
        return [await seen(edit.file), await seen(edit.run.pictures[0].blob)];""", place)
    ok("and they look so in a browser", seen[0] == seen[1] and seen[0] != list(pixels[4 * place:4 * place + 3]), (seen, pixels[4 * place:4 * place + 3]))
    changed = [i for i in range(W * H) if got[4 * i:4 * i + 4] != bytes(pixels[4 * i:4 * i + 4])]
    ok("what the mask keeps is the same to the bit", not [i for i in changed if not mask[i]], len(changed))
    ok("what it does not is not", len(changed) > area * 0.7, len(changed))
    with open(work + "/mask.png", "wb") as f:
        f.write(blob("maskFile()"))
    command_gives(page.value("edit.run.line.firstChild.textContent"), "out.png", result)
    page.js("canvas.focus()")
    page.keys("b")
    ok("before, by a key", page.value("$('split').value === '0' && $('before').getAttribute('aria-pressed') === 'true'"))
    page.keys("b")
    page.click("#next-input")
    ok("the result is the next picture, the mask stays", page.wait("edit.after === null && edit.file.name.startsWith('imagebart')") and painted() == area)
    page.js("const m = await maskFile(); clearMask(); await loadMask(m)")
    ok("a mask saved and loaded", painted() == area, painted())
    open_file(work + "/image.png")
    ok("another picture, another mask", painted() == 0 and "gone" in page.value("$('says').textContent"))


def test_orientation():
    """A photograph that lies on its side comes back upright, and the mask fits it."""
    page.js("""const c = document.createElement('canvas'); c.width = 120; c.height = 80; c.getContext('2d').fillRect(0, 0, 60, 80);
        const jpeg = new Uint8Array(await (await new Promise((r) => c.toBlob(r, 'image/jpeg'))).arrayBuffer());
        const exif = [255, 225, 0, 34, 69, 120, 105, 102, 0, 0, 77, 77, 0, 42, 0, 0, 0, 8, 0, 1, 1, 18, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0];
        await openPicture(new File([jpeg.slice(0, 2), new Uint8Array(exif), jpeg.slice(2)], 'photo.jpg'));""")
    ok("upright", page.value("[edit.W, edit.H]") == [80, 120], page.value("[edit.W, edit.H]"))
    stroke("mouse", (40, 60), (50, 60))
    set_field("#inpaint-best_of", "1")
    page.click("#edit-run")
    ok("it comes back upright", page.wait("edit.after !== null") and page.value("[edit.after.width, edit.after.height]") == [80, 120],
       page.value("$('edit-state').textContent"))
    page.click("#clear")


def test_shapes():
    open_file(work + "/image.png")
    set_field("#shape", "half:upper")
    ok("upper half", painted() == 80 * 40, painted())
    ok("its command", "--half upper" in page.value("$('edit-command').firstChild.textContent"))
    set_field("#shape", "outside")
    set_field("#shape-size", "32")
    ok("all but a window", painted() == 80 * 80 - 40 * 40, painted())
    ok("tokens outside of it", page.value("edit.cells.reduce((a, b) => a + b, 0)") == 48)
    stroke("mouse", (50, 40), (50, 40))
    ok("painted on, it is a mask", "--mask" in page.value("$('edit-command').firstChild.textContent"))
    page.click("#clear")


def test_extend():
    """A picture that goes on around its edges: seen in the middle of the square that the model draws"""
    open_file(work + "/image.png")
    set_field("#shape", "extend")
    ok("nothing is painted, all around is drawn", painted() == 0 and page.value("edit.cells.reduce((a, b) => a + b, 0)") == 28 and page.value("edit.problem") == "",
       page.value("[...edit.cells]"))
    ok("it is not pasted", page.value("$('paste').disabled") and "--extend 48" in page.value("$('edit-command').firstChild.textContent")
       and "--paste-into" not in page.value("$('edit-command').firstChild.textContent"), page.value("$('edit-command').firstChild.textContent"))
    corner, side = page.value("[edit.square.x, edit.square.y]"), page.value("edit.square.side")
    ok("the square is around the picture's", abs(side - 80 * 64 / 48) < 1e-6 and abs(corner[0] - (50 - side / 2)) < 1e-6 and abs(corner[1] - (40 - side / 2)) < 1e-6, (corner, side))
    left, top = on_canvas(*corner)
    ok("all of it is seen", page.js("const r = canvas.getBoundingClientRect(); return arguments[0] >= r.left - 1 && arguments[1] >= r.top - 1", left, top), (left, top))
    set_field("#inpaint-best_of", "1")
    page.click("#edit-run")
    ok("extended", page.wait("edit.after !== null") and page.value("[edit.after.width, edit.after.height]") == [64, 64], page.value("$('says').textContent"))
    command_gives(page.value("edit.run.line.firstChild.textContent"), "inpainted.png", blob("edit.run.pictures[0].blob"))
    page.js("window.result = edit.run.pictures[0].blob; clearMask()")
    ok("cleared", page.value("edit.shape === null && !$('paste').disabled"))
    page.js("await readSettings(new File([result], 'x.png'))")
    ok("its settings say it", page.value("edit.shape && edit.shape.extend === 48 && $('shape').value === 'extend'"), page.value("[edit.shape, $('says').textContent]"))
    page.click("#clear")


def test_keyboard():
    page.js("clearMask(); canvas.focus(); edit.cursor = null")
    set_field("#brush-size", "3")
    page.js("canvas.focus()")
    page.keys("\ue014")
    page.keys("\ue007")
    ok("painted by keys", painted() == 4, painted())
    page.keys("\ue017")
    ok("erased by keys", painted() == 0, painted())
    page.keys("]")
    ok("a larger brush", page.value("edit.size") == 4, page.value("edit.size"))


MARK = (5, 3)


def click_mark(what):
    """The green pixel, found on the canvas, is the one that a click paints."""
    page.js("clearMask(); setSize(1)")
    place = page.js("""await new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));
        const d = pen.getImageData(0, 0, canvas.width, canvas.height).data; let n = 0, x = 0, y = 0;
        for (let i = 0; i < d.length; i += 4) if (d[i + 1] > 200 && d[i] < 60) n++, x += (i / 4) % canvas.width + 0.5, y += Math.floor(i / 4 / canvas.width) + 0.5;
        const r = canvas.getBoundingClientRect();
        return n ? [r.left + x / n * r.width / canvas.width, r.top + y / n * r.height / canvas.height] : null;""")
    if not place:
        return ok(what, False, "the pixel is not seen")
    page.pointer(("mouse", [tuple(place), "down", "up"]))
    got = page.value("[edit.mask.indexOf(1) % 60, Math.floor(edit.mask.indexOf(1) / 60), edit.mask.reduce((a, b) => a + b, 0)]")
    ok(what, got == [*MARK, 1], got)


def test_pointer():
    pixels = bytearray(3 * 60 * 40)
    pixels[3 * (MARK[1] * 60 + MARK[0]) + 1] = 255
    write_png(work + "/mark.png", 60, 40, pixels, 3)
    open_file(work + "/mark.png")
    page.js("$('grid').checked = false")
    for ratio in (1, 1.5, 2, 3):
        page.screen(1000, 700, ratio)
        page.js("await new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));")
        click_mark("pixel ratio %s" % ratio)
        page.js("zoomAbout({ x: 5.5, y: 3.5 }, 3)")
        click_mark("zoomed, pixel ratio %s" % ratio)
        page.js("setView(view.x - 1.3, view.y + 0.7, view.scale)")
        click_mark("panned, pixel ratio %s" % ratio)
        page.js("fit()")
    for zoom in (0.67, 1.5, 1):
        page.js("document.documentElement.style.zoom = arguments[0]", zoom)
        click_mark("page zoom %s" % zoom)
    page.js("scrollTo(0, 90)")
    click_mark("scrolled")
    page.screen(700, 600)
    click_mark("resized")
    page.click("#tab-sample")
    page.screen(1100, 800)
    page.click("#tab-edit")
    click_mark("after the tab was hidden")
    page.js("scrollTo(0, 0); clearMask(); fit()")


def test_fingers():
    page.js("clearMask(); setSize(4)")
    stroke("touch", (20, 20), (30, 20))
    ok("a finger paints", painted() > 40, painted())
    page.click("#undo")
    scale = page.value("view.scale")
    a, b, c, d = (tuple(on_canvas(x, 20)) for x in (25, 35, 20, 40))
    page.pointer(("touch", [a, "down", 50, c, "up"]), ("touch", [b, 30, "down", d, "up"]))
    ok("two fingers zoom", page.value("view.scale") > 1.5 * scale, (scale, page.value("view.scale")))
    ok("and leave no dab", painted() == 0, painted())
    page.js("fit()")
    stroke("pen", (20, 20), (30, 20))
    pen_painted = painted()
    stroke("touch", (40, 30), (45, 30))
    ok("a pen paints, a palm beside it does not", pen_painted > 40 and painted() == pen_painted, (pen_painted, painted()))
    page.js("clearMask()")


def pixel(selector, x, y):
    """The colour of a canvas there, counted in its own size"""
    return page.js("""const c = document.querySelector(arguments[0]);
        return [...c.getContext("2d").getImageData(Math.floor(arguments[1] * c.width), Math.floor(arguments[2] * c.height), 1, 1).data].slice(0, 3);""", selector, x, y)


def click_cell(selector, row, column, n=8):
    page.js("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
    left, top, side = page.js("const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.left, r.top, r.width]", selector)
    page.pointer(("mouse", [(left + (column + 0.5) * side / n, top + (row + 0.5) * side / n), "down", "up"]))


def test_learn():
    """The chain step by step; what is shown of a token is what the server says of it"""
    page.click("#tab-learn")
    page.click("#learn-draw")
    ok("a picture to learn from", page.wait("learn.details && learn.picture.run === runs[0] && !$('learn-body').hidden"), page.value("$('learn-draw-state').textContent"))
    page.js("learn.picture = learn.details = null; removeRun(runs[0])")
    page.click("#tab-sample")
    page.js("learnFrom(runs.filter((r) => r.kind === 'sample' && r.state === 'done')[0].pictures[0])")
    ok("the start and three steps", page.wait("learn.details && document.querySelectorAll('#learn-steps li').length === 4"))
    ok("it opens on the noisiest", page.value("learn.at") == 0 and "pure noise" in page.value("$('before-title').textContent"))
    start = page.js("""const c = document.querySelector('#learn-steps canvas'), d = c.getContext('2d').getImageData(0, 0, 8, 8).data, t = learn.steps[0].told.before;
        const of = (i) => String(d.slice(4 * i, 4 * i + 4)); return t.every((x, i) => t.every((y, j) => x !== y || of(i) === of(j))) && new Set(t.map((x, i) => of(i))).size > 8;""")
    ok("the start's tokens have their colours", start)
    told = [page.js("return await call(`api/jobs/${learn.picture.run.id}/${learn.picture.k}.json?scale=${arguments[0]}`)", s) for s in (3, 2, 1)]
    captions = page.value("[...document.querySelectorAll('#learn-steps li + li figcaption')].map((f) => f.textContent)")
    for i, (step, caption) in enumerate(zip(told, captions)):
        ok("how many changed", "%d of 64 changed" % step["changed"] in caption, caption)
        ok("its beta", "%.4g" % step["beta"] in caption, (step["beta"], caption))
        page.click("#learn-steps li:nth-child(%d) button" % (i + 2))
        ok("the step is shown", page.value("learn.at") == i and "%d of 64 tokens changed" % step["changed"] in page.value("$('learn-step-text').textContent"))
        cell = 8 * 2 + 5
        click_cell("#chain-after" if i else "#chain-before", 2, 5)
        ok("a token by a click", page.value("learn.cell") == cell, page.value("learn.cell"))
        said = page.value("$('token-text').textContent")
        ok("its place and values", said.startswith("Row 3, column 6: from %d in" % step["before"][cell]) and "drew %d for" % step["tokens"][cell] in said, said)
        rows = page.value("[...$('posterior').rows].map((r) => [r.cells[0].textContent, r.cells[1].textContent, r.className])")
        clean = told[2]["tokens"][cell]
        expected = [step["at_xt"][cell], step["at_x0"][cell], step["elsewhere"][cell]]
        if step["before"][cell] == clean:
            expected.pop(0)
        shown = [float(r[1].split()[0]) / 100 for r in rows]
        ok("the posterior", len(shown) == len(expected) and all(abs(a - b) < 0.006 * max(b, 1e-9) for a, b in zip(shown, expected)), (rows, expected))
        ok("is a distribution", abs(sum(shown) - 1) < 0.01, shown)
        drawn = [r[0] for r in rows if r[2] == "drawn"]
        ok("what was drawn is marked", len(drawn) == 1 and (drawn[0].startswith("one of the other") or drawn[0].startswith(str(step["tokens"][cell]))), rows)
    for selector in ("#chain-before", "#chain-after", "#heat"):
        ring = pixel(selector, (5 + 0.5) / 8, 2 / 8 + 2 / page.value("document.querySelector('%s').clientWidth" % selector))
        ok("the token is marked in " + selector, ring == [255, 255, 255], ring)
    before = page.value("$('before-title').textContent")
    page.js("document.activeElement.blur(); scrollTo(0, 0)")
    page.keys("\ue00e")
    ok("page up: a step back", page.value("learn.at") == 1 and page.value("$('before-title').textContent") != before)
    page.keys("\ue012")
    ok("an arrow, too", page.value("learn.at === 0 && $('learn-back').disabled"))
    page.js("$('chain-before').focus()")
    page.keys("\ue014")
    ok("in a grid it chooses the next token", page.value("learn.at === 0 && learn.cell") == 22, page.value("[learn.at, learn.cell]"))
    for _ in range(5):
        page.keys("\ue014")
    ok("and stays in its row", page.value("learn.cell") == 23, page.value("learn.cell"))
    colour = pixel("#chain-before", 0.03, 0.03)
    page.click("#learn-forth")
    page.click("#learn-codes")
    page.click("#learn-back")
    ok("noise has colours alone", pixel("#chain-before", 0.03, 0.03) == colour and page.value("$('before-title').textContent").endswith("pure noise"), colour)
    same = page.js("const a = learn.steps[0].told.tokens[0], b = learn.steps[1].told.before[0]; return [a === b, tokenColour(a) === tokenColour(b)]")
    ok("a step begins where the last one ended", same == [True, True], same)
    page.click("#learn-play")
    ok("played to the end", page.wait("learn.at === 2 && !film && $('learn-play').textContent === 'Play'"), page.value("learn.at"))
    page.click("#learn-codes")
    click_cell("#heat", 0, 0)
    ok("the entropy of a token", page.value("$('heat-text').textContent").startswith("Row 1, column 1"), page.value("$('heat-text').textContent"))
    ok("the same token in all", page.value("$('token-text').textContent").startswith("Row 1, column 1"))
    page.click("#tab-sample")
    page.js("learnFrom(runs.filter((r) => r.kind === 'inpaint' && r.state === 'done')[0].pictures[0])")
    ok("an edit's chain", page.wait("learn.details && learn.steps.every((s) => s.told && (s.image || s.told.changed === 0))"))
    ok("a scale that was left out is said", page.js("""const passes = learn.picture.run.job.chain_length;
        return learn.steps.every((s, i) => (showStep(i), (passes[i] === 0) === $("learn-step-text").textContent.includes("is left out")));"""))


def test_reading():
    """Every control has a name; nothing is wider than a phone."""
    page.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    unnamed = page.js("""return [...document.querySelectorAll('button, input, select, canvas, progress, [role=option]')].filter((e) => !e.closest('[aria-hidden]') && e.ariaHidden !== 'true'
        && !(e.getAttribute('aria-label') || e.textContent.trim() || ($(e.getAttribute('aria-labelledby')) || {}).textContent || (e.labels && e.labels.length && [...e.labels].some((l) => l.textContent.trim())))).map((e) => e.outerHTML);""")
    ok("every control has a name", not unnamed, unnamed)
    page.screen(390, 844, 2, True)
    for tab in ("sample", "edit", "learn"):
        page.click("#tab-" + tab)
        ok("390 pixels wide: " + tab, page.value("document.documentElement.scrollWidth") <= 390, page.value("document.documentElement.scrollWidth"))
    page.click("#tab-sample")
    page.js("runs.find((r) => r.state === 'done').pictures[0].open.click()")
    ok("390 pixels wide: a picture enlarged", page.value("$('viewer').scrollWidth <= $('viewer').clientWidth"))
    page.click("#viewer-close")
    page.screen(1100, 800)


def test_receive():
    """Files that are dropped or pasted, and what is none of ours"""
    page.js("""window.give = (type, kind, file) => { const data = new DataTransfer();
            if (file) data.items.add(file); else data.setData('text/uri-list', 'https://page.example/a.png');
            document.body.dispatchEvent(kind === 'drop' ? new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })
                                                        : new ClipboardEvent('paste', { clipboardData: data, bubbles: true })); };
        window.png = async (w, h) => { const c = new OffscreenCanvas(w, h); c.getContext('2d').fillRect(0, 0, 9, 9);
            return new File([await c.convertToBlob()], w + '.png', { type: 'image/png' }); };
        give('', 'drop', await png(31, 17));""")
    ok("dropped", page.wait("edit.W === 31"), page.value("edit.W"))
    page.js("give('', 'paste', await png(32, 17))")
    ok("pasted", page.wait("edit.W === 32"), page.value("edit.W"))
    page.js("give('', 'drop', new File(['GIF89a...'], 'film.gif', { type: 'image/gif' }))")
    ok("another type is named", page.wait("$('says').textContent.includes('image/gif')"), page.value("$('says').textContent"))
    page.js("give('', 'drop', new File([(await png(9, 9)).slice(0, 40)], 'half.png'))")
    ok("a damaged one is said", page.wait("$('says').textContent.includes('damaged')"), page.value("$('says').textContent"))
    page.js("give('', 'drop', null)")
    ok("a link is no picture", page.wait("$('says').textContent.includes('not a file')"), page.value("$('says').textContent"))
    ok("the picture stays", page.value("edit.W") == 32)
    write_png(work + "/p3.png", 32, 17, bytes(3 * 32 * 17), 3, profile(b"Display P3"))
    open_file(work + "/p3.png")
    ok("its colours are said", "profile Display P3" in page.value("edit.about"), page.value("edit.about"))
    page.click("#edit-run")
    ok("nothing painted is said", page.value("$('edit-state').textContent") == "Paint what is to be drawn anew first.", page.value("$('edit-state').textContent"))
    page.js("setSize(4); beginStroke({ x: 1, y: 8 }); strokeTo({ x: 30, y: 8 }); endStroke(true)")
    ok("a part that fits no square is said", page.value("edit.problem").startswith("The painted part fits no square"), page.value("edit.problem"))
    page.click("#tab-sample")
    page.js("give('', 'drop', await png(8, 8))")
    ok("a picture without settings", page.wait("$('says').classList.contains('error') && $('says').textContent.includes('how it was drawn')"), page.value("$('says').textContent"))
    page.js("await readSettings(new File([new Uint8Array([255, 216, 255, 224])], 'photo.jpg'))")
    ok("a file that is no PNG is named", page.value("$('says').textContent").startswith("photo.jpg is no PNG"), page.value("$('says').textContent"))
    page.click("#tab-edit")
    ok("what is said stays in its tab", "photo.jpg" not in page.value("$('says').textContent"))


def test_waiting():
    """The second job waits, and is told so; both are cancelled by their own buttons."""
    page.click("#tab-sample")
    set_field("#sample-count", "16")
    page.click("#sample-run")
    page.click("#sample-run")
    ok("it waits", page.wait("runs[0].state === 'queued' && runs[0].text.textContent === 'Waiting: 1 job before it.'"), page.value("runs[0].text.textContent"))
    page.js("runs[0].cancel.click()")
    ok("cancelled alone", page.wait("runs[0].state === 'cancelled' && !isOver(runs[1])"), page.value("[runs[0].state, runs[1].state]"))
    page.js("runs[1].cancel.click()")
    ok("and the other", page.wait("isOver(runs[1])"))
    page.js("removeRun(runs[1]); removeRun(runs[0])")
    page.click("#tab-edit")


def test_wheel():
    page.js("fit(); setSize(8)")
    x, y = on_canvas(20, 10)
    page.js("scrollTo(0, 0)")
    page.wheel(x, y, -100)
    ok("the wheel changes the brush", page.value("edit.size") == 9, page.value("edit.size"))
    page.click("#tool-move")
    scale = page.value("view.scale")
    page.wheel(x, y, -200)
    got = on_canvas(20, 10)
    ok("with Move it zooms", page.value("view.scale") > scale * 1.2)
    ok("about the pointer", abs(got[0] - round(x)) + abs(got[1] - round(y)) < 4, (got, x, y))
    page.wheel(x, y, 2000)
    page.wheel(x, y, 2000)
    page.wheel(x, y, 2000)
    ok("not out of sight", page.value("view.scale") == page.value("fitScale()"))
    ok("the page stays", page.value("scrollY") == 0)
    page.click("#tool-brush")


def test_classes():
    """ImageNet's names: by number, synset, a word of any of them"""
    page.js("""window.list = ['n01443537 goldfish, Carassius auratus', 'n02012849 crane', 'n03126707 crane', 'n02099601 golden retriever', 'plain', '7'].map(classOf);
        window.found = (q) => findClasses(list, q).map((c) => c.value);""")
    for query, expected in (("golden", "n02099601"), ("N02099601", "n02099601"), ("carassius", "n01443537"), ("2", "n03126707"), ("plain", "plain")):
        ok("a class by " + query, page.js("return found(arguments[0])", query)[0] == expected, page.js("return found(arguments[0])", query))
    said = page.js("""const [m] = models, few = m.classes; m.classes = Array.from({ length: 1000 }, (_, i) => `n${String(i).padStart(8, 0)} thing ${i}`);
        editForm.classes.set(null); modelChanged(editForm); let said = ''; try { jobOf(editForm); } catch (e) { said = e.field + ': ' + e.message; }
        editForm.classes.set('n00000999'); said += jobOf(editForm).class; m.classes = few; editForm.classes.set(null); modelChanged(editForm); return said;""")
    ok("an edit must name one of a thousand", said == "class: Class: choose one: emoji has too many to try them alln00000999", said)
    ok("cranes are two", page.value("found('crane')") == ["n02012849", "n03126707"])


def test_reload():
    before = page.value("runs.filter((r) => r.id).length")
    set_field("#sample-count", "16")
    page.click("#tab-sample")
    page.click("#sample-run")
    before += page.wait("runs[0].state === 'running'") or 0
    page.js("window.isOld = true; location.reload()")
    page.wait("!window.isOld && models.length")
    ok("what ran goes on", page.wait("runs[0] && runs[0].job.count === 16 && runs[0].state === 'done'"))
    order = page.value("runs.map((r) => r.id)")
    ok("the newest first", page.value("[...document.querySelectorAll('#sample-results .card')].map((c) => runs.find((r) => r.card === c).id)") ==
       [i for i in order if page.js("return runs.find((r) => r.id === arguments[0]).kind === 'sample'", i)], order)
    ok("what was drawn is there after a reload", page.wait("runs.length === %d && runs.filter((r) => r.pictures.some((p) => p.url)).length >= 3" % before), (before, page.value("runs.length")))


began = time.time()
try:
    page.screen(1100, 800)
    page.open(address)
    ok("models", page.wait("models.length"))
    for test in (test_sample, test_wrong_fields, test_cancel, test_viewer, test_edit, test_orientation, test_shapes, test_extend, test_keyboard, test_pointer, test_fingers,
                 test_wheel, test_receive, test_waiting, test_classes, test_learn, test_reading, test_reload):
        at = time.time()
        try:
            test()
        except Exception as error:  # the others go on
            ok(test.__name__, False, repr(error))
        if "-v" in sys.argv:
            print("%s: %.1f s" % (test.__name__, time.time() - at))
    wrong = [e for e in page.errors() if not any(status in e for status in ("422", "404"))]  # a class that is none; pictures of a cancelled job
    ok("nothing is wrong on the console", not wrong, wrong)
finally:
    page.close()
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
