"""How the kernels are built: with and without compilers, and what the results link to."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from ops_cases import require

from alignkit.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
SHOW = """
import json, sys
from distutils.core import run_setup
d = run_setup("setup.py", stop_after="init")
print(json.dumps({"extensions": [e.name for e in d.ext_modules], "packages": d.packages,
                  "extras": list(d.extras_require)}))
"""


def setup(*command, check=True, **env):
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=check,
                          capture_output=True, text=True)  # fmt: skip


def described(**env):
    return json.loads(setup("-c", "import setuptools\n" + SHOW, **env).stdout)


@pytest.fixture
def no_compilers(tmp_path):
    """A PATH with neither nvcc nor a C++ compiler."""
    return {"PATH": str(tmp_path), "CC": "missing-cc", "CXX": "missing-cxx"}


def test_cuda_is_left_out_without_nvcc_or_on_demand(no_compilers):
    assert described(ALIGNKIT_CUDA=None, **no_compilers)["extensions"] == ["alignkit._cpu"]
    assert described(ALIGNKIT_CUDA="0")["extensions"] == ["alignkit._cpu"]


def test_cuda_on_demand_without_nvcc_is_an_error(no_compilers):
    done = setup("setup.py", "--version", check=False, ALIGNKIT_CUDA="1", **no_compilers)
    assert done.returncode and "ALIGNKIT_CUDA=1, but nvcc is not on PATH" in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_is_built_where_nvcc_is():
    for want in (None, "1"):
        assert "alignkit._cuda" in described(ALIGNKIT_CUDA=want)["extensions"]


def test_install_succeeds_without_a_compiler(no_compilers, tmp_path):
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    done = setup("setup.py", "build_ext", *folders, ALIGNKIT_CUDA=None, **no_compilers)
    assert 'building extension "alignkit._cpu" failed' in done.stdout + done.stderr
    assert not list((tmp_path).rglob("*.so"))


def test_mapped_packages_are_packages():
    found = described(ALIGNKIT_CUDA="0")
    assert {"alignkit", "alignkit.ops", "alignkit._triton", "alignkit._results"} <= set(
        found["packages"]
    )
    assert {"llm", "notebooks", "dev", "all"} <= set(found["extras"])
    committed = {p.name for p in ROOT.glob("results/*.json*")}
    assert committed <= {p.name for p in files("alignkit._results").iterdir()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ldd")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_extensions_link_to_no_torch_and_no_cuda(name):
    try:
        module = dispatch.extension(name)
    except ImportError as error:
        pytest.skip(str(error))
    linked = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in linked.stdout.splitlines()]  # addresses may spell c10
    assert not [name for name in names if re.search("torch|c10|cuda|nvrtc", name)]
    assert Path(module.__file__).stat().st_size < {"cpu": 1e6, "cuda": 5e6}[name]


def test_cuda_imports_without_a_driver():
    try:
        module = dispatch.extension("cuda")
    except ImportError as error:
        pytest.skip(str(error))
    assert module.device_count() == torch.cuda.device_count()


def test_kernels_include_no_torch_header():
    sources = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) >= 8
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_bindings_refuse_what_no_kernel_could_read():
    require("cpu")
    gae = dispatch.extension("cpu").gae
    with pytest.raises(ValueError, match="sizes must not be negative"):
        gae(1, 1, 0, 0, 0, 0, 0, 0.0, 1.0, 1.0, 1, 0, -1, 3)
    with pytest.raises(ValueError, match="values must not be null"):
        gae(1, 0, 0, 0, 0, 0, 0, 0.0, 1.0, 1.0, 1, 0, 1, 3)
    with pytest.raises(ValueError, match="targets must not be null"):
        gae(1, 1, 0, 0, 0, 0, 1, 0.0, 1.0, 1.0, 1, 0, 1, 3)
    gae(0, 0, 0, 0, 0, 0, 0, 0.0, 1.0, 1.0, 0, 0, 0, 3)
