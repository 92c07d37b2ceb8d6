"""browser.py - headless Chromium through chromedriver, with nothing but the standard library."""
import base64
import json
import subprocess
import time
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A window of Chromium; everything by W3C WebDriver's calls, the DevTools' where that has none."""

    def __init__(self, folder):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = self.driver.stdout.readline()
        while "successfully on port" not in line:
            if not line:
                raise RuntimeError("chromedriver does not start")
            line = self.driver.stdout.readline()
        self.base = "http://127.0.0.1:" + line.split("on port ")[1].strip().rstrip(".")
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--user-data-dir=" + folder],
                   "prefs": {"download.default_directory": folder}}
        logs = {"browser": "ALL"}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}})
        self.base += "/session/" + answer["sessionId"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].split("\n")[0]) from None

    def open(self, address):
        self.call("POST", "/url", {"url": address})

    def js(self, script, *arguments):
        """What the script returns; of a promise what it becomes."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def value(self, expression):
        return self.js("return " + expression)

    def wait(self, expression, seconds=20):
        """Until the expression is true; its value, or None after that time."""
        end = time.time() + seconds
        while time.time() < end:
            value = self.value(expression)
            if value:
                return value
            time.sleep(0.05)
        return None

    def find(self, selector):
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.call("POST", "/element/" + self.find(selector) + "/click", {})

    def type(self, selector, text):
        self.call("POST", "/element/" + self.find(selector) + "/value", {"text": text})

    def devtools(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screen(self, width, height, ratio=1, mobile=False):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=mobile)

    def pointer(self, *sources):
        """Each source: (kind, steps); a step is (x, y) to move to, "down", "up" or a pause in ms; at the same time."""
        actions = []
        for i, (kind, steps) in enumerate(sources):
            listed = []
            for step in steps:
                if step in ("down", "up"):
                    listed.append({"type": "pointer" + step.capitalize(), "button": 0})
                elif isinstance(step, tuple):
                    listed.append({"type": "pointerMove", "duration": 0, "x": round(step[0]), "y": round(step[1]), "origin": "viewport"})
                else:
                    listed.append({"type": "pause", "duration": step})
            actions.append({"type": "pointer", "id": "%s%d" % (kind, i), "parameters": {"pointerType": kind}, "actions": listed})
        self.call("POST", "/actions", {"actions": actions})

    def keys(self, *keys):
        """Pressed together, then released"""
        down = [{"type": "keyDown", "value": k} for k in keys]
        up = [{"type": "keyUp", "value": k} for k in reversed(keys)]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": down + up}]})

    def wheel(self, x, y, delta):
        self.call("POST", "/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [
            {"type": "scroll", "x": round(x), "y": round(y), "deltaX": 0, "deltaY": delta, "duration": 0, "origin": "viewport"}]}]})

    def errors(self):
        """What the page's console says that is wrong, since the last call"""
        return [e["message"] for e in self.call("POST", "/se/log", {"type": "browser"}) if e["level"] == "SEVERE"]

    def shoot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
