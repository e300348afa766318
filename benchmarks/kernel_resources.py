"""Registers, spills and shared memory of every GPU kernel. No GPU is needed.

    python benchmarks/kernel_resources.py

Compiles csrc/cuda with nvcc as setup.py does, and Triton's kernels as the operators launch them at the shapes of
gpu_check.py, for the architectures of settings.ini; the assemblers' own reports become results/kernel_resources.json.
A compiler's warning is an error.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import gpu_check

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "benchmarks/results/kernel_resources.json"
ROWS = 16  # only the grid grows with more
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)", re.DOTALL)  # fmt: skip


def native_settings():
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["native"]


def plain(symbol):
    "The name of a kernel without namespaces, return type and arguments; template arguments stay."
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    text = text.strip().removeprefix("void ").replace("(anonymous namespace)", "")
    return re.sub(r"(\w*::)+|\([^()]*\)$", "", text)


def reported(log):
    "What an assembler said of each kernel."
    if "warning" in log.lower():
        raise RuntimeError(f"expected no warning, got\n{log}")
    rows = []
    for found in REPORT.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        rows.append({"kernel": plain(found["name"]), "arch": found["arch"],
                     "registers": int(found["registers"]),
                     "spill_bytes": int(found["stores"]) + int(found["loads"]),
                     "shared_bytes": int(shared[1]) if shared else 0})  # fmt: skip
    return rows


def cuda_kernels():
    "Rows of the kernels in csrc/cuda. Shared memory is what they declare, not what a launch adds."
    settings, rows = native_settings(), []
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in settings["cuda_archs"].split()]
    options = ["-O3", f"-std=c++{settings['cxx_std']}", "-Icsrc", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    for source in sorted(ROOT.glob(settings["cuda_sources"])):
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", *options, *code, "-fatbin", str(source), "-o", f"{folder}/kernel"]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows += [{"language": "CUDA", "launched_by": ""} | row for row in reported(done.stderr)]
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def recorded_launches(run, arch):
    "Compile what `run` launches, for a GPU that is not there, and launch nothing."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    # the device's number keeps the kernels of one architecture apart from those of another
    device = SimpleNamespace(get_current_device=lambda: arch, get_current_stream=lambda _: 0,
                             get_current_target=lambda: GPUTarget("cuda", arch, 32))
    triton.runtime.driver.set_active(device)
    launch, rows = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        rows.extend(row | {"shared_bytes": kernel.metadata.shared} for row in reported(log.getvalue()))
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch
    return rows


def triton_kernels():
    "Rows of the kernels that Triton compiles for the shapes of gpu_check.py."
    from alignkit.ops import dispatch

    # Nothing is computed: tensors of the CPU stand for a GPU's, and no output may be looked at.
    dispatch._devices = lambda backend: ("cpu",)
    dispatch.refuse_unless = lambda *_: None
    gpu_check.selective_peers = lambda *_: {}
    rows = []
    for arch in map(int, native_settings()["cuda_archs"].split()):
        for make, (most, *rest), _ in gpu_check.CASES:
            case = make(min(most, ROWS), *rest, device="cpu")
            text = " x ".join(map(str, (most, *rest)))
            name = f"{case.op} {text} {case.dtype} {case.note}".strip()
            found = recorded_launches(lambda case=case: case.ours("triton"), arch)
            rows += [{"language": "Triton", "launched_by": name} | row for row in found]
    return sorted(rows, key=lambda row: (row["kernel"], row["launched_by"], row["arch"]))


def nvcc_version():
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def main():
    import triton

    triton.knobs.nvidia.dump_ptxas_log = True
    versions = {"nvcc": nvcc_version(), "triton": triton.__version__}
    kernels = cuda_kernels() + triton_kernels()
    TARGET.write_text(json.dumps({"versions": versions, "kernels": kernels}, indent=1) + "\n")
    for row in kernels:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "0":  # read while triton is imported
        with tempfile.TemporaryDirectory() as cache:  # a cached kernel reports nothing
            env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    main()
