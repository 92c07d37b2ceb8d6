"""fetch_server.py FOLDER PORT_FILE [PEM]: a web server on a free local port, written into PORT_FILE, for test_fetch.sh.
With PEM (a certificate and its key) there is another one for https, whose port is the file's second line.

The first part of a path says how it serves the files of FOLDER:
    good       Content-Length and ranges           plain   no ranges, as python3 -m http.server
    cut        breaks off in the middle, each time  silent  neither Content-Length nor ranges
    slow       half of it, and then nothing for a minute
    old, new   with ETags of their own, new has the files of FOLDER/new; oldcut breaks off like cut
    away       sends to good, by http; around: to good on the same server
    html, lfs  a page, a git-lfs pointer, with status 200; anything else: 404
FOLDER/log gets a line per GET: path, first byte, bytes sent.
"""

import http.server
import os
import re
import ssl
import sys
import threading
import time

FOLDER, PORT_FILE, *PEM = sys.argv[1:]
INSTEAD = {
    "html": b"<!DOCTYPE html>\n<html><body>please log in</body></html>\n",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def find(self):
        kind, _, name = self.path.lstrip("/").partition("/")
        path = os.path.join(FOLDER, "new" if kind == "new" else "", os.path.basename(name))
        if kind in INSTEAD:
            return kind, INSTEAD[kind]
        if kind in ("good", "plain", "cut", "silent", "slow", "old", "oldcut", "new") and os.path.isfile(path):
            with open(path, "rb") as f:
                return kind, f.read()
        return kind, None

    def answer(self, with_body):
        kind, data = self.find()
        if kind in ("away", "around"):
            self.send_response(302)
            where = f"http://127.0.0.1:{server.server_port}" if kind == "away" else ""
            self.send_header("Location", where + self.path.replace(kind, "good", 1))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if data is None:
            return self.send_error(404)
        tag = {"old": '"old"', "oldcut": '"old"', "new": '"new"'}.get(kind)
        begin, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and (kind in ("good", "cut", "slow") or tag and self.headers.get("If-Range") == tag):
            begin = int(asked[1])
        if begin and begin >= len(data):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if tag:
            self.send_header("ETag", tag)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        if kind != "silent":
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if with_body:
            body = data[begin : begin + (len(data) - begin) // 2 if kind in ("cut", "oldcut", "slow") else None]
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
ports = [server.server_port]
if PEM:
    secure = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM[0])
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    ports.append(secure.server_port)
    threading.Thread(target=secure.serve_forever, daemon=True).start()
with open(PORT_FILE + ".tmp", "w") as f:
    f.write("".join(f"{port}\n" for port in ports))
os.rename(PORT_FILE + ".tmp", PORT_FILE)
server.serve_forever()
