"""What a newcomer does first: open a notebook in JupyterLab and choose Run All."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
# Every cell in the page at once (so that each prompt can be read), and no news from the network.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
RUN_ALL_SECONDS = 240

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} on PATH"),
    pytest.mark.timeout(RUN_ALL_SECONDS + 120),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def jupyterlab(folder, home):
    """A JupyterLab server on `folder` that keeps its settings and kernels' files in `home`."""
    for name, values in SETTINGS.items():
        path = home / f"@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
               f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--allow-root", f"--ServerApp.root_dir={folder}"]
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home),
                        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    log = home / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=env)
    try:
        deadline = time.monotonic() + 90
        while not answers(f"http://127.0.0.1:{port}/api"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


# Run All marks every cell with a star; a number takes its place, or nothing once a cell has failed.
SETTLED = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.innerText);
  return prompts.some(text => /[0-9]/.test(text)) && !prompts.some(text => text.includes('*'));
}"""


def run_all(url, path):
    """Open the notebook, Run All, wait until no cell is waiting any more, save."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{url}/lab/tree/{path}")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell .jp-InputPrompt", timeout=60_000)
        # Asked to run before its kernel is connected, JupyterLab would ask which kernel to take.
        page.wait_for_selector("#jp-main-statusbar >> text=| Idle", timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(SETTLED, timeout=RUN_ALL_SECONDS * 1000)
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-dirty", state="detached", timeout=30_000)
        browser.close()


def test_run_all_in_the_browser(tmp_path):
    path = "nbs/papers/01_bspo.ipynb"
    shutil.copytree(ROOT / "nbs", tmp_path / "lab" / "nbs")
    shutil.copytree(ROOT / "results", tmp_path / "lab" / "results")
    with jupyterlab(tmp_path / "lab", tmp_path / "home") as url:
        run_all(url, path)
    cells = json.loads((tmp_path / "lab" / path).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]
    outputs = [output for cell in code for output in cell["outputs"]]
    errors = ["\n".join(output["traceback"]) for output in outputs if output["output_type"] == "error"]
    assert not errors, errors[0]
    assert all(cell["execution_count"] for cell in code)
    assert any("image/png" in output.get("data", {}) for output in outputs)
