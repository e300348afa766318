"""The worked examples of CONTRIBUTING.md, followed to the letter in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def example(name):
    _, _, rest = TEXT.partition(f"<!-- {name}: begin")
    code = re.search(r"```python\n(.*?)```", rest, re.DOTALL)
    return code[1]


@pytest.fixture
def copy(tmp_path):
    "What an author works on: sources and settings, without history and results."
    for name in ("nbs", "alignkit", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(folder, *command):
    # a symbolic link would find the checkout's own package first
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bring_in(folder, code, notebook):
    "As CONTRIBUTING says: text to notebook, run it, export."
    script = folder / "example.py"
    script.write_text(code)
    tools = Path(sys.executable).parent
    run(folder, tools / "jupytext", "--to", "ipynb", script, "-o", folder / notebook)
    run(folder, sys.executable, "-c",
        f"from nbdev.export import nb_export; nb_export({notebook!r}, lib_path='alignkit')")
    run(folder, tools / "nbdev-test", notebook, "--n-workers", "1")


def alignkit(folder, *arguments):
    code = "import sys; from alignkit.cli import main; sys.exit(main(sys.argv[1:]))"
    return run(folder, sys.executable, "-c", code, *arguments)


def test_the_minimal_paper_runs_and_its_claim_is_decided(copy):
    bring_in(copy, example("paper"), "nbs/papers/06_navab.ipynb")
    alignkit(copy, "run", "navab", "--scale", "smoke", "--seeds", "1", "--first-seed", "0",
             "--out", "smoke")
    shown = alignkit(copy, "run", "navab", "--seeds", "10", "--out", "results/navab-try")
    assert "reproduced" in shown and "8a.1" in shown
    results = json.loads((copy / "results/navab-try/navab.json").read_text())
    [claim] = results["claims"]
    assert claim["verdict"] == "reproduced" and len(claim["per_seed"]) == 10
    assert "report.html" in shown and (copy / "results/navab-try/report.html").exists()


def test_the_minimal_operator_is_registered_checked_and_compiles(copy):
    bring_in(copy, example("operator"), "nbs/kernels/03_discounted.ipynb")
    run(copy, sys.executable, "-c", """
import torch
from alignkit.ops.discounted import discounted_sum, discounted_sum_reference
x = torch.randn(3, 5)
exact = discounted_sum_reference(x.double(), 0.9)
assert torch.allclose(discounted_sum(x, 0.9).double(), exact, atol=1e-6)
torch.library.opcheck(torch.ops.alignkit.discounted_sum.default, (x, 0.9, None))
compiled = torch.compile(lambda x: discounted_sum(x, 0.9), fullgraph=True, backend="eager")
assert torch.equal(compiled(x), discounted_sum(x, 0.9))
for wrong, name in ((x[0], "rewards"), (x.long(), "rewards")):
    try:
        discounted_sum(wrong)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"{name}: expected"), error
    else:
        raise AssertionError(name)
""")
