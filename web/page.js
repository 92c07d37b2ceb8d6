// The least that shows the calls at work: draws four pictures of the first model, with previews.
"use strict";
const says = document.getElementById("says"), pictures = document.getElementById("pictures");

function show(k, address) {
    while (pictures.children.length <= k) pictures.append(new Image());
    pictures.children[k].src = address;
}

async function draw() {
    const answer = await fetch("api/jobs", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ kind: "sample", count: 4, owned: true }),
    });
    const job = await answer.json();
    if (!answer.ok) return (says.textContent = job.error);
    const events = new EventSource(`api/jobs/${job.id}/events`);
    const on = (name, act) => events.addEventListener(name, (e) => act(JSON.parse(e.data)));
    on("queued", (e) => (says.textContent = `waiting, ${e.place} before it`));
    on("progress", (e) => (says.textContent = `scale ${e.scale} of ${e.scales}, token ${e.token} of ${e.tokens}`));
    on("preview", (e) => show(e.k, e.picture));
    on("done", (e) => {
        events.close();
        says.textContent = e.command;
        e.results.forEach((r, k) => show(k, r.picture));
    });
    on("failed", (e) => (events.close(), (says.textContent = e.error)));
    on("cancelled", () => (events.close(), (says.textContent = "cancelled")));
}

document.getElementById("draw").addEventListener("click", draw);
