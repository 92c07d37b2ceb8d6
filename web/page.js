// page.js - the page of ./serve: Sample, Edit, Learn. The calls that it uses are doc/api.md's.
//
//     Helpers      elements, numbers, words for the screen reader
//     Server       calls, a job from the click to its pictures      start(): one job; follow(): its events
//     Settings     the form of a job, alike for Sample and Edit     settingsOf(), jobOf(), fillForm()
//     Results      a card for each job of this visit, and the viewer
//     Mask         pixels that are drawn anew; each change is a list of runs that were flipped
//     Canvas       pixelAt(): from an event to a pixel of the picture, the only place that knows
//     Edit, Learn  the two other tabs
//
// Nothing is loaded from elsewhere, and nothing is kept but the numbers of this visit's jobs (sessionStorage).
"use strict";

// ---- Helpers ----

const $ = (id) => document.getElementById(id);

// A new element: properties are set as they are, those with a dash or "role" as attributes.
function element(tag, properties = {}, ...children) {
    const e = document.createElement(tag);
    for (const [name, value] of Object.entries(properties))
        if (name.includes("-") || name === "role" || name === "for") e.setAttribute(name, value);
        else e[name] = value;
    e.append(...children.filter((c) => c !== null && c !== undefined));
    return e;
}

function button(text, act, properties = {}) {
    return element("button", { type: "button", textContent: text, onclick: act, ...properties });
}

const said = {}; // the last sentence of each tab: [text, isError]
let tabShown = "sample";

// A sentence for everybody, on its tab; a screen reader speaks it.
function say(text, isError = false, tab = tabShown) {
    said[tab] = [text, isError];
    if (tab === tabShown) showSaid();
}

function showSaid() {
    const [text, isError] = said[tabShown] || ["", false];
    $("says").textContent = text;
    $("says").classList.toggle("error", isError);
}

// "0,8" is 0.8, as half of the world writes it; NaN: no number.
function numberOf(text) {
    const t = text.trim().replace(",", ".");
    return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(t) ? Number(t) : NaN;
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const shown = (x, digits = 4) => String(Number(x.toPrecision(digits)));
const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

function bringIntoView(e, block) {
    const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
    e.scrollIntoView({ block, behavior });
}

async function copyText(text) {
    try {
        await navigator.clipboard.writeText(text);
        say("Copied.");
    } catch {
        say("The browser allows no copying here (it wants https or this machine); the text can be selected.", true);
    }
}

// A command line, and a button that copies it
function showCommand(place, command) {
    place.replaceChildren(
        element("code", { textContent: command, tabIndex: 0 }),
        button("Copy", () => copyText(command), { className: "quiet", "aria-label": "Copy the command line" }),
    );
}

// A word as the shell reads it back
const quoted = (word) => (/^[\w\-./,+=:@%]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// ---- Server ----

let models = []; // api/models
let most = 64; // pictures of a job
const runs = []; // the jobs of this visit, the newest first

// The answer's JSON; an Error with the server's sentence and the field that it names.
async function call(address, options = {}) {
    let answer;
    try {
        answer = await fetch(address, options);
    } catch {
        throw new Error("The server does not answer: is ./serve still running?");
    }
    const type = answer.headers.get("Content-Type") || "";
    const json = type.includes("json") ? await answer.json() : {};
    if (answer.ok) return json;
    if (answer.status === 401) json.error = "The server wants its token: load this page again.";
    const error = new Error(json.error || `The server says ${answer.status}.`);
    error.field = json.field;
    error.status = answer.status;
    throw error;
}

const modelOf = (name) => models.find((m) => m.name === name);
const tabOf = (run) => (run.kind === "inpaint" ? "edit" : "sample");
const isOver = (run) => !["sending", "queued", "running"].includes(run.state);

function remember() {
    const list = runs.filter((r) => r.id).map((r) => ({ id: r.id, kind: r.kind }));
    sessionStorage.setItem("runs", JSON.stringify(list.reverse()));
}

// A run: what the page knows of a job. files: {image, mask} of an edit.
function newRun(kind, job) {
    return { kind, job, state: "sending", id: null, pictures: [], fraction: 0, scaleFraction: {}, command: "", left: null, remark: "" };
}

function pictureOf(run, k) {
    while (run.pictures.length <= k) run.pictures.push({ run, k: run.pictures.length, previews: {}, url: null, blob: null });
    return run.pictures[k];
}

// Sends a job and follows it. Errors are said, and marked at the field of the form.
async function start(run, files, form) {
    runs.unshift(run);
    showCard(run);
    try {
        const options = { method: "POST" };
        if (files) {
            options.body = new FormData();
            options.body.append("job", JSON.stringify(run.job));
            for (const name of ["image", "mask"]) if (files[name]) options.body.append(name, files[name]);
        } else {
            options.headers = { "Content-Type": "application/json" };
            options.body = JSON.stringify(run.job);
        }
        const answer = await call("api/jobs", options);
        run.id = answer.id;
        run.state = "queued";
        if (run.wantsCancel) return cancelRun(run);
        remember();
        follow(run);
        const state = await call(`api/jobs/${run.id}`);
        run.command = run.command || state.command;
        run.job = state.job;
        updateCard(run);
    } catch (error) {
        if (run.id && isOver(run)) return;
        if (run.id) endRun(run, "failed", error.message);
        else refuse(run, form, error);
    }
}

// A job that the server does not take: the form says why, and no card is left.
function refuse(run, form, error) {
    run.state = "failed";
    run.error = error.message;
    updateCard(run);
    removeRun(run);
    markField(form, error.field, error.message);
    bringIntoView(form.problem, "nearest");
}

// Listens to a run's events until its end. The browser comes back by itself after a break, with Last-Event-ID.
function follow(run) {
    const events = new EventSource(`api/jobs/${run.id}/events`);
    const on = (name, act) => events.addEventListener(name, (e) => act(JSON.parse(e.data)));
    run.events = events;
    on("queued", (e) => {
        run.place = e.place;
        updateCard(run);
    });
    on("progress", (e) => noteProgress(run, e));
    on("preview", (e) => {
        pictureOf(run, e.k).previews[e.scale] = e.picture;
        updatePicture(run, e.k);
    });
    on("done", (state) => finish(run, state));
    on("failed", (e) => endRun(run, "failed", e.error));
    on("cancelled", () => keepFinished(run));
    events.onerror = () => {
        if (isOver(run)) return;
        if (events.readyState === EventSource.CLOSED) recover(run);
        else run.note = "the connection was lost; trying again", updateCard(run);
    };
}

// What became of a run whose events ended or were never heard
async function recover(run) {
    try {
        const state = await call(`api/jobs/${run.id}`);
        run.job = state.job;
        run.command = state.command;
        run.state = state.state;
        if (state.state === "running") run.began = performance.now() - 1000 * state.took;
        for (let k = 0; k < run.job.count; k++) updatePicture(run, k);
        updateCard(run);
        if (state.state === "done") await finish(run, state);
        else if (state.state === "failed") endRun(run, "failed", state.error);
        else if (state.state === "cancelled") await keepFinished(run);
        else follow(run);
    } catch (error) {
        const gone = {
            410: "The server has forgotten this job to make room.",
            404: "The server does not know this job any more: it was started anew.",
        };
        endRun(run, "failed", gone[error.status] || error.message);
    }
}

// How far it is, in all: by the time it will take, never backwards.
function noteProgress(run, e) {
    run.began ??= performance.now();
    run.state = "running";
    run.note = "";
    if (run.scale !== e.scale) say(`Scale ${e.scale} of ${e.scales}.`, false, tabOf(run));
    run.scale = e.scale;
    run.scales = e.scales;
    run.left = e.left;
    for (let s = e.scales; s > e.scale; s--) run.scaleFraction[s] = Math.max(run.scaleFraction[s] || 0, 0);
    run.scaleFraction[e.scale] = Math.max(run.scaleFraction[e.scale] || 0, e.token / e.tokens);
    const spent = (performance.now() - run.began) / 1000;
    if (e.left !== null) run.fraction = Math.max(run.fraction, spent / (spent + e.left + 1e-3));
    updateCard(run);
}

async function finish(run, state) {
    if (run.events) run.events.close();
    run.command = state.command;
    run.job = state.job;
    run.took = state.took;
    run.remark = state.note ? `${state.note[0].toUpperCase()}${state.note.slice(1)}.` : "";
    state.job.chain_length.forEach((passes, i, all) => {
        for (let k = 0; passes && state.job.previews && k < state.results.length; k++)
            pictureOf(run, k).previews[all.length - i] = `api/jobs/${run.id}/${k}.png?scale=${all.length - i}`;
    });
    await Promise.all(state.results.map((result, k) => takePicture(run, k, result.picture, result)));
    endRun(run, "done");
    say(`${plural(state.results.length, "picture", "pictures")} in ${shown(state.took, 2)} s.`, false, tabOf(run));
    if (run.kind === "inpaint") showEdited(run);
    if (run.isToLearn && tabShown === "learn" && !learn.picture) learnFrom(run.pictures[0]);
}

// The picture itself, so that it stays when the server forgets it
async function takePicture(run, k, address, result) {
    const picture = pictureOf(run, k);
    const answer = await fetch(address).catch(() => null);
    if (!answer || !answer.ok) return false;
    picture.blob = await answer.blob();
    picture.url = URL.createObjectURL(picture.blob);
    picture.result = result;
    return true;
}

// Cancelled: pictures that were finished stay.
async function keepFinished(run) {
    if (run.events) run.events.close();
    const count = (run.job && run.job.count) || 1;
    for (let k = 0; k < count; k++)
        if (!(await takePicture(run, k, `api/jobs/${run.id}/${k}.png`, null))) break;
    endRun(run, "cancelled");
    say(stateText(run), false, tabOf(run));
}

function endRun(run, state, error = "") {
    if (run.events) run.events.close();
    run.state = state;
    run.error = error;
    if (error) say(error, true, tabOf(run));
    updateCard(run);
    run.pictures.forEach((p) => updatePicture(run, p.k));
    if (run.kind === "inpaint" && edit.run === run && state !== "done") showPreview(null);
}

// The button answers at once; the server within a block of tokens.
function cancelRun(run) {
    run.wantsCancel = true;
    updateCard(run);
    if (run.id) call(`api/jobs/${run.id}`, { method: "DELETE" }).catch(() => {});
    if (run.id && !run.events) follow(run);
}

// ---- Settings: fields of a job ----

// A number for every scale. whole: as on the command line.
const SCALE_FIELDS = [
    { name: "temperature", option: "--temperature", label: "Temperature", most: 1000,
      slider: { min: 0, max: 2, step: 0.05 },
      hint: "Lower: safer and more alike. 1: as the model has learnt." },
    { name: "top_k", option: "--top-k", label: "Top-k", most: 1e9, whole: true,
      slider: { min: 0, max: 200, step: 1 },
      hint: "Draws among so many of the likeliest tokens; 0: among all." },
    { name: "guidance", option: "--guidance", label: "Guidance", most: 1000,
      slider: { min: 0, max: 8, step: 0.1 },
      hint: "More of the class than 1; takes almost twice the time." },
    { name: "chain_length", option: "--chain-length", label: "Chain length", most: 1000, whole: true, linear: true,
      slider: { min: 1, max: 16, step: 1 },
      hint: "Passes of each scale, with some noise in between: parts settle on each other." },
];

// A class of the list: {value for the server, title, text to search in}
function classOf(name, number) {
    const [, synset, names] = /^(n\d{8})\s+(.*)$/.exec(name) || [null, null, name];
    const value = synset || (name.includes(",") ? String(number) : name);
    return { value, title: names, text: `${number} ${synset || ""} ${names}`.toLowerCase(), number: String(number), synset };
}

// Those in which all words occur; number or beginning first
function findClasses(classes, query) {
    const q = query.trim().toLowerCase(), words = q.split(/\s+/);
    const rank = (c) => (c.number === q || c.synset === q ? 0 : c.title.toLowerCase().startsWith(q) ? 1 : 2);
    const found = classes.filter((c) => words.every((w) => c.text.includes(w)));
    return found.sort((a, b) => rank(a) - rank(b) || a.number - b.number);
}

// The field of a class: a text in which one searches, and a list from which one chooses
function classField(id, changed) {
    const input = element("input", {
        id, type: "text", autocomplete: "off", spellcheck: false, role: "combobox", "aria-expanded": "false",
        "aria-autocomplete": "list", "aria-controls": `${id}-list`, "aria-describedby": `${id}-hint`,
    });
    const list = element("ul", { id: `${id}-list`, role: "listbox", className: "choices", "aria-label": "Classes" });
    const field = { id, input, list, changed, classes: [], found: [], chosen: null, at: -1 };
    list.hidden = true;
    input.onfocus = input.onclick = () => openChoices(field);
    input.onblur = () => {
        if (!field.chosen && input.value.trim() && field.found.length === 1) chooseClass(field, field.found[0]);
        closeChoices(field);
    };
    input.oninput = () => {
        field.chosen = null;
        openChoices(field);
        changed();
    };
    input.onkeydown = (e) => {
        const isOpen = !list.hidden;
        if (e.key === "ArrowDown") moveChoice(field, 1);
        else if (e.key === "ArrowUp") moveChoice(field, -1);
        else if (e.key === "Escape" && isOpen) closeChoices(field);
        else if (e.key === "Enter" && isOpen && (input.value.trim() || field.at >= 0)) chooseClass(field, field.found[Math.max(0, field.at)]);
        else return;
        e.preventDefault();
    };
    // null: none is wanted. What was typed but not chosen goes to the server, which knows more names.
    field.value = () => (field.chosen ? field.chosen.value : input.value.trim() || null);
    field.set = (value) => {
        field.chosen = field.classes.find((c) => c.value === value || c.number === value || c.title === value) || null;
        input.value = field.chosen ? field.chosen.title : value || "";
    };
    return field;
}

// Those that what is typed finds; of a class that was chosen all, to choose another
function openChoices(field) {
    const { id, list, input } = field;
    field.found = findClasses(field.classes, field.chosen ? "" : input.value).slice(0, 200);
    field.at = -1;
    list.replaceChildren(...field.found.map((c, i) => element("li", {
        id: `${id}-${i}`, role: "option", "aria-selected": "false",
        textContent: c.synset ? `${c.title} (${c.number}, ${c.synset})` : c.title,
        onpointerdown: (e) => e.preventDefault(), onclick: () => chooseClass(field, c),
    })));
    list.hidden = !field.found.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    input.removeAttribute("aria-activedescendant");
}

function closeChoices(field) {
    field.list.hidden = true;
    field.at = -1;
    field.input.setAttribute("aria-expanded", "false");
    field.input.removeAttribute("aria-activedescendant");
}

function chooseClass(field, c) {
    field.chosen = c;
    field.input.value = c.title;
    closeChoices(field);
    field.changed();
}

function moveChoice(field, by) {
    if (field.list.hidden) openChoices(field);
    const items = field.list.children, n = items.length;
    if (!n) return;
    if (field.at >= 0) items[field.at].setAttribute("aria-selected", "false");
    field.at = field.at < 0 ? (by > 0 ? 0 : n - 1) : (field.at + by + n) % n;
    items[field.at].setAttribute("aria-selected", "true");
    items[field.at].scrollIntoView({ block: "nearest" });
    field.input.setAttribute("aria-activedescendant", items[field.at].id);
}

// One row of SCALE_FIELDS: recommended, the same at all scales, linear, or each by itself
function scaleField(id, spec, changed) {
    const option = (value, textContent) => element("option", { value, textContent });
    const mode = element("select", { id, "aria-describedby": `${id}-hint` },
        option("", "recommended"), option("constant", "constant"),
        spec.linear ? option("linear", "linear") : null, option("scales", "per scale"));
    const place = element("span", { className: "numbers" });
    const field = { spec, changed, mode, place, recommended: [], allowed: [], inputs: [] };
    mode.onchange = () => (showScales(field, field.recommended), changed());
    // Another model: what was typed stays if it still fits.
    field.reset = (recommended, allowed) => {
        const fits = mode.value !== "" && (mode.value !== "scales" || field.inputs.length === recommended.length);
        Object.assign(field, { recommended, allowed });
        if (!fits || !field.inputs.length) showScales(field, recommended);
    };
    // A number, a list, or undefined: as the model recommends
    field.value = () => {
        const x = field.inputs.map((input) => numberOf(input.value)), T = field.recommended.length;
        if (mode.value === "") return undefined;
        if (mode.value === "constant") return x[0];
        if (mode.value === "scales") return x;
        return Array.from({ length: T }, (_, i) => Math.round(x[0] + ((x[1] - x[0]) * i) / Math.max(1, T - 1)));
    };
    field.set = (values) => {
        const same = values.length === field.recommended.length && values.every((v, i) => v === field.recommended[i]);
        mode.value = same ? "" : values.every((v) => v === values[0]) ? "constant" : "scales";
        showScales(field, values);
    };
    return field;
}

// The inputs of a row for the way that is chosen in it
function showScales(field, values) {
    const { spec, mode, place, changed, allowed } = field, T = values.length;
    const input = (label, value, disabled = false) => element("input", {
        type: "text", inputMode: "decimal", size: 5, value: shown(value, 17), disabled,
        "aria-label": `${spec.label}, ${label}`, oninput: changed,
    });
    field.inputs = [];
    place.replaceChildren();
    if (mode.value === "") place.textContent = values.every((v) => v === values[0]) ? String(values[0]) : values.join(", ");
    else if (mode.value === "constant") {
        const number = input("all scales", values[0]);
        const slider = element("input", { type: "range", ...spec.slider, value: values[0], "aria-label": `${spec.label}, all scales` });
        slider.oninput = () => ((number.value = slider.value), changed());
        number.oninput = () => ((slider.value = numberOf(number.value) || 0), changed());
        field.inputs = [number];
        place.append(slider, number);
    } else if (mode.value === "linear") {
        field.inputs = [input("the noisiest scale", Math.max(1, values[0])), input("the last scale", values[T - 1])];
        place.append("from ", field.inputs[0], " to ", field.inputs[1]);
    } else {
        const name = (i) => `scale ${T - i}${i === 0 ? ", the noisiest" : ""}`;
        field.inputs = values.map((v, i) => input(name(i), v, spec.name === "guidance" && !allowed[i]));
        place.append(...field.inputs.map((one, i) => element("label", { className: "scale" }, one, `scale ${T - i}`)));
    }
}

// A field with its label above and what it does beneath
function labelled(id, label, input, hint) {
    return element("div", { className: "field" }, element("label", { for: id, textContent: label }), input,
        element("p", { id: `${id}-hint`, className: "hint", textContent: hint }));
}

// The form of a kind of job. changed() is called whenever a field has another value.
function settingsOf(kind, root, changed) {
    const isEdit = kind === "inpaint", id = (name) => `${kind}-${name}`;
    const text = (name, value, size = 6) => element("input", {
        id: id(name), type: "text", inputMode: "numeric", value, size, autocomplete: "off",
        "aria-describedby": `${id(name)}-hint`, oninput: changed,
    });
    const numbers = (...inputs) => element("span", { className: "numbers" }, ...inputs);
    const form = {
        kind, isEdit, root, changed,
        model: element("select", { id: id("model"), "aria-describedby": `${id("model")}-hint` }),
        classes: classField(id("class"), changed),
        count: text("count", isEdit ? "4" : "8"), seed: text("seed", "", 12), best: text("best_of", "", 16),
        scales: SCALE_FIELDS.map((spec) => scaleField(id(spec.name), spec, changed)),
        problem: element("p", { className: "problem", role: "alert" }),
    };
    form.seed.placeholder = "random";
    const hints = isEdit ? {
        class: "A name, a part of one, a number or a synset.",
        count: "Different completions, side by side.",
        best: "So many in parallel for each; those that the kept part fits best go on.",
    } : {
        class: "A name, a part of one, a number or a synset. Left out: each picture its own.",
        count: "They are drawn side by side.",
        best: "So many are drawn for each picture, one of the likeliest stays. Previews show the first.",
    };
    const combo = element("div", { className: "combo" }, form.classes.input, form.classes.list);
    const random = button("Random", () => ((form.seed.value = ""), changed()), { className: "quiet" });
    form.classLine = labelled(id("class"), "Class", combo, hints.class);
    root.append(
        labelled(id("model"), "Model", form.model, ""),
        form.classLine,
        labelled(id("count"), "Pictures", form.count, hints.count),
        labelled(id("seed"), "Seed", numbers(form.seed, random), "The same seed and settings give the same pictures."),
        element("details", {}, element("summary", { textContent: "More settings" }),
            ...form.scales.map((f) => labelled(f.mode.id, f.spec.label, numbers(f.mode, f.place), f.spec.hint)),
            labelled(id("best_of"), isEdit ? "Candidates" : "Best of", form.best, hints.best),
            button("All as recommended", () => allAsRecommended(form), { className: "quiet" })),
        form.problem,
    );
    form.model.onchange = () => modelChanged(form);
    return form;
}

// What the form's model recommends
const recommendedBy = (form) => modelOf(form.model.value)[form.isEdit ? "editing" : "defaults"];

function allAsRecommended(form) {
    form.best.value = "";
    for (const f of form.scales) f.set(recommendedBy(form)[f.spec.name]);
    form.changed();
}

function setModels(form) {
    const text = (m) => (m.here ? m.name : `${m.name} – not here: ${m.how}`);
    form.model.replaceChildren(...models.map((m) => element("option", { value: m.name, disabled: !m.here, textContent: text(m) })));
    modelChanged(form);
}

// Of so many classes an edit's cannot be guessed.
const mustName = (m) => m.classes.length > 100;

// The fields that depend on the model
function modelChanged(form) {
    const m = modelOf(form.model.value), { classes } = form;
    const size = `${m.width} × ${m.height} pixels, ${plural(m.scales, "scale", "scales")}`;
    $(`${form.model.id}-hint`).textContent = `${m.title === m.name ? size : m.title}.`;
    classes.classes = m.classes.map(classOf);
    if (classes.chosen) classes.set(classes.chosen.value);
    form.classLine.hidden = !m.classes.length;
    classes.input.placeholder = !form.isEdit ? "each its own" : mustName(m) ? "choose one" : "guessed from what is kept";
    form.best.placeholder = `recommended: ${recommendedBy(form).best_of}`;
    for (const f of form.scales) f.reset(recommendedBy(form)[f.spec.name], m.guidance_scales);
    form.changed();
}

// Marks the field that a sentence of the server or of ours is about; none: all are right again.
function markField(form, field, message) {
    form.problem.textContent = message || "";
    if (!field) return form.root.querySelectorAll("[aria-invalid]").forEach((e) => e.removeAttribute("aria-invalid"));
    const [name, i] = field.split(/[[\]]/), scale = form.scales.find((f) => f.spec.name === name);
    const wrong = scale ? scale.inputs[Math.min(Number(i) || 0, scale.inputs.length - 1)] : $(`${form.kind}-${name}`);
    if (!wrong) return;
    wrong.setAttribute("aria-invalid", "true");
    wrong.focus();
}

// An error about a field
const wrongField = (field, message) => Object.assign(new Error(message), { field });

// The whole number of a field, low to high
function wholeOf(input, name, label, low, high) {
    const x = numberOf(input.value);
    if (Number.isInteger(x) && x >= low && x <= high) return x;
    throw wrongField(name, `${label}: “${input.value}”: expected a whole number of ${low} to ${high}`);
}

// What a row of SCALE_FIELDS says: a number, a list, or undefined, as the model recommends
function scalesOf(f, isEdit) {
    const { name, label, most: high, whole } = f.spec, low = name === "chain_length" && !isEdit ? 1 : 0;
    const value = f.value(), isRight = (x) => x >= low && x <= high && (!whole || Number.isInteger(x));
    const wrong = value === undefined ? -1 : [value].flat().findIndex((x) => !isRight(x));
    if (wrong < 0) return value;
    const found = f.inputs[Math.min(wrong, f.inputs.length - 1)].value;
    throw wrongField(`${name}[${wrong}]`, `${label}: “${found}”: expected a ${whole ? "whole number" : "number"} of ${low} to ${high}`);
}

// The job that the form asks for. What is as recommended is left out. Throws what wrongField says.
function jobOf(form) {
    const { kind, isEdit, classes } = form, m = modelOf(form.model.value), job = { kind, model: m.name };
    job.count = wholeOf(form.count, "count", "Pictures", 1, most);
    if (form.seed.value.trim()) job.seed = wholeOf(form.seed, "seed", "Seed", 0, Number.MAX_SAFE_INTEGER);
    if (m.classes.length && classes.value() !== null) job.class = classes.value();
    if (isEdit && mustName(m) && !job.class) throw wrongField("class", `Class: choose one: ${m.name} has too many to try them all`);
    for (const f of form.scales) {
        const value = scalesOf(f, isEdit);
        if (value !== undefined) job[f.spec.name] = value;
    }
    const [label, limit] = isEdit ? ["Candidates", 4096] : ["Best of", 64];
    if (form.best.value.trim()) job.best_of = wholeOf(form.best, "best_of", label, 1, limit);
    return job;
}

// jobOf, or null after the field that is wrong was marked
function readForm(form) {
    markField(form, null, "");
    try {
        return jobOf(form);
    } catch (error) {
        markField(form, error.field, error.message);
        return null;
    }
}

// The form as it was for a job
function fillForm(form, job) {
    if (!modelOf(job.model) || !modelOf(job.model).here) return say(`${job.model} is not served here.`, true);
    form.model.value = job.model;
    modelChanged(form);
    form.classes.set(job.class ?? null);
    form.count.value = job.count;
    form.seed.value = job.seed ?? "";
    for (const f of form.scales) if (job[f.spec.name] !== undefined) f.set([job[f.spec.name]].flat());
    form.best.value = job.best_of === undefined || job.best_of === recommendedBy(form).best_of ? "" : job.best_of;
    form.changed();
}

// The command line of a job; of one that has run the server says it itself.
function commandOf(job) {
    const isEdit = job.kind === "inpaint", words = [isEdit ? "./inpaint" : "./sample", job.model];
    const add = (option, value) => value !== undefined && words.push(option, String(value));
    if (isEdit) words.push(edit.file ? `image.${edit.extension}` : "image.png");
    if (isEdit && !(job.half || job.window || job.outside)) add("--mask", "mask.png");
    for (const shape of ["half", ...SIZED]) add(`--${shape}`, job[shape]);
    add("-n", job.count);
    add("--seed", job.seed);
    add("--class", job.class);
    for (const { name, option } of SCALE_FIELDS) add(option, job[name] && [job[name]].flat().join(","));
    add(isEdit ? "--candidates" : "--best-of", job.best_of);
    if (isEdit && job.paste) words.push("--paste-into", `image.${edit.extension || "png"}`, "-o", "out.png");
    return words.map(quoted).join(" ");
}

function previewCommand(form, place, more = {}) {
    if (!models.length) return;
    try {
        showCommand(place, commandOf({ ...jobOf(form), ...more }));
    } catch {
        place.replaceChildren();
    }
}

// ---- Results ----

const LIKELY = "How likely the model finds it, in nats per token: nearer to 0 is likelier";
const nats = (bound) => `${bound.toFixed(2).replace("-", "−")}\u00a0nats`; // on one line
const titleOf = ({ job }) => [job.model, job.class, job.seed !== undefined && `seed ${job.seed}`].filter(Boolean).join(", ");
const fileName = (p) => `imagebart-${p.run.job.model}-${p.run.job.seed}-${(p.run.job.first || 0) + p.k}.png`;
const latestPreview = (p) => p.previews[Math.min(...Object.keys(p.previews).map(Number))];

// A card for a run: title, progress, pictures, command line. Made once, then updated.
function showCard(run) {
    if (!run.card) {
        const place = $(run.kind === "inpaint" ? "edit-results" : "sample-results");
        const part = (tag, name) => element(tag, { className: name });
        run.card = element("article", { className: "card" });
        run.title = part("h2", "");
        run.text = part("p", "state");
        run.bars = part("div", "bars");
        run.grid = part("div", "pictures");
        run.remarkText = part("p", "remark");
        run.line = part("div", "command");
        run.cancel = button("Cancel", () => cancelRun(run));
        const again = () => fillForm(run.kind === "inpaint" ? editForm : sampleForm, run.job);
        run.again = button("Use these settings", again, { className: "quiet" });
        run.remove = button("Remove", () => removeRun(run), { className: "quiet" });
        const head = element("div", { className: "head" }, element("div", {}, run.title, run.text), run.cancel);
        run.card.append(head, run.bars, run.grid, run.remarkText, run.line, element("div", { className: "run" }, run.again, run.remove));
        place.prepend(run.card);
        for (const empty of place.querySelectorAll(":scope > .empty")) empty.remove();
        for (let k = 0; k < (run.job ? run.job.count : 0); k++) updatePicture(run, k);
    }
    updateCard(run);
}

function stateText(run) {
    const seconds = Math.max(1, Math.round(run.left)), left = run.left === null ? "" : `, about ${seconds} s left`;
    if (run.wantsCancel && !isOver(run)) return "Cancelling …";
    switch (run.state) {
    case "sending": return "Sending …";
    case "queued": return run.place ? `Waiting: ${plural(run.place, "job", "jobs")} before it.` : "Beginning …";
    case "running": return run.note || `Scale ${run.scale} of ${run.scales}${left}.`;
    case "done": return `Done${run.took === undefined ? "" : ` in ${shown(run.took, 2)} s`}.`;
    case "cancelled": return `Cancelled${run.wantsCancel ? "" : ", for nobody listened any more"}; what was finished is here.`;
    default: return run.error;
    }
}

function updateCard(run) {
    if (!run.card) return;
    const running = !isOver(run), T = run.scales || 0;
    run.title.textContent = titleOf(run);
    run.text.textContent = stateText(run);
    run.remarkText.textContent = run.remark;
    run.text.classList.toggle("error", run.state === "failed");
    run.cancel.hidden = !running;
    run.cancel.disabled = Boolean(run.wantsCancel);
    run.again.hidden = run.remove.hidden = running;
    run.bars.hidden = !running;
    run.card.setAttribute("aria-busy", String(running));
    if (run.bars.children.length !== T + 1)
        showBars(run.bars, T);
    showFraction(run.bars.firstChild, run);
    for (let i = 0; i < T; i++) run.bars.children[i + 1].firstChild.value = run.scaleFraction[T - i] || 0;
    if (run.command && run.line.dataset.command !== run.command) {
        run.line.dataset.command = run.command;
        showCommand(run.line, run.command);
    }
    if (edit.run === run) showEditState(run);
    if (run.isToLearn) showLearnState(run);
}

// A bar for all, and one for each scale
function showBars(place, T) {
    const bar = (more) => element("progress", { max: 1, value: 0, ...more });
    place.replaceChildren(bar({ className: "all", "aria-label": "All of it" }));
    for (let t = T; t >= 1; t--) place.append(element("label", {}, bar({}), `scale ${t}`));
}

// A bar that moves to and fro until it can be told how long it takes
function showFraction(bar, run) {
    if (run.fraction) bar.value = run.fraction;
    else bar.removeAttribute("value");
}

// Beneath the canvas, where the eye is
function showEditState(run) {
    const running = run !== null && !isOver(run);
    $("edit-state").textContent = run ? stateText(run) : "";
    $("edit-remark").textContent = run ? run.remark : "";
    $("edit-state").classList.toggle("error", run !== null && run.state === "failed");
    $("edit-progress").hidden = $("edit-cancel").hidden = !running;
    if (run) showFraction($("edit-progress"), run);
    $("edit-cancel").disabled = Boolean(run && run.wantsCancel);
    $("edit-run").disabled = running;
}

function removeRun(run) {
    runs.splice(runs.indexOf(run), 1);
    run.card.remove();
    run.pictures.forEach((p) => p.url && URL.revokeObjectURL(p.url));
    if (edit.run === run) {
        hideResult();
        edit.run = null;
        $("edit-candidates").replaceChildren();
        showEditState(null);
    }
    if (run.id) call(`api/jobs/${run.id}`, { method: "DELETE" }).catch(() => {});
    remember();
}

// The figure of picture k: its last preview until it is there
function updatePicture(run, k) {
    const picture = pictureOf(run, k), address = picture.url || latestPreview(picture), r = picture.result;
    if (!run.card) return;
    if (!picture.figure) {
        picture.image = element("img", { alt: "" });
        picture.open = button("", () => (edit.run === run ? showCandidate(k) : openViewer(picture)), { className: "picture" });
        picture.open.append(picture.image);
        picture.caption = element("figcaption");
        picture.figure = element("figure", {}, picture.open, picture.caption);
        run.grid.append(picture.figure);
    }
    if (address) picture.image.src = address;
    picture.image.hidden = !address;
    picture.open.disabled = !address;
    picture.figure.hidden = isOver(run) && !address;
    picture.image.classList.toggle("unfinished", !picture.url);
    const name = r && r.class ? r.class : `picture ${k + 1}`;
    picture.open.setAttribute("aria-label", picture.url ? `${name}: enlarge` : `${name}, unfinished`);
    picture.caption.replaceChildren();
    if (picture.url)
        picture.caption.append(
            element("span", { textContent: r ? [r.class, nats(r.bound)].filter(Boolean).join(", ") : "", title: LIKELY }),
            button("Edit", () => editPicture(picture), { className: "quiet" }),
            button("Learn", () => learnFrom(picture), { className: "quiet" }));
    if (run.kind === "inpaint" && edit.run === run && !picture.url && k === 0 && address) showPreview(address);
}

// ---- The viewer: one picture, large ----

let viewed = null; // picture
let film = 0; // timer of the animation

function openViewer(picture) {
    viewed = picture;
    stopFilm();
    const { run, k, result } = picture, size = result ? `${result.width} × ${result.height}` : "";
    $("viewer-title").textContent = `${titleOf(run)}, picture ${(run.job.first || 0) + k}`;
    $("viewer-picture").src = picture.url || latestPreview(picture);
    $("viewer-picture").alt = result && result.class ? result.class : "the picture";
    $("viewer-text").textContent =
        result ? `${size} pixels. ${nats(result.bound)} per token: the nearer to 0, the likelier the model finds it.` : "Unfinished.";
    $("viewer-save").href = picture.url || latestPreview(picture);
    $("viewer-save").download = fileName(picture);
    $("viewer-play").disabled = !Object.keys(picture.previews).length;
    for (const id of ["viewer-copy", "viewer-edit", "viewer-learn"]) $(id).disabled = !picture.blob;
    $("viewer-previous").disabled = k === 0;
    $("viewer-next").disabled = k + 1 >= run.pictures.length;
    if (!$("viewer").open) $("viewer").showModal();
}

function viewNext(by) {
    const next = viewed && viewed.run.pictures[viewed.k + by];
    if (next && (next.url || latestPreview(next))) openViewer(next);
}

// Addresses of the picture's steps, from the noisiest on, the picture itself last
function stepsOf(picture) {
    const scales = Object.keys(picture.previews).map(Number).sort((a, b) => b - a);
    const kept = picture.url ? "&kept" : ""; // another address: the steps of the one that was kept, not of the first that was drawn
    const steps = scales.map((s) => ({ scale: s, address: picture.previews[s] + kept }));
    const isLast = steps.length && steps.at(-1).scale === 1, isSquare = picture.run.kind === "sample"; // not a whole photograph
    if (picture.url && isLast && isSquare) steps.pop();
    if (picture.url && (isSquare || !steps.length)) steps.push({ scale: 1, address: picture.url });
    return steps;
}

function stopFilm() {
    clearInterval(film);
    film = 0;
    $("learn-play").textContent = "Play";
}

// From noise to the picture, a step every half second
function playFilm(picture, show) {
    const steps = stepsOf(picture);
    let i = 0;
    stopFilm();
    const next = () => {
        show(steps[i], i);
        if (++i === steps.length) stopFilm();
    };
    film = setInterval(next, 600);
    next();
}

async function copyPicture(picture) {
    try {
        await navigator.clipboard.write([new ClipboardItem({ "image/png": picture.blob })]);
        say("The picture was copied.");
    } catch {
        say("The browser allows no copying here (it wants https or this machine); “Save” does.", true);
    }
}

function startViewer() {
    $("viewer-previous").onclick = () => viewNext(-1);
    $("viewer-next").onclick = () => viewNext(1);
    $("viewer-play").onclick = () => playFilm(viewed, (step) => ($("viewer-picture").src = step.address));
    $("viewer-copy").onclick = () => copyPicture(viewed);
    $("viewer-edit").onclick = () => ($("viewer").close(), editPicture(viewed));
    $("viewer-learn").onclick = () => ($("viewer").close(), learnFrom(viewed));
    $("viewer-close").onclick = () => $("viewer").close();
    $("viewer").onclose = stopFilm;
    $("viewer").onkeydown = (e) => {
        if (e.key === "ArrowLeft") viewNext(-1);
        if (e.key === "ArrowRight") viewNext(1);
    };
}

// ---- Mask: 1 is drawn anew. It has the picture's size, belongs to it, and stays until somebody clears it ----

// A change is the list of runs [from, length, from, length, ...] of pixels that were flipped: flipping them again undoes
// it. So fifty changes of a photograph of 24 megapixels take little memory.
const edit = {
    file: null, extension: "png", // what was opened: goes to the server as it is
    bitmap: null, W: 0, H: 0, // bitmap: for the screen, may be smaller than the picture
    mask: null, shape: null, // shape: {half: "upper"}, {window: 24}, {outside: 24}: the mask is just that
    changes: [], at: 0, // changes[at ...] were undone
    square: null, cells: null, problem: "", // what the model sees: {x, y, side}; its tokens
    run: null, candidate: -1, after: null, preview: null, // the run whose results are shown on the canvas
    tool: "brush", size: 8, stroke: null, cursor: null,
};

// Pixels from..to-1 become value; those that were not are added to the runs.
function setRun(runList, from, to, value) {
    const mask = edit.mask;
    for (let i = from; i < to; i++) {
        if (mask[i] === value) continue;
        const first = i;
        while (i < to && mask[i] !== value) mask[i++] = value;
        runList.push(first, i - first);
    }
}

function flip(runList) {
    for (let r = 0; r < runList.length; r += 2)
        for (let i = runList[r], end = i + runList[r + 1]; i < end; i++) edit.mask[i] ^= 1;
}

// A round dab of this diameter with its middle at x, y; at least the pixel that lies there
function dab(runList, x, y, diameter, value) {
    const { W, H } = edit, r = diameter / 2;
    for (let row = Math.max(0, Math.ceil(y - r - 0.5)); row <= Math.min(H - 1, Math.floor(y + r - 0.5)); row++) {
        const half = Math.sqrt(Math.max(0, r * r - (row + 0.5 - y) ** 2));
        const from = Math.max(0, Math.ceil(x - half - 0.5)), to = Math.min(W - 1, Math.floor(x + half - 0.5));
        if (from <= to) setRun(runList, row * W + from, row * W + to + 1, value);
    }
    const px = Math.floor(x), py = Math.floor(y);
    if (px >= 0 && py >= 0 && px < W && py < H) setRun(runList, py * W + px, py * W + px + 1, value);
}

function commit(runList, shape) {
    if (!runList.length && shape === edit.shape) return maskChanged();
    edit.changes.length = edit.at;
    edit.changes.push({ runs: Uint32Array.from(runList), before: edit.shape, after: shape });
    edit.at++;
    edit.shape = shape;
    maskChanged();
}

function undo() {
    if (edit.stroke || !edit.at) return;
    const change = edit.changes[--edit.at];
    flip(change.runs);
    edit.shape = change.before;
    maskChanged();
}

function redo() {
    if (edit.stroke || edit.at === edit.changes.length) return;
    const change = edit.changes[edit.at++];
    flip(change.runs);
    edit.shape = change.after;
    maskChanged();
}

// The mask becomes what drawnAnew(x, y) says of each pixel.
function fillMask(drawnAnew, shape) {
    const { W, H } = edit, list = [];
    for (let y = 0; y < H; y++)
        for (let x = 0; x < W; ) {
            const value = drawnAnew(x, y) ? 1 : 0, first = x;
            while (x < W && (drawnAnew(x, y) ? 1 : 0) === value) x++;
            setRun(list, y * W + first, y * W + x, value);
        }
    commit(list, shape);
}

function invertMask() {
    if (!edit.mask) return;
    const all = [0, edit.mask.length];
    flip(all);
    commit(all, null);
}

function clearMask() {
    const list = [];
    if (!edit.mask) return;
    setRun(list, 0, edit.mask.length, 0);
    commit(list, null);
}

const editModel = () => modelOf(editForm.model.value);

// The square in the middle of the picture
function middleSquare() {
    const side = Math.min(edit.W, edit.H);
    return { x: Math.floor((edit.W - side) / 2), y: Math.floor((edit.H - side) / 2), side };
}

const isWithin = (square, x, y) => x >= square.x && y >= square.y && x < square.x + square.side && y < square.y + square.side;

// Is the model's pixel x, y of this shape drawn anew? As sampling/region.c.
function inShape(shape, x, y, side) {
    const size = shape.window || shape.outside, from = Math.floor((side - size) / 2), to = Math.floor((side + size) / 2);
    const middle = Math.floor(side / 2), inside = x >= from && x < to && y >= from && y < to;
    if (shape.window) return inside;
    if (shape.outside) return !inside;
    if (shape.extend) return false; // it is kept whole
    return { upper: y < middle, lower: y >= middle, left: x < middle, right: x >= middle }[shape.half];
}

function setShape(shape) {
    if (!edit.mask) return;
    const s = middleSquare(), side = editModel().width, at = (i) => Math.floor((i * side) / s.side);
    fillMask((x, y) => isWithin(s, x, y) && inShape(shape, at(x - s.x), at(y - s.y), side), shape);
}

// The rectangle in which the mask's hole lies, or null
function holeBox() {
    const { mask, W, H } = edit, box = { x0: W, y0: H, x1: 0, y1: 0 };
    const first = mask.indexOf(1);
    if (first < 0) return null;
    box.y0 = Math.floor(first / W);
    box.y1 = Math.floor(mask.lastIndexOf(1) / W) + 1;
    for (let y = box.y0; y < box.y1; y++) {
        const from = mask.subarray(y * W, y * W + W).indexOf(1);
        if (from < 0) continue;
        box.x0 = Math.min(box.x0, from);
        let to = W;
        while (to > box.x1 && !mask[y * W + to - 1]) to--;
        box.x1 = Math.max(box.x1, to);
    }
    return box;
}

// The square that the model sees when the picture's middle becomes so many of its pixels: it reaches beyond the picture.
function squareAround(size) {
    const m = middleSquare(), side = (m.side * editModel().width) / size;
    return { x: m.x - (side - m.side) / 2, y: m.y - (side - m.side) / 2, side };
}

const isExtended = () => Boolean(edit.shape && edit.shape.extend);

// The square that the model sees: around a painted hole, twice as wide, and at least of the model's size. As sampling/edit.c.
function findSquare(box) {
    if (isExtended()) return squareAround(edit.shape.extend);
    if (!box || edit.shape || !$("paste").checked) return middleSquare();
    const { W, H } = edit, most = Math.min(W, H), size = Math.max(box.x1 - box.x0, box.y1 - box.y0);
    if (size > most) return null;
    const side = Math.min(Math.max(2 * size, editModel().width), most);
    const place = (from, to, n) => Math.min(Math.max(0, Math.floor((from + to) / 2) - Math.floor(side / 2)), n - side);
    return { x: place(box.x0, box.x1, W), y: place(box.y0, box.y1, H), side };
}

// Which tokens have a pixel outside of the square of so many of the model's pixels in the middle
function cellsAround(size) {
    const { grid: [rows, columns], width } = editModel(), patch = width / columns;
    const from = Math.floor((width - size) / 2), to = Math.floor((width + size) / 2);
    const isKept = (i) => i * patch >= from && (i + 1) * patch <= to;
    return Uint8Array.from({ length: rows * columns }, (_, i) => !(isKept(i % columns) && isKept(Math.floor(i / columns))));
}

// Which tokens of the square have a pixel that is drawn anew
function findCells(square) {
    if (isExtended()) return cellsAround(edit.shape.extend);
    const [rows, columns] = editModel().grid, cells = new Uint8Array(rows * columns), { mask, W } = edit;
    const from = (i, n) => Math.floor((i * square.side) / n), to = (i, n) => Math.ceil(((i + 1) * square.side) / n);
    for (let r = 0; r < rows; r++)
        for (let c = 0; c < columns; c++) {
            const x0 = square.x + from(c, columns), x1 = square.x + to(c, columns);
            const y0 = square.y + from(r, rows), y1 = square.y + to(r, rows);
            for (let y = y0; y < y1 && !cells[r * columns + c]; y++)
                if (mask.subarray(y * W + x0, y * W + x1).includes(1)) cells[r * columns + c] = 1;
        }
    return cells;
}

const SIZED = ["window", "outside", "extend"]; // shapes of so many pixels

function maskChanged() {
    const box = edit.mask && holeBox();
    edit.square = edit.mask && findSquare(box);
    edit.cells = edit.square && findCells(edit.square);
    edit.problem = !edit.mask ? "Open a picture first." : isExtended() ? "" : !box ? "Paint what is to be drawn anew first." :
        !edit.square ? "The painted part fits no square of the picture: make it smaller." : "";
    $("undo").disabled = !edit.at;
    $("redo").disabled = edit.at === edit.changes.length;
    for (const id of ["invert", "clear", "mask-save", "fit", "zoom-in", "zoom-out"]) $(id).disabled = !edit.mask;
    const [name, value] = Object.entries(edit.shape || {})[0] || [""];
    $("shape").value = name === "half" ? `half:${value}` : name;
    $("shape-size-label").hidden = !SIZED.includes(name);
    if (SIZED.includes(name)) $("shape-size").value = value;
    $("paste").disabled = name === "extend";
    const beyond = isExtended() ? value : 0;
    if (beyond !== edit.beyond) fit(); // what is to be seen is another size
    edit.beyond = beyond;
    aboutEdit();
    editChanged();
    draw();
}

function aboutEdit() {
    if (!edit.file) return;
    const n = edit.cells ? edit.cells.reduce((a, b) => a + b, 0) : 0;
    const tokens = edit.cells && n ? ` ${n} of ${edit.cells.length} tokens are drawn anew.` : "";
    $("edit-about").textContent = `${edit.about}.${tokens} ${edit.problem}`;
}

// ---- A mask as a file: a PNG of one bit a pixel, black where it is drawn anew ----

const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
});

function pngChunk(type, data) {
    const chunk = new Uint8Array(12 + data.length), view32 = new DataView(chunk.buffer);
    view32.setUint32(0, data.length);
    for (let i = 0; i < 4; i++) chunk[4 + i] = type.charCodeAt(i);
    chunk.set(data, 8);
    let crc = 0xffffffff;
    for (let i = 4; i < 8 + data.length; i++) crc = crcTable[(crc ^ chunk[i]) & 255] ^ (crc >>> 8);
    view32.setUint32(8 + data.length, ~crc >>> 0);
    return chunk;
}

async function maskFile() {
    const { mask, W, H } = edit, bytes = Math.ceil(W / 8), rows = new Uint8Array((bytes + 1) * H), head = new Uint8Array(13);
    for (let y = 0; y < H; y++)
        for (let x = 0; x < W; x++) if (!mask[y * W + x]) rows[y * (bytes + 1) + 1 + (x >> 3)] |= 128 >> (x & 7);
    const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
    new DataView(head.buffer).setUint32(0, W);
    new DataView(head.buffer).setUint32(4, H);
    head[8] = 1;
    const data = new Uint8Array(await new Response(packed).arrayBuffer());
    const signature = Uint8Array.from([137, 80, 78, 71, 13, 10, 26, 10]);
    const chunks = [pngChunk("IHDR", head), pngChunk("IDAT", data), pngChunk("IEND", new Uint8Array(0))];
    return new Blob([signature, ...chunks], { type: "image/png" });
}

function saveBlob(blob, name) {
    const url = URL.createObjectURL(blob);
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// A mask from a file of the picture's size, or of the model's, then of the square in the middle. Dark and transparent
// parts are drawn anew.
async function loadMask(file) {
    let bitmap;
    try {
        bitmap = await createImageBitmap(file);
    } catch {
        return say(`${file.name}: not a picture that this browser can read.`, true);
    }
    const { W, H } = edit, side = editModel().width, whole = bitmap.width === W && bitmap.height === H;
    if (!edit.mask || (!whole && (bitmap.width !== side || bitmap.height !== side)))
        return say(`The mask has ${bitmap.width} × ${bitmap.height} pixels; expected the picture's ${W} × ${H}, or ${side} × ${side}.`, true);
    const canvas = element("canvas", { width: bitmap.width, height: bitmap.height }), c = canvas.getContext("2d");
    c.drawImage(bitmap, 0, 0);
    const pixels = c.getImageData(0, 0, bitmap.width, bitmap.height).data, s = middleSquare();
    const isDark = (x, y) => {
        const i = 4 * (y * bitmap.width + x);
        return pixels[i + 3] < 128 || pixels[i] + pixels[i + 1] + pixels[i + 2] < 3 * 128;
    };
    const at = (i) => Math.floor((i * side) / s.side);
    if (whole) fillMask(isDark, null);
    else fillMask((x, y) => isWithin(s, x, y) && isDark(at(x - s.x), at(y - s.y)), null);
    say("The mask was loaded.");
}

// ---- Canvas ----

const canvas = $("canvas"), pen = canvas.getContext("2d");
const tint = element("canvas"), hatch = element("canvas"); // the mask as it is seen, a pixel each; with stripes, as the screen has them
const view = { x: 0, y: 0, scale: 1 }; // picture pixel at the upper left corner; pixels of the canvas for one of the picture
const colours = { mask: "rgba(230, 0, 126, 0.5)", stripe: "rgba(60, 0, 30, 0.5)", cell: "rgba(230, 0, 126, 0.22)", line: "rgba(128, 128, 128, 0.55)" };

// The pixel of the picture under a pointer, with its fraction. From the canvas's rectangle at this moment, so that page
// zoom, scrolling, resizing and the pixel ratio need no care anywhere.
function pixelAt(event) {
    const r = canvas.getBoundingClientRect();
    return {
        x: view.x + ((event.clientX - r.left) * canvas.width) / r.width / view.scale,
        y: view.y + ((event.clientY - r.top) * canvas.height) / r.height / view.scale,
    };
}

// All that is to be seen: the picture, or the square that reaches beyond it
function boardBox() {
    const { W, H, square } = edit;
    return isExtended() && square ? { x: square.x, y: square.y, w: square.side, h: square.side } : { x: 0, y: 0, w: W, h: H };
}

function fitScale() {
    const box = boardBox();
    return Math.min(canvas.width / box.w, canvas.height / box.h);
}

// Within: the whole picture, and 32 screen pixels for one of its own
function setView(x, y, scale) {
    const low = fitScale(), high = Math.max(32 * devicePixelRatio, low), box = boardBox();
    view.scale = clamp(scale, low, high);
    const w = canvas.width / view.scale, h = canvas.height / view.scale;
    view.x = w >= box.w ? box.x + (box.w - w) / 2 : clamp(x, box.x, box.x + box.w - w);
    view.y = h >= box.h ? box.y + (box.h - h) / 2 : clamp(y, box.y, box.y + box.h - h);
    draw();
}

const fit = () => edit.mask && setView(0, 0, 0);

// The pixel p stays where it is on the screen.
function zoomAbout(p, factor) {
    const scale = clamp(view.scale * factor, fitScale(), Math.max(32 * devicePixelRatio, fitScale()));
    setView(p.x - ((p.x - view.x) * view.scale) / scale, p.y - ((p.y - view.y) * view.scale) / scale, scale);
}

const middle = () => ({ x: view.x + canvas.width / view.scale / 2, y: view.y + canvas.height / view.scale / 2 });
const zoomMiddle = (factor) => edit.mask && zoomAbout(middle(), factor);

// The canvas has the screen's pixels; what was in its middle stays there.
function resizeCanvas() {
    const w = Math.round(canvas.clientWidth * devicePixelRatio), h = Math.round(canvas.clientHeight * devicePixelRatio);
    if (!w || !h || (w === canvas.width && h === canvas.height)) return;
    const wasFit = !edit.mask || view.scale <= fitScale() * 1.0001, factor = w / canvas.width;
    const kept = middle();
    canvas.width = w;
    canvas.height = h;
    if (!edit.mask) return draw();
    if (wasFit) return fit();
    const scale = view.scale * factor;
    setView(kept.x - w / scale / 2, kept.y - h / scale / 2, scale);
}

let isDrawing = false;
function draw() {
    if (!isDrawing) requestAnimationFrame(drawNow);
    isDrawing = true;
}

function drawNow() {
    isDrawing = false;
    resizeCanvas();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (!edit.mask) return;
    const { W, H } = edit, s = view.scale;
    pen.setTransform(s, 0, 0, s, -view.x * s, -view.y * s);
    pen.imageSmoothingEnabled = s < 2;
    pen.drawImage(edit.bitmap, 0, 0, W, H);
    if (edit.preview && edit.square) drawInto(edit.square, edit.preview);
    if (edit.after) drawAfter(Number($("split").value) / 100);
    else if (!edit.preview) drawMask();
    if (!edit.after && edit.square && $("grid").checked) drawGrid(edit.square);
    if (edit.cursor && !edit.after && edit.tool !== "move") drawRing(edit.cursor);
    pen.setTransform(1, 0, 0, 1, 0, 0);
}

const drawInto = (square, image) => pen.drawImage(image, square.x, square.y, square.side, square.side);

// The picture after, left of the line; before, right of it. A result of the model's own size lies in its square.
function drawAfter(share) {
    const { W, H } = edit, box = boardBox(), at = !edit.isSquare ? null : isExtended() ? edit.square : middleSquare();
    pen.save();
    pen.beginPath();
    pen.rect(box.x, box.y, box.w * share, box.h);
    pen.clip();
    if (!at) pen.clearRect(0, 0, W * share, H);
    if (at) drawInto(at, edit.after);
    else pen.drawImage(edit.after, 0, 0, W, H);
    pen.restore();
    if (share <= 0 || share >= 1) return;
    for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
        pen.fillStyle = colour;
        pen.fillRect(box.x + box.w * share - width / 2 / view.scale, box.y, width / view.scale, box.h);
    }
}

// The part of the mask that is seen: a pixel each, or, of a picture larger than the screen, as many as the screen has
function drawMask() {
    const { mask, W, H } = edit, step = Math.max(1, 1 / view.scale);
    const x0 = Math.max(0, Math.floor(view.x)), y0 = Math.max(0, Math.floor(view.y));
    const n = Math.ceil((Math.min(W, Math.ceil(view.x + canvas.width / view.scale)) - x0) / step);
    const m = Math.ceil((Math.min(H, Math.ceil(view.y + canvas.height / view.scale)) - y0) / step);
    if (n <= 0 || m <= 0) return;
    tint.width = n;
    tint.height = m;
    const c = tint.getContext("2d"), image = c.createImageData(n, m), pixels = new Uint32Array(image.data.buffer);
    for (let j = 0; j < m; j++) {
        const row = (y0 + Math.floor(j * step)) * W + x0;
        for (let i = 0; i < n; i++) if (mask[row + Math.floor(i * step)]) pixels[j * n + i] = 0xffffffff;
    }
    c.putImageData(image, 0, 0);
    drawHatched(x0, y0, n * step, m * step);
}

// The tint at this place of the picture, coloured and striped, so that it is seen on any picture
function drawHatched(x, y, width, height) {
    const c = hatch.getContext("2d"), s = view.scale;
    hatch.width = canvas.width;
    hatch.height = canvas.height;
    c.imageSmoothingEnabled = false;
    c.drawImage(tint, (x - view.x) * s, (y - view.y) * s, width * s, height * s);
    c.globalCompositeOperation = "source-in";
    c.fillStyle = c.createPattern(stripes(Math.round(10 * devicePixelRatio)), "repeat");
    c.fillRect(0, 0, hatch.width, hatch.height);
    pen.save();
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(hatch, 0, 0);
    pen.restore();
}

// A tile of so many pixels with a diagonal
function stripes(size) {
    const tile = element("canvas", { width: size, height: size }), c = tile.getContext("2d");
    c.fillStyle = colours.mask;
    c.fillRect(0, 0, size, size);
    c.strokeStyle = colours.stripe;
    c.lineWidth = devicePixelRatio;
    for (const at of [0, size, 2 * size]) {
        c.moveTo(at + 1, -1);
        c.lineTo(at - size - 1, size + 1);
    }
    c.stroke();
    return tile;
}

function drawGrid(square) {
    const [rows, columns] = editModel().grid, w = square.side / columns, h = square.side / rows;
    pen.fillStyle = colours.cell;
    edit.cells.forEach((cell, i) => {
        if (cell) pen.fillRect(square.x + (i % columns) * w, square.y + Math.floor(i / columns) * h, w, h);
    });
    pen.strokeStyle = colours.line;
    pen.lineWidth = 1 / view.scale;
    pen.beginPath();
    for (let c = 0; c <= columns; c++) {
        pen.moveTo(square.x + c * w, square.y);
        pen.lineTo(square.x + c * w, square.y + square.side);
    }
    for (let r = 0; r <= rows; r++) {
        pen.moveTo(square.x, square.y + r * h);
        pen.lineTo(square.x + square.side, square.y + r * h);
    }
    pen.stroke();
}

// What the next dab will paint
function drawRing(p) {
    for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = (width * devicePixelRatio) / view.scale;
        pen.beginPath();
        pen.arc(p.x, p.y, edit.size / 2, 0, 2 * Math.PI);
        pen.stroke();
    }
}

// ---- Pointers: mouse, pen, fingers ----

const fingers = new Map(); // pointers that are down: id -> event
let panFrom = null; // {x, y}: the picture's pixel that stays under the pointer
let pinch = null; // {p, distance}: the same for two fingers, and how far they were apart
let penSeen = -Infinity; // while a pen is near, a palm does not paint
let spaceIsDown = false, pointerIsOver = false;
const PEN_NEAR = 1000; // milliseconds

function beginStroke(p) {
    hideResult();
    edit.stroke = { runs: [], value: edit.tool === "eraser" ? 0 : 1, last: p };
    strokeTo(p);
}

function strokeTo(p) {
    const { last, runs: list, value } = edit.stroke, dx = p.x - last.x, dy = p.y - last.y;
    const steps = Math.max(1, Math.ceil(Math.hypot(dx, dy) / Math.max(0.5, edit.size / 8)));
    for (let i = 1; i <= steps; i++) dab(list, last.x + (dx * i) / steps, last.y + (dy * i) / steps, edit.size, value);
    edit.stroke.last = p;
    draw();
}

function endStroke(keep) {
    const stroke = edit.stroke;
    edit.stroke = null;
    if (!stroke) return;
    if (keep && stroke.runs.length) return commit(stroke.runs, null);
    flip(stroke.runs);
    maskChanged();
}

function pinchOf() {
    const [a, b] = [...fingers.values()];
    return {
        at: { clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2 },
        distance: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY),
    };
}

// So that the pixel p comes to lie under the pointer
function panTo(event, p) {
    const now = pixelAt(event);
    setView(view.x + p.x - now.x, view.y + p.y - now.y, view.scale);
}

canvas.onpointerdown = (e) => {
    if (!edit.mask) return;
    if (e.pointerType === "pen") penSeen = e.timeStamp;
    if (e.pointerType === "touch" && e.timeStamp - penSeen < PEN_NEAR) return;
    canvas.focus({ preventScroll: true });
    try {
        canvas.setPointerCapture(e.pointerId);
    } catch {
        // it was released already
    }
    fingers.set(e.pointerId, e);
    if (e.pointerType === "touch" && fingers.size === 2) {
        endStroke(false);
        panFrom = null;
        const two = pinchOf();
        pinch = { p: pixelAt(two.at), distance: two.distance, scale: view.scale };
    } else if (fingers.size > 1) return;
    else if (e.button === 1 || spaceIsDown || edit.tool === "move") panFrom = pixelAt(e);
    else if (e.button === 0) beginStroke(pixelAt(e));
    e.preventDefault();
};

canvas.onpointermove = (e) => {
    if (!edit.mask) return;
    if (e.pointerType === "pen") penSeen = e.timeStamp;
    edit.cursor = e.pointerType === "touch" ? null : pixelAt(e);
    if (!fingers.has(e.pointerId)) return draw();
    fingers.set(e.pointerId, e);
    if (pinch && fingers.size === 2) {
        const two = pinchOf();
        setView(view.x, view.y, (pinch.scale * two.distance) / Math.max(1, pinch.distance));
        panTo(two.at, pinch.p);
    } else if (panFrom) panTo(e, panFrom);
    else if (edit.stroke) {
        const between = e.getCoalescedEvents ? e.getCoalescedEvents() : [];
        for (const part of between.length ? between : [e]) strokeTo(pixelAt(part));
    }
};

function pointerEnds(e, keep) {
    if (!fingers.delete(e.pointerId)) return;
    if (fingers.size < 2) pinch = null;
    panFrom = null;
    endStroke(keep);
}
canvas.onpointerup = (e) => pointerEnds(e, true);
canvas.onpointercancel = (e) => pointerEnds(e, false);
canvas.onlostpointercapture = (e) => pointerEnds(e, true);
canvas.oncontextmenu = (e) => e.preventDefault(); // a finger that stays would open it
canvas.onpointerenter = () => (pointerIsOver = true);
canvas.onpointerleave = () => {
    pointerIsOver = false;
    edit.cursor = null;
    draw();
};

canvas.addEventListener("wheel", (e) => {
    if (!edit.mask || !e.deltaY) return;
    e.preventDefault();
    if (e.ctrlKey || e.metaKey || edit.tool === "move") zoomAbout(pixelAt(e), Math.exp(-clamp(e.deltaY, -200, 200) / 400));
    else setSize(edit.size * (e.deltaY < 0 ? 1.15 : 1 / 1.15), Math.sign(-e.deltaY));
}, { passive: false });

// ---- Brush and keys ----

const mostSize = () => Math.max(16, Math.max(edit.W, edit.H));

// by: the least that it changes
function setSize(size, by = 0) {
    const rounded = Math.round(size);
    const wanted = by > 0 ? Math.max(rounded, edit.size + 1) : by < 0 ? Math.min(rounded, edit.size - 1) : rounded;
    edit.size = clamp(wanted, 1, mostSize());
    $("brush-size").value = edit.size;
    $("brush-slider").value = (100 * Math.log(edit.size)) / Math.log(mostSize());
    draw();
}

function setTool(tool) {
    edit.tool = tool;
    for (const name of ["brush", "eraser", "move"]) {
        $(`tool-${name}`).setAttribute("aria-checked", String(name === tool));
        $(`tool-${name}`).tabIndex = name === tool ? 0 : -1;
    }
    canvas.style.cursor = tool === "move" ? "grab" : "crosshair";
    draw();
}

// The cursor of the keyboard goes from token to token, or by pixels.
function moveCursor(dx, dy, byPixel) {
    const s = edit.square || middleSquare(), [rows, columns] = editModel().grid, w = s.side / columns, h = s.side / rows;
    const p = edit.cursor || { x: s.x + s.side / 2, y: s.y + s.side / 2 };
    const middle = (v, from, step, d) => from + (Math.floor((v - from) / step) + 0.5 + d) * step;
    edit.cursor = byPixel ? { x: p.x + dx, y: p.y + dy } : { x: middle(p.x, s.x, w, dx), y: middle(p.y, s.y, h, dy) };
    edit.cursor = { x: clamp(edit.cursor.x, 0, edit.W - 0.5), y: clamp(edit.cursor.y, 0, edit.H - 0.5) };
    const painted = edit.mask[Math.floor(edit.cursor.y) * edit.W + Math.floor(edit.cursor.x)];
    say(`${Math.floor(edit.cursor.x)}, ${Math.floor(edit.cursor.y)}: ${painted ? "drawn anew" : "kept"}`);
    draw();
}

function dabAtCursor(value) {
    if (!edit.cursor) return moveCursor(0, 0, false);
    hideResult();
    const list = [];
    dab(list, edit.cursor.x, edit.cursor.y, edit.size, value);
    commit(list, null);
}

const CANVAS_KEYS = {
    "[": () => setSize(edit.size / 1.15, -1), "]": () => setSize(edit.size * 1.15, 1),
    "+": () => zoomMiddle(1.25), "=": () => zoomMiddle(1.25), "-": () => zoomMiddle(0.8), f: fit, 0: fit,
    x: () => setTool(edit.tool === "brush" ? "eraser" : "brush"), b: () => toggleBefore(),
    Enter: () => dabAtCursor(1), Delete: () => dabAtCursor(0), Backspace: () => dabAtCursor(0),
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onEditKey(e) {
    if ($("edit").hidden || !edit.mask || $("viewer").open) return;
    const isTyping = e.target.matches("input[type=text], textarea, select");
    const key = e.key.length === 1 ? e.key.toLowerCase() : e.key, command = e.ctrlKey || e.metaKey;
    if (command && !isTyping && (key === "z" || key === "y")) {
        if (key === "y" || e.shiftKey) redo();
        else undo();
        return e.preventDefault();
    }
    const onCanvas = document.activeElement === canvas || (pointerIsOver && document.activeElement === document.body);
    if (command || e.altKey || isTyping || !onCanvas) return;
    if (key === " ") spaceIsDown = true;
    else if (ARROWS[key]) moveCursor(...ARROWS[key], e.shiftKey);
    else if (CANVAS_KEYS[key]) CANVAS_KEYS[key]();
    else return;
    e.preventDefault();
}

// ---- Edit: a picture, its mask, and what became of it ----

let editForm;

// What a file is by its first bytes
async function kindOf(file) {
    const b = new Uint8Array(await file.slice(0, 12).arrayBuffer()), ascii = String.fromCharCode(...b);
    if (ascii.startsWith("\x89PNG")) return "png";
    if (b[0] === 0xff && b[1] === 0xd8) return "jpg";
    if (ascii.startsWith("RIFF") && ascii.endsWith("WEBP")) return "webp";
    return null;
}

const ascii = (bytes, from, length) => String.fromCharCode(...bytes.subarray(from, from + length));

// The bytes of an ICC profile in the beginning of a file of this kind, or null
async function profileOf(bytes, kind) {
    const data = new DataView(bytes.buffer);
    if (kind === "png")
        for (let at = 8; at + 12 <= bytes.length && ascii(bytes, at + 4, 4) !== "IDAT"; at += 12 + data.getUint32(at)) {
            if (ascii(bytes, at + 4, 4) !== "iCCP") continue;
            const packed = bytes.subarray(bytes.indexOf(0, at + 8) + 2, at + 8 + data.getUint32(at));
            const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
            return new Uint8Array(await new Response(plain).arrayBuffer());
        }
    if (kind === "jpg")
        for (let at = 2; at + 18 <= bytes.length && bytes[at] === 255 && bytes[at + 1] !== 0xda; at += 2 + data.getUint16(at + 2))
            if (bytes[at + 1] === 0xe2 && ascii(bytes, at + 4, 11) === "ICC_PROFILE") return bytes.slice(at + 18, at + 2 + data.getUint16(at + 2));
    if (kind === "webp")
        for (let at = 12; at + 8 <= bytes.length; at += 8 + data.getUint32(at + 4, true) + (data.getUint32(at + 4, true) & 1))
            if (ascii(bytes, at, 4) === "ICCP") return bytes.slice(at + 8, at + 8 + data.getUint32(at + 4, true));
    return null;
}

// The name that a profile gives itself: its tag "desc", in ASCII or, since version 4, in UTF-16
function profileName(icc) {
    const data = new DataView(icc.buffer);
    for (let i = 0, at = 132; i < data.getUint32(128); i++, at += 12) {
        if (ascii(icc, at, 4) !== "desc") continue;
        const tag = data.getUint32(at + 4), isWide = ascii(icc, tag, 4) === "mluc";
        if (!isWide) return ascii(icc, tag + 12, data.getUint32(tag + 8) - 1);
        const from = tag + data.getUint32(tag + 24);
        return new TextDecoder("utf-16be").decode(icc.subarray(from, from + data.getUint32(tag + 20)));
    }
    return "";
}

// What is to be said of a picture's colours. Results have the same profile; the model reads the numbers as sRGB.
async function coloursOf(file, kind) {
    try {
        const icc = await profileOf(new Uint8Array(await file.slice(0, 1 << 20).arrayBuffer()), kind);
        const name = icc && (profileName(icc).slice(0, 60) || "unnamed");
        return !icc ? "" : name.includes("sRGB") ? ", sRGB" : `, profile ${name}`;
    } catch {
        return ", a profile that cannot be read";
    }
}

// A picture for the screen, which shows no more than so many pixels, and its size. The file itself goes to the server.
async function decode(file) {
    const MOST = 4096, bitmap = await createImageBitmap(file), { width: W, height: H } = bitmap;
    if (Math.max(W, H) <= MOST) return { bitmap, W, H };
    const resizeWidth = Math.round((W * MOST) / Math.max(W, H));
    const small = await createImageBitmap(bitmap, { resizeWidth, resizeQuality: "high" });
    bitmap.close();
    return { bitmap: small, W, H };
}

// Opens a picture. keepMask: it is a result of the one before, so that the mask still fits.
async function openPicture(file, keepMask = false) {
    const kind = await kindOf(file);
    if (!kind) return say(`${file.name || "This"} is ${file.type || "no picture"}: PNG, JPEG and WebP are understood.`, true);
    let seen;
    try {
        seen = await decode(file);
    } catch {
        return say(`${file.name || "The picture"} cannot be read: it seems to be damaged.`, true);
    }
    const { bitmap, W, H } = seen, colours = await coloursOf(file, kind);
    if (W * H > 64 << 20) return say(`${W} × ${H} pixels are too many: 64 megapixels at most.`, true);
    const stays = keepMask && edit.mask && edit.W === W && edit.H === H, hadMask = edit.mask && edit.mask.includes(1);
    Object.assign(edit, { file, extension: kind, bitmap, W, H });
    Object.assign(edit, { run: null, candidate: -1, after: null, preview: null, cursor: null });
    const type = { png: "PNG", jpg: "JPEG", webp: "WebP" }[kind];
    edit.about = `${file.name || "Picture"}: ${W} × ${H} pixels, ${type}, ${shown(file.size / 1024, 3)} KiB${colours}`;
    if (!stays) Object.assign(edit, { mask: new Uint8Array(W * H), shape: null, changes: [], at: 0 });
    $("invitation").hidden = true;
    $("edit-open").parentElement.classList.remove("primary");
    $("compare").hidden = true;
    $("edit-candidates").replaceChildren();
    showEditState(null);
    if (!stays) setSize(Math.max(1, Math.min(W, H) / 8));
    resizeCanvas();
    fit();
    maskChanged();
    say(`${edit.about}. ${stays ? "The mask stays." : hadMask ? "The mask of the picture before is gone." : ""}`);
}

async function editPicture(picture) {
    const file = new File([picture.blob], fileName(picture), { type: "image/png" });
    const keepMask = picture.run.kind === "inpaint" && edit.run === picture.run;
    selectTab("edit");
    await openPicture(file, keepMask);
    canvas.focus();
}

function editExtra() {
    return { ...(edit.shape || {}), paste: $("paste").checked && !isExtended() };
}

function editChanged() {
    if (editForm) previewCommand(editForm, $("edit-command"), editExtra());
}

async function runEdit() {
    const job = readForm(editForm);
    if (!job) return;
    if (edit.problem) {
        $("edit-state").textContent = edit.problem;
        $("edit-state").classList.add("error");
        return say(edit.problem, true);
    }
    Object.assign(job, editExtra(), { owned: true });
    if (edit.run && !isOver(edit.run)) return;
    const run = newRun("inpaint", job);
    edit.run = run;
    const files = { image: edit.file, mask: edit.shape ? null : await maskFile() };
    hideResult();
    bringIntoView($("board"), "nearest");
    await start(run, files, editForm);
}

// While it runs: the model's picture of the first, in its square
async function showPreview(address) {
    const { run } = edit;
    const answer = address && (await fetch(address).catch(() => null));
    const bitmap = answer && answer.ok ? await createImageBitmap(await answer.blob()) : null;
    if (edit.run === run && !edit.after && (!bitmap || !isOver(run))) edit.preview = bitmap;
    draw();
}

// An edit is finished: its candidates beneath the canvas, in the order of the card, the likeliest on it
function showEdited(run) {
    if (edit.run !== run) return;
    edit.preview = null;
    const best = run.pictures.reduce((a, b) => (b.result.bound > a.result.bound ? b : a));
    $("edit-candidates").replaceChildren(...run.pictures.map((p) => {
        const { k } = p;
        const open = button("", () => showCandidate(k), { className: "picture", "aria-pressed": "false" });
        open.setAttribute("aria-label", `Completion ${k + 1}, ${nats(p.result.bound)} per token`);
        open.append(element("img", { src: p.url, alt: "" }));
        open.dataset.k = k;
        return element("figure", {}, open, element("figcaption", { textContent: `${p === best ? "likeliest: " : ""}${nats(p.result.bound)}` }));
    }));
    showCandidate(best.k);
}

async function showCandidate(k) {
    const { run } = edit, picture = run.pictures[k];
    if (!picture.blob) return openViewer(picture);
    const { bitmap } = await decode(picture.blob);
    if (edit.run !== run) return;
    edit.candidate = k;
    edit.after = bitmap;
    edit.isSquare = !run.job.paste;
    $("compare").hidden = false;
    setSplit(100);
    for (const b of $("edit-candidates").querySelectorAll("button"))
        b.setAttribute("aria-pressed", String(Number(b.dataset.k) === k));
    draw();
}

function setSplit(share) {
    $("split").value = share;
    $("before").setAttribute("aria-pressed", String(share <= 0));
    draw();
}

const toggleBefore = () => edit.after && setSplit(Number($("split").value) > 0 ? 0 : 100);

// Back to the picture and its mask
function hideResult() {
    edit.after = edit.preview = null;
    $("compare").hidden = true;
    for (const b of $("edit-candidates").querySelectorAll("button")) b.setAttribute("aria-pressed", "false");
    draw();
}

function startTools() {
    for (const name of ["brush", "eraser", "move"]) $(`tool-${name}`).onclick = () => setTool(name);
    document.querySelector("[role=radiogroup]").onkeydown = (e) => {
        if (!ARROWS[e.key]) return;
        const names = ["brush", "eraser", "move"], by = ARROWS[e.key][0] + ARROWS[e.key][1];
        setTool(names[(names.indexOf(edit.tool) + by + 3) % 3]);
        $(`tool-${edit.tool}`).focus();
        e.preventDefault();
    };
    $("brush-slider").oninput = (e) => setSize(mostSize() ** (Number(e.target.value) / 100));
    $("brush-size").onchange = (e) => setSize(numberOf(e.target.value) || edit.size);
    $("undo").onclick = undo;
    $("redo").onclick = redo;
    $("invert").onclick = invertMask;
    $("clear").onclick = clearMask;
    $("fit").onclick = fit;
    $("zoom-in").onclick = () => zoomMiddle(1.25);
    $("zoom-out").onclick = () => zoomMiddle(0.8);
    $("shape").onchange = (e) => {
        const [name, half] = e.target.value.split(":");
        if (!edit.mask) return maskChanged();
        if (!name) return commit([], null);
        setShape(half ? { half } : { [name]: Math.round((editModel().width * (name === "extend" ? 6 : 3)) / 8) });
    };
    $("shape-size").onchange = (e) => {
        const [name] = Object.keys(edit.shape || {});
        const size = clamp(Math.round(numberOf(e.target.value)) || 1, 1, editModel().width - 1);
        if (SIZED.includes(name)) setShape({ [name]: size });
    };
}

function startEdit() {
    editForm = settingsOf("inpaint", $("edit-settings"), editChanged);
    editForm.model.onchange = () => {
        modelChanged(editForm);
        if (edit.shape) setShape(edit.shape);
        else maskChanged();
    };
    $("edit-form").onsubmit = (e) => (e.preventDefault(), runEdit());
    $("edit-run").onclick = runEdit;
    $("edit-cancel").onclick = () => cancelRun(edit.run);
    $("edit-open").onchange = (e) => {
        if (e.target.files[0]) openPicture(e.target.files[0]);
        e.target.value = "";
    };
    startTools();
    $("grid").onchange = draw;
    $("paste").onchange = maskChanged;
    $("mask-save").onclick = async () => saveBlob(await maskFile(), "mask.png");
    $("mask-load").onchange = (e) => {
        if (e.target.files[0]) loadMask(e.target.files[0]);
        e.target.value = "";
    };
    $("split").oninput = (e) => setSplit(Number(e.target.value));
    $("before").onclick = toggleBefore;
    $("next-input").onclick = () => editPicture(edit.run.pictures[edit.candidate]);
    document.addEventListener("keydown", onEditKey);
    document.addEventListener("keyup", (e) => e.key === " " && (spaceIsDown = false));
    addEventListener("blur", () => (spaceIsDown = false));
    new ResizeObserver(draw).observe(canvas);
    addEventListener("resize", draw);
    setTool("brush");
    setSize(8);
    maskChanged();
}

// ---- Learn: the chain of one picture step by step, and how unsure the model was ----

// steps: {scale, image, told}, from the noisiest on; told: what the server says of that step (K.json?scale=S)
const learn = { picture: null, steps: [], at: 0, details: null, cell: -1 };

async function learnFrom(picture) {
    stopFilm();
    const { run, k } = picture, T = run.job.temperature.length, seen = stepsOf(picture);
    const steps = Array.from({ length: T }, (_, i) => {
        const found = seen.find((s) => s.scale === T - i);
        return { scale: T - i, image: found ? element("img", { src: found.address, alt: "" }) : null, told: null };
    });
    Object.assign(learn, { picture, steps, at: 0, details: null, cell: -1 });
    selectTab("learn");
    $("learn-empty").hidden = true;
    $("learn-body").hidden = false;
    $("learn-step").max = T - 1;
    $("learn-text").textContent =
        `${titleOf(run)}, picture ${(run.job.first || 0) + k}: ${T} noising steps lead from its tokens x₀ to pure noise x${subscript(T)}. ` +
        "Step t draws every token anew with probability βₜ. Scale t goes back from xₜ to xₜ₋₁: a transformer sees the whole " +
        "noisier grid and writes the cleaner one, token by token.";
    showSteps();
    try {
        const address = `api/jobs/${run.id}/${k}.json`;
        const [details, ...told] = await Promise.all([call(address), ...steps.map((s) => call(`${address}?scale=${s.scale}`))]);
        await Promise.all(steps.map((s) => s.image && s.image.decode().catch(() => (s.image = null))));
        if (learn.steps !== steps) return; // another picture was chosen meanwhile
        learn.details = details;
        steps.forEach((s, i) => (s.told = told[i]));
    } catch (error) {
        $("learn-step-text").textContent = error.status === 410 ? "The server has forgotten this picture’s tokens." : error.message;
    }
    showSteps();
}

const subscript = (n) => String(n).replace(/\d/g, (d) => "₀₁₂₃₄₅₆₇₈₉"[d]);
const xOf = (t) => `x${subscript(t)}`;
const percent = (p) => `${shown(100 * p, 3)} %`;
const changedText = ({ changed, tokens }) => `${changed} of ${tokens.length} changed`;

// The step's betas and the like, of the model's lists: the noisiest scale is first
function scheduleAt(t) {
    const m = modelOf(learn.picture.run.job.model), T = m.scales;
    return { K: m.codebook, beta: m.betas[T - t], alphaBefore: t > 1 ? m.alpha_bar[T - t + 1] : 1 };
}

// The start, x_T, of which there is no picture: a pixel of its colour for each token
function startFigure() {
    const T = learn.steps.length, { told } = learn.steps[0], name = `${xOf(T)}, the start`;
    const canvas = element("canvas", { className: "picture", role: "img", "aria-label": `${name}: its tokens as colours` });
    if (told) {
        const [rows, columns] = learn.details.grid, c = canvas.getContext("2d");
        Object.assign(canvas, { width: columns, height: rows });
        told.before.forEach((token, i) => {
            c.fillStyle = tokenColour(token);
            c.fillRect(i % columns, Math.floor(i / columns), 1, 1);
        });
    }
    return element("li", {}, element("figure", {}, canvas, element("figcaption", {}, element("span", { textContent: name }))));
}

// The start, and a picture for each step
function showSteps() {
    $("learn-steps").replaceChildren(startFigure(), ...learn.steps.map((step, i) => {
        const name = `${xOf(step.scale - 1)}, after scale ${step.scale}`, beta = `β${subscript(step.scale)} = ${shown(scheduleAt(step.scale).beta)}`;
        const open = button("", () => showStep(i), { className: "picture", "aria-label": name });
        open.append(step.image || element("span", { className: "hint", textContent: "no preview" }));
        const lines = [name, beta, step.told ? changedText(step.told) : ""].map((textContent) => element("span", { textContent }));
        return element("li", {}, element("figure", {}, open, element("figcaption", {}, ...lines)));
    }));
    showStep(learn.at);
}

function stepText({ scale, told }) {
    const { run } = learn.picture, { job } = run, at = (list) => list[list.length - scale];
    if (at(job.chain_length) === 0) return `Scale ${scale} is left out (a chain length of 0): the start, ${xOf(scale)}, is ${xOf(scale - 1)} too.`;
    const drawn = run.kind === "inpaint" ? "every token that is not kept" : "every token";
    const { beta } = scheduleAt(scale), guided = at(job.guidance) === 1 ? "" : `, with guidance ${at(job.guidance)}`;
    const others = run.kind === "inpaint" && job.best_of > 1 ? ` Of ${job.best_of} candidates each grid shows the one that went on.` : "";
    return `Scale ${scale}: from ${xOf(scale)}${beta === 1 ? ", pure noise," : ""} to ${xOf(scale - 1)}, at temperature ${at(job.temperature)}, in ` +
        `${plural(at(job.chain_length), "pass", "passes")}${guided}. β${subscript(scale)} = ${shown(beta)} is the share that noise draws anew on the way to ${xOf(scale)}; ` +
        `on the way back each pass draws ${drawn} anew` +
        `${told ? `: ${told.changed} of ${plural(told.tokens.length, "token", "tokens")} changed` : ""}.${others}`;
}

function showStep(i) {
    learn.at = clamp(i, 0, learn.steps.length - 1);
    const step = learn.steps[learn.at], { scale } = step;
    $("learn-step").value = learn.at;
    $("learn-step").setAttribute("aria-valuetext", `scale ${scale}`);
    $("learn-back").disabled = learn.at === 0;
    $("learn-forth").disabled = learn.at === learn.steps.length - 1;
    $("before-title").textContent = `${xOf(scale)}, ${scheduleAt(scale).beta === 1 ? "pure noise" : "before"}`;
    $("after-title").textContent = `${xOf(scale - 1)}, after scale ${scale}`;
    if (step.told || !learn.details) $("learn-step-text").textContent = stepText(step);
    [...$("learn-steps").querySelectorAll("button")].forEach((b, j) => b.setAttribute("aria-pressed", String(learn.at === j)));
    drawLearn();
    sayToken();
    sayHeat();
}

// From noise to the picture, a step a second; a second click stops it.
function playChain() {
    if (film) return stopFilm();
    showStep(learn.at + 1 < learn.steps.length ? learn.at : 0);
    $("learn-play").textContent = "Pause";
    film = setInterval(() => {
        showStep(learn.at + 1);
        if (learn.at + 1 === learn.steps.length) stopFilm();
    }, 1200);
}

// A canvas with as many pixels as the screen has there, and its cells; null: it is not seen.
function cellsOf(canvas) {
    const size = Math.round(canvas.clientWidth * devicePixelRatio), [rows, columns] = learn.details.grid;
    if (!size) return null;
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const c = canvas.getContext("2d"), w = canvas.width / columns, h = canvas.height / rows;
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.imageSmoothingEnabled = false;
    const place = (i) => [(i % columns) * w, Math.floor(i / columns) * h];
    return { c, w, h, rows, columns, place, size, pixel: devicePixelRatio };
}

const tokenColour = (token) => `hsl(${(token * 137.508) % 360} ${50 + (token % 3) * 15}% ${30 + (token % 5) * 5}%)`;

// A token's number on its colour, if there is room
function drawCode({ c, w, h, place, pixel }, token, i) {
    const [left, top] = place(i);
    c.fillStyle = tokenColour(token);
    c.fillRect(left, top, w + 1, h + 1);
    if (w < 26 * pixel) return;
    c.fillStyle = "#fff";
    c.shadowColor = "#000";
    c.shadowBlur = 3 * pixel;
    c.font = `${w / 3.6}px system-ui, sans-serif`;
    c.textAlign = "center";
    c.textBaseline = "middle";
    c.fillText(String(token), left + w / 2, top + h / 2);
    c.shadowBlur = 0;
}

function drawLines({ c, w, h, rows, columns, size, pixel }) {
    c.fillStyle = "rgba(128, 128, 128, 0.5)";
    for (let i = 1; i < columns; i++) c.fillRect(Math.round(i * w), 0, pixel, size);
    for (let i = 1; i < rows; i++) c.fillRect(0, Math.round(i * h), size, pixel);
}

// A corner: this token changed. With an edge, to be seen on any picture.
function drawCorner({ c, w, place, pixel }, i) {
    const [left, top] = place(i);
    for (const [colour, side] of [["#fff", w / 4 + 2 * pixel], ["#e6007e", w / 4]]) {
        c.fillStyle = colour;
        c.beginPath();
        c.moveTo(left, top), c.lineTo(left + side, top), c.lineTo(left, top + side);
        c.fill();
    }
}

function drawChosen({ c, w, h, place, pixel }) {
    if (learn.cell < 0) return;
    const [left, top] = place(learn.cell);
    for (const [colour, width] of [["#000", 7 * pixel], ["#fff", 3 * pixel]]) {
        c.strokeStyle = colour;
        c.lineWidth = width;
        c.strokeRect(left + 2 * pixel, top + 2 * pixel, w - 4 * pixel, h - 4 * pixel);
    }
}

// The picture of these tokens, if there is one, else each token in a colour of its own
function drawTokens(canvas, image, tokens, before) {
    const cells = cellsOf(canvas);
    if (!cells) return;
    if (image && !$("learn-codes").checked) cells.c.drawImage(image, 0, 0, cells.size, cells.size);
    else tokens.forEach((token, i) => drawCode(cells, token, i));
    drawLines(cells);
    if (before) tokens.forEach((token, i) => token !== before[i] && drawCorner(cells, i));
    drawChosen(cells);
}

function drawLearn() {
    const { details, steps, at } = learn, step = steps[at];
    if (!details || !step.told) return;
    $("chain").classList.toggle("fine", details.grid[1] > 8);
    drawTokens($("chain-before"), at > 0 ? steps[at - 1].image : null, step.told.before, null);
    drawTokens($("chain-after"), step.image, step.told.tokens, step.told.before);
    drawHeat();
}

// From sure to unsure: black, violet, orange, yellow
function heatColour(x) {
    const stops = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
    const at = clamp(x, 0, 1) * 4, i = Math.min(3, Math.floor(at));
    return stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * (at - i)));
}

function drawHeat() {
    const { entropy } = learn.details, { image } = learn.steps.at(-1), cells = cellsOf($("heat"));
    if (!cells) return;
    const { c, w, h, place, size } = cells, highest = Math.max(0.1, ...entropy);
    const overPicture = $("heat-picture").checked && image !== null;
    $("heat-picture").disabled = image === null;
    if (overPicture) c.drawImage(image, 0, 0, size, size);
    c.globalAlpha = overPicture ? 0.7 : 1;
    entropy.forEach((bits, i) => {
        c.fillStyle = `rgb(${heatColour(bits / highest)})`;
        c.fillRect(...place(i), w, h);
    });
    c.globalAlpha = 1;
    drawChosen(cells);
    const legend = $("heat-legend").getContext("2d");
    for (let i = 0; i < 256; i++) (legend.fillStyle = `rgb(${heatColour(i / 255)})`), legend.fillRect(i, 0, 1, 1);
    $("heat-most").textContent = `${shown(highest, 3)} bits`;
}

const placeText = (cell) => {
    const columns = learn.details.grid[1];
    return `Row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
};

function sayHeat() {
    const { details, cell, picture } = learn;
    if (!details) return;
    const K = modelOf(picture.run.job.model).codebook, bits = details.entropy, mean = bits.reduce((a, b) => a + b, 0) / bits.length;
    $("heat-text").textContent = cell < 0
        ? `Mean ${shown(mean, 3)} bits, most ${shown(Math.max(...bits), 3)}; blind guessing among ${K} would have ` +
          `${shown(Math.log2(K), 3)}. The picture’s bound: ${nats(details.bound)} per token. ` +
          "Choose a token: by click or with the arrow keys."
        : `${placeText(cell)}: token ${details.tokens[cell]} of ${K}. ` +
          `Entropy ${shown(bits[cell], 3)} bits: ${bits[cell] < 0.05 ? "it was sure" : `as unsure as among ${shown(2 ** bits[cell], 3)} equally likely ones`}.`;
}

// What xₜ₋₁ can be, with its probability and whether it was drawn
function posteriorRows({ scale, told }, cell) {
    const from = told.before[cell], drawn = told.tokens[cell], clean = learn.details.tokens[cell], { K } = scheduleAt(scale);
    const isSame = from === clean, others = K - (isSame ? 1 : 2), elsewhere = told.elsewhere[cell];
    const rows = isSame
        ? [[`${from}, as in ${xOf(scale)} and in x₀`, told.at_xt[cell], drawn === from]]
        : [[`${from}, as in ${xOf(scale)}: it stays`, told.at_xt[cell], drawn === from],
           [`${clean}, as in x₀`, told.at_x0[cell], drawn === clean]];
    rows.push([`one of the other ${others}, each ${percent(elsewhere / others)}`, elsewhere, drawn !== from && drawn !== clean]);
    return rows;
}

function sayToken() {
    const step = learn.steps[learn.at], { scale, told } = step, { cell } = learn, chosen = told && cell >= 0;
    const { K, beta, alphaBefore } = scheduleAt(scale);
    $("formula-values").textContent =
        `Here t = ${scale}, K = ${K}, β${subscript(scale)} = ${shown(beta)}, ᾱ${subscript(scale - 1)} = ${shown(alphaBefore)}.`;
    $("posterior").hidden = !chosen;
    if (!chosen) return ($("token-text").textContent = "Choose a token in one of the grids.");
    const rows = posteriorRows(step, cell), clean = learn.details.tokens[cell];
    $("token-text").textContent =
        `${placeText(cell)}: from ${told.before[cell]} in ${xOf(scale)} the network drew ${told.tokens[cell]} for ${xOf(scale - 1)}; x₀ has ${clean}.`;
    $("posterior-title").textContent = `q(${xOf(scale - 1)} | ${xOf(scale)}, x₀)`;
    $("posterior").tBodies[0].replaceChildren(...rows.map(([name, p, isDrawn]) => {
        const row = element("tr", { className: isDrawn ? "drawn" : "" },
            element("th", { scope: "row", textContent: isDrawn ? `${name} (drawn)` : name }), element("td", { textContent: percent(p) }));
        row.style.setProperty("--share", `${100 * p}%`);
        return row;
    }));
}

function chooseCell(cell) {
    learn.cell = clamp(cell, 0, learn.details.tokens.length - 1);
    drawLearn();
    sayToken();
    sayHeat();
}

// A click chooses the token there; arrow keys go to the next.
function startCells(canvas) {
    canvas.onclick = (e) => {
        if (!learn.details) return;
        const r = canvas.getBoundingClientRect(), [rows, columns] = learn.details.grid;
        const at = (share, n) => clamp(Math.floor(share * n), 0, n - 1);
        chooseCell(at((e.clientY - r.top) / r.height, rows) * columns + at((e.clientX - r.left) / r.width, columns));
    };
    canvas.onkeydown = (e) => {
        if (!ARROWS[e.key] || !learn.details) return;
        const [dx, dy] = ARROWS[e.key], [rows, columns] = learn.details.grid, { cell } = learn;
        const column = clamp((cell % columns) + dx, 0, columns - 1), row = clamp(Math.floor(cell / columns) + dy, 0, rows - 1);
        chooseCell(cell < 0 ? 0 : row * columns + column);
        e.preventDefault();
    };
}

// Steps by keys, those of a presenter's remote control too
function onLearnKey(e) {
    const isPage = e.key === "PageUp" || e.key === "PageDown", by = { ArrowLeft: -1, PageUp: -1, ArrowRight: 1, PageDown: 1 }[e.key];
    if (!by || $("learn").hidden || !learn.steps.length || $("viewer").open || e.ctrlKey || e.altKey || e.metaKey) return;
    if (!isPage && e.target.matches("input, select, canvas, [role=tab]")) return; // they have arrow keys of their own
    stopFilm();
    showStep(learn.at + by);
    e.preventDefault();
}

// One picture of the model that is chosen in Sample, to begin with
function drawToLearn() {
    const run = newRun("sample", { kind: "sample", model: sampleForm.model.value, count: 1, owned: true });
    run.isToLearn = true;
    return start(run, null, sampleForm);
}

function showLearnState(run) {
    $("learn-draw").disabled = !isOver(run);
    $("learn-draw-state").textContent = stateText(run);
    $("learn-draw-state").classList.toggle("error", run.state === "failed");
}

function startLearn() {
    $("learn-draw").onclick = drawToLearn;
    $("learn-step").oninput = (e) => (stopFilm(), showStep(Number(e.target.value)));
    $("learn-back").onclick = () => (stopFilm(), showStep(learn.at - 1));
    $("learn-forth").onclick = () => (stopFilm(), showStep(learn.at + 1));
    $("learn-play").onclick = playChain;
    $("learn-full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("learn-body").requestFullscreen());
    $("learn-full").hidden = !document.fullscreenEnabled;
    addEventListener("fullscreenchange", () => ($("learn-full").textContent = document.fullscreenElement ? "Leave full screen" : "Full screen"));
    $("learn-codes").onchange = $("heat-picture").onchange = drawLearn;
    for (const id of ["chain-before", "chain-after", "heat"]) startCells($(id));
    new ResizeObserver(drawLearn).observe($("chain"));
    addEventListener("keydown", onLearnKey);
}

// ---- Tabs, files that are dropped or pasted, the beginning ----

const TABS = ["sample", "edit", "learn"];
let sampleForm;

function selectTab(name) {
    tabShown = name;
    showSaid();
    for (const tab of TABS) {
        $(tab).hidden = tab !== name;
        $(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
        $(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
    }
    if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
    draw();
}

function startTabs() {
    TABS.forEach((tab, i) => {
        $(`tab-${tab}`).onclick = () => selectTab(tab);
        $(`tab-${tab}`).onkeydown = (e) => {
            const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
            if (!by) return;
            const next = TABS[(i + by + TABS.length) % TABS.length];
            selectTab(next);
            $(`tab-${next}`).focus();
        };
    });
    if (TABS.includes(location.hash.slice(1))) selectTab(location.hash.slice(1));
}

// Which part an edit drew anew, if its picture says it; a painted mask it does not have.
function takeRegion(job) {
    const name = ["half", ...SIZED].find((n) => job[n] !== undefined);
    if (!edit.mask || !name) return;
    if (name !== "extend") $("paste").checked = job.paste;
    setShape({ [name]: job[name] });
}

// Sample: a PNG that was drawn here fills the form.
async function readSettings(file) {
    if ((await kindOf(file)) !== "png") return say(`${file.name} is no PNG: only PNGs that were drawn here hold their settings.`, true);
    try {
        const job = await call("api/settings", { method: "POST", body: file });
        const isEdit = job.kind === "inpaint";
        selectTab(isEdit ? "edit" : "sample");
        fillForm(isEdit ? editForm : sampleForm, job);
        if (isEdit) takeRegion(job);
        say(`The settings of ${file.name}.`);
    } catch (error) {
        say(`${file.name}: ${error.message}`, true);
    }
}

// A file that comes by drop or paste: in Sample its settings, else the picture to edit
function receive(data) {
    const file = [...data.files][0];
    if (!file) return say("That is not a file: save the picture first, then drop the file.", true);
    if (!$("sample").hidden) readSettings(file);
    else selectTab("edit"), openPicture(file);
}

async function runSample() {
    const job = readForm(sampleForm);
    if (!job) return;
    if (runs.filter((r) => !isOver(r)).length >= 3) return say("Three of your jobs wait already.", true);
    const run = newRun("sample", { ...job, owned: true });
    const started = start(run, null, sampleForm);
    if (run.card.getBoundingClientRect().top > innerHeight / 2) bringIntoView(run.card, "start");
    await started;
}

function startSample() {
    sampleForm = settingsOf("sample", $("sample-settings"), () => sampleForm && previewCommand(sampleForm, $("sample-command")));
    $("sample-form").onsubmit = (e) => (e.preventDefault(), runSample());
    $("sample-settings-file").onchange = (e) => {
        if (e.target.files[0]) readSettings(e.target.files[0]);
        e.target.value = "";
    };
}

// After a reload: the jobs of this visit, as far as the server still knows them
function comeBack() {
    for (const { id, kind } of JSON.parse(sessionStorage.getItem("runs") || "[]")) {
        const run = newRun(kind, { count: 0 });
        run.id = id;
        runs.unshift(run);
        showCard(run);
        recover(run).then(() => run.command || removeRun(run)); // what the server has forgotten was said
    }
}

async function begin() {
    startTabs();
    startViewer();
    startSample();
    startEdit();
    startLearn();
    addEventListener("dragover", (e) => e.preventDefault());
    addEventListener("drop", (e) => (e.preventDefault(), receive(e.dataTransfer)));
    addEventListener("paste", (e) => {
        if (!e.target.matches("input, textarea") && e.clipboardData.files.length) receive(e.clipboardData);
    });
    try {
        const [health, list] = await Promise.all([call("api/health"), call("api/models")]);
        models = list.models;
        most = health.most;
        $("server").textContent = `${health.device}, ${health.arithmetic}, ${plural(health.threads, "thread", "threads")}`;
        setModels(sampleForm);
        setModels(editForm);
        comeBack();
    } catch (error) {
        say(error.message, true);
    }
}

begin();
