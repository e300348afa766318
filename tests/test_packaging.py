"""What `pip install` gives a stranger: sdist and wheel, in clean environments outside the checkout.

A clean environment here is a new venv that holds the wheel and, linked from this environment, exactly
the distributions that the wheel's metadata asks for: what pip would have fetched, without the gigabytes.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["alignkit", "csrc", "nbs", "results", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml",
         "settings.ini", "constraints.txt", "setup.py"]
BUILT_HERE = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", ".ipynb_checkpoints")
pytestmark = pytest.mark.timeout(600)


def run(*command, cwd, check=True, **env):
    """Run outside the checkout, and without its folder on the path."""
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True,
                          capture_output=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The sdist, and the wheel built from it. Without CUDA: nvcc takes longer than the rest together."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=BUILT_HERE)
        else:
            shutil.copy(ROOT / part, source / part)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist,
        ALIGNKIT_CUDA="0")
    return dist


def asked_for(requirements, extras=()):
    """The distributions here that meet these requirements, and theirs."""
    found = {}
    queue = [(Requirement(r), extras) for r in requirements]
    while queue:
        requirement, extras = queue.pop()
        markers = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker and not any(requirement.marker.evaluate(m) for m in markers):
            continue
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = metadata.distribution(requirement.name)
            queue += [(Requirement(r), requirement.extras) for r in found[key].requires or ()]
    return found.values()


def link(distribution, site):
    """Make a distribution of this environment importable from another's site-packages."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(distribution.locate_file(top))


def clean_environment(folder, wheel, *extras):
    """A new environment with `pip install 'alignkit[extras]'` from the wheel; returns its bin folder."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", wheel, cwd=folder)
    site = next(folder.glob("lib/python*/site-packages"))
    installed = metadata.Distribution.at(next(site.glob("alignkit-*.dist-info")))
    for distribution in asked_for(installed.requires, extras):
        link(distribution, site)
    return python.parent


@pytest.fixture(scope="session")
def base(dist, tmp_path_factory):
    return clean_environment(tmp_path_factory.mktemp("base") / "venv", next(dist.glob("*.whl")))


@pytest.fixture(scope="session")
def llm(dist, tmp_path_factory):
    return clean_environment(tmp_path_factory.mktemp("llm") / "venv", next(dist.glob("*.whl")), "llm")


def test_sdist_can_build_everything(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*")
               if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py")}
    assert sources | {"settings.ini", "constraints.txt", "LICENSE"} <= names


def test_wheel_holds_the_package_and_nothing_else(dist):
    wheel = next(dist.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"alignkit/py.typed", "alignkit/cli.py", "alignkit/_triton/__init__.py"} <= set(names)
    assert any(name.startswith("alignkit/_cpu.") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"alignkit"}
    assert not [name for name in names if name.endswith((".pth", ".ipynb", ".pkl"))]


def test_committed_results_ship(dist):
    committed = {f"alignkit/_results/{path.name}" for path in ROOT.glob("results/*.json")}
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        assert committed <= set(archive.namelist())


def test_base_install_has_operators_and_a_doctor(base, tmp_path):
    code = ("import torch, alignkit.ops as ops; ones = torch.ones(1, 2);"
            "print(ops.gae(ones, torch.zeros(1, 3), ones, backend='cpu'))")
    run(base / "python", "-c", code, cwd=tmp_path)
    report = json.loads(run(base / "alignkit", "doctor", "--json", cwd=tmp_path).stdout)
    usable = {backend["name"]: backend["usable"] for backend in report["backends"]}
    assert usable["reference"] and usable["cpu"]
    assert report["extras"]["llm"]["missing"]
    assert any("pip install 'alignkit[llm]'" in problem["remedy"] for problem in report["problems"])


def test_base_install_names_the_extra_that_the_rest_needs(base, tmp_path):
    done = run(base / "alignkit", "run", "bspo", "--scale", "smoke", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install 'alignkit[llm]'" in done.stderr and "Traceback" not in done.stderr
    for room in ("data", "worlds", "models", "generate", "rl", "papers.bspo"):
        done = run(base / "python", "-c", f"import alignkit.{room}", cwd=tmp_path, check=False)
        assert done.returncode == 0 or "pip install 'alignkit[llm]'" in done.stderr, room


def test_smoke_run_of_the_installed_wheel(llm, tmp_path):
    report = json.loads(run(llm / "alignkit", "doctor", "--json", cwd=tmp_path).stdout)
    assert not report["extras"]["llm"]["missing"]
    done = run(llm / "alignkit", "run", "bspo", "--scale", "smoke", "--seeds", "1", cwd=tmp_path)
    results = json.loads((tmp_path / "runs/bspo/smoke/bspo.json").read_text())
    assert results["claims"] and {c["verdict"] for c in results["claims"]} <= {"not tested", "reported"}
    assert (tmp_path / "runs/bspo/smoke/report.html").exists()
    assert "not tested" in done.stdout
