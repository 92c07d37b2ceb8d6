"""How soon ./serve answers, beside ./sample in the same minutes:

    python3 test/latency.py BUILD [ROUNDS [MODEL [COUNT]]]     BUILD: the folder that holds serve and sample

first preview: from POST to the event; finished: from POST to the last event, and ./sample from its start to its end; cancel:
from DELETE, at any moment of a job, to the event that tells that the worker is free. Medians, and the worst cancel.
Processor seconds are told too: others who compute beside it do not change them.
"""
import http.client
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

TICK = os.sysconf("SC_CLK_TCK")


def cpu_of(pid):
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Server:
    def __init__(self, build, model):
        self.process = subprocess.Popen([build + "/serve", model, "--port", "0"], stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+)/", self.process.stdout.readline()).group(1))

    def call(self, method, path, body=None):
        c = http.client.HTTPConnection("127.0.0.1", self.port)
        c.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        return c.getresponse()

    def post(self, **job):
        return json.load(self.call("POST", "/api/jobs", json.dumps(job)))["id"]

    def events(self, job):
        """(time, type, data) of each, as they come"""
        kind = None
        for line in self.call("GET", "/api/jobs/%s/events" % job):
            if line.startswith(b"event: "):
                kind = line[7:].strip().decode()
            if line.startswith(b"data: "):
                yield time.time(), kind, line[6:]

    def end(self):
        self.process.terminate()
        return self.process.wait()


def draw(server, seed, count):
    """Seconds to the first preview and to the end, and of processors"""
    cpu, start, first = cpu_of(server.process.pid), time.time(), None
    for now, kind, _ in server.events(server.post(kind="sample", seed=seed, count=count)):
        first = first or (now - start if kind == "preview" else None)
    return first, now - start, cpu_of(server.process.pid) - cpu


def sample(build, model, seed, count):
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [build + "/sample", model, "-q", "-n", str(count), "--seed", str(seed), "-o", folder + "/a.png"], check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.time() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cancel(server, after, **job):
    job = server.post(**job)
    stream = server.events(job)
    for _, kind, _ in stream:
        if kind in ("progress", "preview"):
            break
    time.sleep(after)
    start = time.time()
    server.call("DELETE", "/api/jobs/" + job).read()
    last = [(now, kind) for now, kind, _ in stream][-1:] or [(start, "done")]
    return last[0][0] - start, last[0][1]


def main(build, rounds=9, model="emoji", count=1):
    server = Server(build, model)
    rows = {"first preview": [], "finished": [], "./sample": [], "cpu of serve": [], "cpu of ./sample": []}
    draw(server, 1, int(count))
    for seed in range(int(rounds)):
        values = draw(server, seed, int(count))
        other = sample(build, model, seed, int(count))
        for name, value in zip(rows, (values[0], values[1], other[0], values[2], other[1])):
            rows[name].append(value)
    for name, values in rows.items():
        print("%-16s %8.3f s  (%.3f to %.3f)" % (name, statistics.median(values), min(values), max(values)))
    random.seed(1)
    length = statistics.median(rows["finished"])
    took = [cancel(server, random.uniform(0, 4 * length), kind="sample", count=4) for _ in range(2 * int(rounds))]
    took = [seconds for seconds, end in took if end == "cancelled"]
    if took:
        print("%-16s %8.3f s  (at most %.3f of %d)" % ("cancel", statistics.median(took), max(took), len(took)))
    return server.end()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
