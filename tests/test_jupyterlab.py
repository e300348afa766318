"""What a newcomer does first: open a notebook in JupyterLab, choose Run All, move a slider, press Run."""

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
from textwrap import dedent

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


@contextmanager
def opened(url, path):
    """A page of the notebook, its kernel ready, all cells run; saved at the end."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        # A workspace of its own, or the notebook opened before would come back as well.
        page.goto(f"{url}/lab/workspaces/{Path(path).stem}/tree/{path}")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell .jp-InputPrompt", timeout=60_000)
        # Asked to run before its kernel is connected, JupyterLab would ask which kernel to take.
        page.wait_for_selector("#jp-main-statusbar >> text=| Idle", timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(SETTLED, timeout=RUN_ALL_SECONDS * 1000)
        yield page
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-dirty", state="detached", timeout=30_000)
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks: its address and the folder."""
    home = tmp_path_factory.mktemp("jupyterlab")
    shutil.copytree(ROOT / "nbs", home / "lab" / "nbs",
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "results", home / "lab" / "results")
    with jupyterlab(home / "lab", home / "home") as url:
        yield url, home / "lab"


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]


def at_smoke_scale(path):
    """The notebook's live run with the paper's smoke configuration."""
    notebook = json.loads(path.read_text())
    [cell] = [cell for cell in notebook["cells"] if "small_config = " in "".join(cell["source"])]
    cell["source"] = ["".join(cell["source"]) + "\nsmall_config = Config.smoke()"]
    for cell in notebook["cells"]:  # so that whatever is found was made here
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    path.write_text(json.dumps(notebook))


def test_run_all_in_the_browser(lab):
    url, folder = lab
    path = "nbs/papers/01_bspo.ipynb"
    at_smoke_scale(folder / path)
    with opened(url, path) as page:
        verdicts = page.locator("table.claims td.verdict").all_inner_texts()
        aligned = page.locator("table.claims td").first.evaluate("td => getComputedStyle(td).textAlign")
        figures = page.locator(".jp-OutputArea img[src^='data:image/png']").count()
        sliders = page.locator(".widget-slider").count()
        choices = page.locator(".widget-dropdown select option").all_inner_texts()
    cells = code_cells(folder / path)
    errors = ["\n".join(output["traceback"]) for cell in cells for output in cell["outputs"]
              if output["output_type"] == "error"]
    assert not errors, errors[0]
    assert all(cell["execution_count"] for cell in cells)
    assert any("reproduced" in verdict for verdict in verdicts) and aligned == "left"
    assert figures >= 3 and sliders == 2 and choices == ["S", "I"]


EXPLORED = """
    import tempfile, time
    from alignkit import report, runs
    from alignkit.explore import explore

    @runs.stage()
    def rise(work):
        for step in range(1, 7):
            work.progress(step, 6, height=work.config["slope"] * step)
            time.sleep(0.3)
        return runs.Result()

    def one_seed(slope=1.0, kind="even"):
        print(f"slope {slope:g}, {kind}")
        with tempfile.TemporaryDirectory() as folder, report.LiveCurves("height", every=0.2) as live:
            runs.run([runs.Job("demo", rise, "arm", 0, {"slope": slope})], folder, processes=1,
                     on_progress=live)
        print(f"ended at {live.points['height']['arm'][-1][1]:g}")
        if kind == "failing":
            raise RuntimeError("on purpose")

    explore(one_seed, slope=(0.0, 4.0), kind=("even", "failing"))
"""
# Every picture that the output area of the controls ever shows.
WATCH = """() => {
  window.pictures = new Set();
  const look = () => document.querySelectorAll('.widget-output img')
    .forEach(image => window.pictures.add(image.src));
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def test_a_slider_and_a_button_run_again_and_the_curve_grows(lab):
    url, folder = lab
    source = dedent(EXPLORED).strip()
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
            "source": source}
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (folder / "explored.ipynb").write_text(json.dumps(
        {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    with opened(url, "explored.ipynb") as page:
        page.get_by_text("slope 1, even").wait_for(timeout=30_000)
        page.evaluate(WATCH)
        shown = page.locator(".widget-output").last
        readout = page.locator(".widget-slider .widget-readout")
        readout.click()
        page.keyboard.press("Control+a")
        page.keyboard.type("3.2")
        page.keyboard.press("Enter")
        button = page.get_by_role("button", name="Run", exact=True)
        button.click()
        shown.get_by_text("ended at 19.2").wait_for(timeout=30_000)
        assert page.evaluate("window.pictures.size") >= 3
        page.locator(".widget-dropdown select").select_option("failing")
        button.click()
        shown.get_by_text("RuntimeError: on purpose").first.wait_for(timeout=30_000)
        page.wait_for_function(
            "() => !document.querySelector('.widget-button').disabled", timeout=30_000)
    [cell] = code_cells(folder / "explored.ipynb")
    assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
