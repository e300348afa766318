"""Builds alignkit's kernels: C++ always, CUDA where nvcc is; plain Python where neither is.

ALIGNKIT_CUDA=0 leaves CUDA out, ALIGNKIT_CUDA=1 makes a missing nvcc an error.
"""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

WANT_CUDA = os.environ.get("ALIGNKIT_CUDA")
CONFIG = ConfigParser(interpolation=None)
CONFIG.read("settings.ini", encoding="utf-8")
SETTINGS, NATIVE = CONFIG["DEFAULT"], CONFIG["native"]
CUDA_SOURCES = sorted(glob(NATIVE["cuda_sources"]))
# GCC vectorises a comparison only where it cannot trap, a square root only where it need not set
# errno; no result depends on either.
FLAGS = ["-O3", "-fno-trapping-math", "-fno-math-errno", "-Wall", "-Wextra"] if os.name == "posix" else []
STRIP = ["-s"] if sys.platform == "linux" else []  # names inside an extension are a tenth of it


def lines(key):
    return [line for line in SETTINGS.get(key, "").splitlines() if line.strip()]


def extras():
    """Extra `llm` is the setting `llm_requirements`, and so on; `all` is what works side by side."""
    names = {"llm": "llm", "trl": "trl", "bench": "bench", "tensorboard": "tensorboard",
             "robots": "robots", "judges": "judges", "notebooks": "nb", "dev": "dev"}
    found = {extra: lines(f"{key}_requirements") for extra, key in names.items()}
    everything = sorted({line for group in found.values() for line in group})
    apart = {extra: lines(f"{extra}_requirements") for extra in ("trackio", "wandb")}
    return found | apart | {"all": everything}


def nvcc():
    """Path of nvcc, or None where CUDA is left out."""
    if WANT_CUDA == "0":
        return None
    path = shutil.which("nvcc")
    if path is None and WANT_CUDA == "1":
        raise SystemExit("ALIGNKIT_CUDA=1, but nvcc is not on PATH")
    return path


def cuda_home(compiler):
    """Folder of the toolkit. `nvcc` may be a wrapper script, so nvcc itself is asked."""
    dryrun = subprocess.run([compiler, "--dryrun", "x.cu"], capture_output=True, text=True)
    return Path(re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.MULTILINE)[1].strip())


def cpu_extension():
    return Pybind11Extension(
        "alignkit._cpu",
        sorted(glob(NATIVE["cpu_sources"])),
        depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h")],
        include_dirs=["csrc"],
        cxx_std=NATIVE.getint("cxx_std"),
        extra_compile_args=FLAGS,
        extra_link_args=STRIP,
        optional=True,  # without a compiler the reference serves
    )


def cuda_extension(compiler):
    home = cuda_home(compiler)
    libraries = next(d for d in (home / "lib64", home / "lib") if d.is_dir())
    return Pybind11Extension(
        "alignkit._cuda",
        sorted(glob(NATIVE["cuda_bindings"])),
        # without the .cu files, a changed one would not be linked again
        depends=[*glob("csrc/*.h"), *glob("csrc/cuda/*")],
        include_dirs=["csrc", str(home / "include")],
        library_dirs=[str(libraries)],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        cxx_std=NATIVE.getint("cxx_std"),
        extra_compile_args=FLAGS,
        extra_link_args=STRIP,
        optional=WANT_CUDA != "1",
    )


class BuildKernels(build_ext):
    """Compiles the .cu files with nvcc and hands their objects to the CUDA extension."""

    def build_extension(self, extension):
        if extension.name == "alignkit._cuda":
            extension.extra_objects = [self.cuda_object(s) for s in CUDA_SOURCES]
        super().build_extension(extension)

    def cuda_object(self, source):
        target = Path(self.build_temp, source).with_suffix(".o")
        self.mkpath(str(target.parent))
        archs = NATIVE["cuda_archs"].split()
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        options = ["-O3", f"-std=c++{NATIVE['cxx_std']}", "-Xcompiler=-fPIC", "-Icsrc"]
        self.spawn([NVCC, *options, *code, "-c", source, "-o", str(target)])
        return str(target)


NVCC = nvcc()

setup(
    version=SETTINGS["version"],
    install_requires=lines("requirements"),
    extras_require=extras(),
    packages=[
        *find_packages(include=["alignkit", "alignkit.*"]),
        "alignkit._triton",
        "alignkit._results",
    ],
    package_dir={
        "alignkit": "alignkit",
        "alignkit._triton": "csrc/triton",
        "alignkit._results": "results",
    },
    package_data={"alignkit": ["py.typed", "launch/*.yaml"], "alignkit._results": ["*.json", "*.jsonl.gz"]},
    ext_modules=[cpu_extension(), *([cuda_extension(NVCC)] if NVCC else [])],
    cmdclass={"build_ext": BuildKernels},
    zip_safe=False,
)
