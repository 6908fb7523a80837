"""Headless Chromium over its DevTools protocol: pages as people see them, at a width and in a colour scheme."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import websocket

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a person would trip over. A wide thing may scroll in a box that was made for it (data-scroll).
LOOK = """((wide) => {
  const found = [];
  if (document.scrollingElement.scrollWidth > wide) found.push(`page is ${document.scrollingElement.scrollWidth} px wide`);
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || !box.height || style.visibility === "hidden" || style.opacity === "0") continue;
    const what = `${e.tagName} ${(e.textContent || "").trim().slice(0, 40)}`;
    if ((box.right > wide + 1 || box.left < -1) && !e.closest("[data-scroll]")) found.push(`off screen: ${what}`);
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || ["STYLE", "SCRIPT"].includes(e.tagName)) continue;
    const svg = e.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < 10) found.push(`letters of ${size.toFixed(1)} px: ${what}`);
  }
  return found;
})"""


class Browser:
    """One Chromium with one page. `look` returns what is wrong with a file at a width and in a scheme."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [str(PROGRAM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-port=0", "--remote-allow-origins=*", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port, until = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            assert self._process.poll() is None, "Chromium ended at once"
            assert time.monotonic() < until, "Chromium did not start within a minute"
            time.sleep(0.05)
        number, path = port.read_text().split("\n")[:2]
        self._socket = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=60)
        self._count, self._events, self._session = 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._socket.close()
        self._process.terminate()
        self._process.wait(20)

    def call(self, method: str, **params) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def open(self, file: Path, width: int, scheme: str = "light", media: str = "") -> None:
        """Show a file and wait until it has loaded."""
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.call("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + 30
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < until, f"{file} did not load"
            time.sleep(0.02)

    def value(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def look(self, file: Path, width: int, scheme: str = "light", media: str = "") -> list[str]:
        self.open(file, width, scheme, media)
        found = list(self.value(f"{LOOK}({width})"))
        time.sleep(0.1)  # for the last events of a page that asks for something
        self.value("0")
        for event in self._events:
            method, params = event.get("method", ""), event.get("params", {})
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "about:")):
                    found.append(f"asks for {url}")
            elif method == "Runtime.exceptionThrown":
                found.append(f"error: {params['exceptionDetails'].get('text')}")
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(f"console: {params['args'][0].get('value')}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {params['entry']['text']}")
        return found

    def screenshot(self, to: Path, height: int | None = None) -> None:
        """Write what is shown, as tall as the page or as asked, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        to.write_bytes(base64.b64decode(data))
