"""fetch_server.py FOLDER PORT_FILE: a web server on a free local port, written into PORT_FILE, for test_fetch.sh.

The first part of a path says how it serves the files of FOLDER:
    good       Content-Length and ranges           plain   no ranges, as python3 -m http.server
    cut        breaks off in the middle, each time  silent  neither Content-Length nor ranges
    slow       half of it, and then nothing for a minute
    html, lfs  a page, a git-lfs pointer, with status 200; anything else: 404
FOLDER/log gets a line per GET: path, first byte, bytes sent.
"""

import http.server
import os
import re
import sys
import time

FOLDER, PORT_FILE = sys.argv[1:]
INSTEAD = {
    "html": b"<!DOCTYPE html>\n<html><body>please log in</body></html>\n",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def find(self):
        kind, _, name = self.path.lstrip("/").partition("/")
        path = os.path.join(FOLDER, os.path.basename(name))
        if kind in INSTEAD:
            return kind, INSTEAD[kind]
        if kind in ("good", "plain", "cut", "silent", "slow") and os.path.isfile(path):
            with open(path, "rb") as f:
                return kind, f.read()
        return kind, None

    def answer(self, with_body):
        kind, data = self.find()
        if data is None:
            return self.send_error(404)
        begin, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and kind in ("good", "cut", "slow"):
            begin = int(asked[1])
        if begin and begin >= len(data):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        if kind != "silent":
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if with_body:
            body = data[begin : begin + (len(data) - begin) // 2 if kind in ("cut", "slow") else None]
            with open(os.path.join(FOLDER, "log"), "a") as log:
                log.write(f"{self.path} {begin} {len(body)}\n")
            self.wfile.write(body)
            self.wfile.flush()
            if kind == "slow":
                time.sleep(60)

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(PORT_FILE + ".tmp", "w") as f:
    f.write(str(server.server_port))
os.rename(PORT_FILE + ".tmp", PORT_FILE)
server.serve_forever()
