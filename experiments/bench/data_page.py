"""Time and CPU of scrolling and filtering the page of `dit-booth data inspect` in Chromium.

    python experiments/bench/data_page.py DATA [--format videobooth] [--clips 1000]

The page's clips are DATA's, repeated with different measures, and their files with different bytes. Chromium runs
without a window and draws on the CPU. CPU time is that of all its processes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dit_booth.data.build.inspect import make_page

MARK = 'type="application/json">'
MEASURE = """
<script>
(async () => {
  const frame = () => new Promise(requestAnimationFrame);
  const mark = (name, values) => fetch("/mark", { method: "POST", body: JSON.stringify({ name, values }) });
  const spans = async (count, act) => {
    const out = [];
    for (let i = 0; i < count; i++) {
      const begin = performance.now();
      act(i);
      await frame();
      await frame();
      out.push(performance.now() - begin);
    }
    return out;
  };
  await frame();
  await mark("loaded", [performance.now()]);
  const steps = Math.min(120, Math.floor(document.documentElement.scrollHeight / 600));
  await mark("scroll", await spans(steps, (i) => scrollTo(0, 600 * (i + 1))));
  scrollTo(0, 0);
  await frame();
  await mark("back", []);
  const slider = document.querySelector(".dial input"), [low, high] = [Number(slider.min), Number(slider.max)];
  await mark("filter", await spans(20, (i) => {
    slider.value = low + (high - low) * (i + 1) / 40;
    slider.dispatchEvent(new Event("input"));
  }));
  await mark("show kept", await spans(10, (i) => {
    const show = document.getElementById("show");
    show.value = ["kept", "all"][i % 2];
    show.dispatchEvent(new Event("change"));
  }));
  await mark("end", []);
})();
</script>
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--format", default="videobooth")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--timeout", type=float, default=300)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    page = make_page(arguments.root, format=arguments.format, limit=arguments.clips, workers=1)
    page = repeat(page, arguments.clips).replace("</body>", MEASURE + "</body>")
    print(f"{arguments.clips} clips, {len(page) / 2**20:.0f} MiB")
    before = 0.0
    for name, values, cpu in watch(chromium, page, arguments.timeout):
        used = 1000 * (cpu - before) / max(1, len(values))
        before = cpu
        if values:
            high = sorted(values)[int(0.95 * (len(values) - 1))]
            print(
                f"{name:10} {len(values):4} times: median {statistics.median(values):6.0f} ms, 95 % {high:6.0f} ms;"
                f" CPU {used:6.0f} ms each"
            )


def repeat(page: str, count: int) -> str:
    """Return the page with `count` clips, made of its own with other measures and other files."""
    head, rest = page.split(MARK)
    text, tail = rest.split("</script>", 1)
    data, rng = json.loads(text), random.Random(0)
    rows = [dict(data["rows"][i % len(data["rows"])]) for i in range(count)]
    for number, row in enumerate(rows):
        row["videoid"] = f"{row['videoid']}-{number}"
        for field in ("area", "motion", "change", "sharpness"):
            row[field] *= rng.lognormvariate(0, 0.5)
        for field in ("clip", "still"):
            kind, content = row[field].split(",", 1)
            content = base64.b64encode(base64.b64decode(content) + number.to_bytes(4)).decode()
            row[field] = f"{kind},{content}"
    text = json.dumps({**data, "rows": rows}).replace("<", "\\u003c")
    return f"{head}{MARK}{text}</script>{tail}"


def watch(chromium: str, page: str, timeout: float) -> list[tuple[str, list[float], float]]:
    """Open the page; return its marks: name, milliseconds of each act, and CPU seconds of Chromium until then."""
    marks: list[tuple[str, list[float], float]] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            marks.append((body["name"], body["values"], cpu_seconds(browser.pid)))
            self.send_response(204)
            self.end_headers()
            if body["name"] == "end":
                done.set()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        url = f"http://127.0.0.1:{server.server_port}/"
        with subprocess.Popen(
            [chromium, *words, "--window-size=1280,900", url], stderr=subprocess.DEVNULL
        ) as browser:
            if not done.wait(timeout):
                print(f"gave up after {timeout:.0f} s")
            browser.terminate()
        server.shutdown()
    return marks


def cpu_seconds(root: int) -> float:
    """Return the CPU time of a process and its descendants that run."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(seconds for pid, seconds in used.items() if below(pid))


if __name__ == "__main__":
    main()
