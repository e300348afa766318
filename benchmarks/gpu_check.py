"""The steps of gpu_check.sh: what a machine with a GPU can show and none without one can.

    gpu_check.py machine|build|tests|sanitize|bench|merge WORK

Each step leaves WORK/STEP.json (also when it fails: what it knows by then) and its exit status says whether all was
well; `merge` puts them into one file. Nothing but torch, the build's tools and pytest is needed, and no network.

A row of the benchmarks: `device_us`, the quartiles of a call's microseconds between CUDA events, of calls that follow
one another in a CUDA graph where `captured`, so that small arrays are in the cache; `wall_us`, until the host goes on;
`share_of_copy`, the time in which a large copy moves as many bytes over the median; whether the goals were `met`.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
# What compiles, interprets or imitates kernels on a CPU says nothing about a GPU.
WITHOUT_A_GPU = ("test_ops_portable.py", "test_ops_cuda_logic.py", "test_ops_triton.py")
NOT_NEEDED = ("nbdev", "fastcore", "mujoco", "datasets", "transformers", "trl", "accelerate")


def write(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def output_of(*command):
    "What a program prints; None where it is missing or fails."
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- machine -------------------------------------------------------------------------------


def no_device():
    "Why nothing can be measured here; empty where there is a GPU."
    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda
    why = f"torch {torch.__version__} was built without CUDA" if built is None else (
        f"torch {torch.__version__} (CUDA {built}) finds none")
    return f"no CUDA device: {why}"


def machine(work):
    if no_device():
        sys.exit(no_device())
    import triton

    gpu = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    nvcc = re.search(r"V([\d.]+)", output_of("nvcc", "--version") or "")
    write(work / "machine.json", {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": os.environ.get("COMMIT") or output_of("git", "-C", ROOT, "rev-parse", "HEAD"),
        "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
        "memory_gib": round(gpu.total_memory / 2**30, 1), "processors": gpu.multi_processor_count,
        "l2_mib": gpu.L2_cache_size / 2**20, "driver": output_of(*query), "cores": os.cpu_count(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "torch_cuda": torch.version.cuda, "triton": triton.__version__,
                     "nvcc": nvcc and nvcc[1]}})  # fmt: skip


# ---- build ---------------------------------------------------------------------------------


def architecture():
    return "{}{}".format(*torch.cuda.get_device_capability())


def source_copy(work, arch):
    "The sources under WORK, which is thrown away, set to compile for one architecture."
    tree = work / "tree"
    wanted = ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
              "alignkit", "csrc", "results", "tests")  # fmt: skip
    built = shutil.ignore_patterns("*.so", "__pycache__", "jobs")
    for path in (ROOT / name for name in wanted):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=built)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(path, tree)
    settings = (tree / "settings.ini").read_text()
    (tree / "settings.ini").write_text(re.sub(r"(?m)^cuda_archs = .*$", f"cuda_archs = {arch}", settings))
    return tree


def install(tree, site, cuda):
    command = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
               "--target", site, tree)  # fmt: skip
    return subprocess.run(command, env=os.environ | {"ALIGNKIT_CUDA": cuda}).returncode == 0


# Run against the installed package, in a process in which nothing else of the house can be had.
IMPORTS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from alignkit import ops
from alignkit.ops import dispatch
print(dispatch.extension("cpu").__file__, dispatch.extension("cuda").__file__)
problems = {{b.name: b.problem for b in ops.backends() if b.problem}}
sys.exit(str(problems) if problems else 0)
"""


def imports(site, missing=NOT_NEEDED):
    "Import the installed operators without what only notebooks and tests need."
    code = IMPORTS.format(missing=missing)
    return subprocess.run([sys.executable, "-c", code], cwd=site, env=os.environ | {"PYTHONPATH": str(site)},
                          capture_output=True, text=True)  # fmt: skip


def build(work):
    tree, site, arch = source_copy(work, architecture()), work / "site", architecture()
    complete = install(tree, site, cuda="1")
    if not complete:  # what Triton can show is still shown
        install(tree, site, cuda="0")
    shutil.rmtree(tree / "alignkit")  # what follows must not find the copy of the sources
    done = imports(site)
    print(done.stdout + done.stderr)
    write(work / "build.json", {"architecture": f"sm_{arch}", "cuda": complete,
                                "imports": done.returncode == 0, "problem": done.stderr[-2000:]})
    return complete and done.returncode == 0


# ---- tests ---------------------------------------------------------------------------------

TESTS_S = 90  # less than gpu_check.sh gives the step


def limited(seconds, signal="TERM"):
    "Ends a program and what it started, with status 124."
    return ["timeout", f"--signal={signal}", "--kill-after=5", str(seconds)]


def workers():
    "Options that spread tests over processes, where pytest-xdist is there."
    count = min(12, (os.cpu_count() or 1) - 2)
    if output_of(sys.executable, "-c", "import xdist") is None or count < 2:
        print("pytest-xdist is missing or there are few cores: tests run one after the other")
        return []
    return ["-n", str(count), "--dist", "worksteal"]


def outcomes(report):
    "Counts of a junit file, the names of what failed, and why tests were skipped."
    cases = ElementTree.parse(report).getroot().findall(".//testcase[@name]")  # not the interrupted one
    found = {"passed": 0, "failed": [], "skipped": {}, "on_device": {"cuda": 0, "triton": 0}}
    for case in cases:
        name, skipped = f"{case.get('classname')}::{case.get('name')}", case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif skipped is not None:
            reason = skipped.get("message", "")
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
            for backend in found["on_device"]:
                found["on_device"][backend] += bool(re.search(rf"\b{backend}\b", case.get("name")))
    return found


def complete(found):
    "Did everything pass, and did the GPU's rows run at all?"
    missing = [r for r in found["skipped"] if re.search("CUDA device|not compiled|not usable", r)]
    return not found["failed"] and not missing and all(found["on_device"].values())


def tests(work):
    folder = work / "tree/tests"
    chosen = [p for p in sorted(folder.glob("test_ops*.py")) if p.name not in WITHOUT_A_GPU]
    report = work / "tests.xml"
    # interrupted, pytest still reports the tests that it has finished
    command = [*limited(TESTS_S, "INT"), sys.executable, "-m", "pytest", "-q", f"--junitxml={report}",
               *workers(), *chosen]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the workers share the cores
    status = subprocess.run(command, cwd=work / "tree", env=env).returncode
    found = {"pytest": "out of time" if status == 124 else f"exit {status}"}
    if report.exists():
        found |= outcomes(report)
    write(work / "tests.json", found)
    return status == 0 and complete(found)


# ---- compute-sanitizer ---------------------------------------------------------------------

TOOLS = {"memcheck": 60, "racecheck": 30, "initcheck": 30}  # seconds each may take
CASES_ASKED, FEWEST = 200, 10  # asked for; without which nothing was shown


def sanitized(tool, limit, script):
    # torch's cache hands out pieces of large blocks, beyond which nothing would be noticed
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*limited(limit), "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
               sys.executable, script, "cuda", str(CASES_ASKED), str(limit // 2)]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    text = done.stdout + done.stderr
    print(tool, text[-3000:], sep="\n")
    cases = re.search(r"(?m)^(\d+) cases$", done.stdout)
    status = {0: "no report", 9: "reports", 124: "out of time", 127: "compute-sanitizer is missing"}
    return {"status": status.get(done.returncode, f"exit {done.returncode}"),
            "cases": int(cases[1]) if cases else 0, "seconds": round(time.monotonic() - start, 1),
            "end_of_output": text[-1000:]}  # fmt: skip


def sanitize(work):
    found = {}
    for tool, limit in TOOLS.items():
        found[tool] = sanitized(tool, limit, work / "tree/tests/sanitized_cases.py")
        write(work / "sanitize.json", found)
    return all(r["status"] == "no report" and r["cases"] >= FEWEST for r in found.values())


# ---- benchmarks: what is compared ----------------------------------------------------------


class Peer(NamedTuple):
    "What people use instead."

    run: Callable[[], Any]
    captured: bool = True  # in a CUDA graph; not where the host decides, or it would be huge


class Case(NamedTuple):
    "One piece of work, done by our kernels and by their peers."

    op: str
    shape: tuple[int, ...]
    dtype: str
    moved: int  # bytes that must be read and written
    backends: tuple[str, ...]  # the first one serves by default
    ours: Callable[[str], Any]  # by the named backend
    peers: dict[str, Peer]
    error: Callable[[str, Any], float]  # largest, of what a contender gave
    note: str = ""
    tolerance: float = 1e-4  # of float32 outputs, absolute and relative


BOTH, TRITON = ("cuda", "triton"), ("triton",)


def installed():
    "The operators, and the functions that they are compared with; the build comes before they can be imported."
    from alignkit import ops
    from alignkit.ops import peers

    return ops, peers


def compiled(function, *args):
    return Peer(partial(torch.compile(function, dynamic=False), *args))


def some_rows(rows):
    return torch.linspace(0, rows - 1, min(rows, 64)).long()


def error_of_rows(rows, exact):
    "Largest error over evenly spread rows; relative where the exact figure is above 1."
    kept = some_rows(rows)
    exact = cache(partial(exact, kept))

    def error(_, found):
        found = found if isinstance(found, tuple) else (found,)
        pairs = zip(found, exact(), strict=False)  # a peer may give less
        errors = [((at(x, kept) - e).abs() / e.abs().clamp(min=1)).max() for x, e in pairs]
        return torch.stack(errors).max().item()  # NaN, if one is

    return error


def at(x, rows):
    "Rows of a tensor on the CPU, floats as float64."
    x = x.detach()[rows.to(x.device)].cpu()
    return x.double() if x.is_floating_point() else x


def steps(B, T, share, device):
    random = torch.Generator(device).manual_seed(0)
    rewards, values = (torch.randn(B, n, generator=random, device=device) for n in (T, T + 1))
    return rewards, values, torch.rand(B, T, generator=random, device=device) < share


def gae_case(B, T, device, masked=False):
    ops, theirs = installed()

    rewards, values, ends = steps(B, T, 0.02, device)
    mask = steps(B, T, 0.8, device)[2] if masked else None
    x, floats = (rewards, values, ends), ends.float()

    def exact(rows):
        return (ops.gae_reference(*(at(t, rows) for t in x), mask=at(mask, rows) if masked else None),)

    peers = {} if masked else {"torch.compile, associative_scan": compiled(theirs.gae_scan, rewards, values, floats)}
    if T <= 128 and not masked:
        peers["loop over columns"] = Peer(lambda: theirs.gae_loop(rewards, values, floats), captured=False)
    return Case("gae", (B, T), "float32", (14 if masked else 13) * B * T, BOTH,
                lambda backend: ops.gae(*x, mask=mask, backend=backend), peers,
                error_of_rows(B, exact), "masked" if masked else "")  # fmt: skip


def supported_gae_case(B, T, device):
    ops, _ = installed()

    x = steps(B, T, 0.9, device)
    return Case("supported_gae", (B, T), "float32", 17 * B * T, BOTH,
                lambda backend: ops.supported_gae(*x, -2.0, backend=backend), {},
                error_of_rows(B, lambda rows: ops.supported_gae_reference(
                    *(at(t, rows) for t in x), -2.0)))  # fmt: skip


def dual_gae_case(B, T, device):
    ops, _ = installed()

    rewards, values, ends = steps(B, T, 0.02, device)
    x = rewards, -rewards, values, values + 1, ends
    return Case("dual_gae", (B, T), "float32", 29 * B * T, BOTH,
                lambda backend: ops.dual_gae(*x, 0.99, 0.95, 0.5, backend=backend), {},
                error_of_rows(B, lambda rows: ops.dual_gae_reference(
                    *(at(t, rows) for t in x), 0.99, 0.95, 0.5)))  # fmt: skip


def grouped_advantage_case(G, n, device, ragged=False):
    ops, theirs = installed()

    rewards = steps(G, n, 0.5, device)[0]
    groups = {"group_size": n}
    if ragged:  # told as offsets, which the kernel cannot know to be equal
        groups = {"offsets": torch.arange(G + 1, device=device) * n}
    x = rewards.flatten()
    peers = {"TRL's expression": Peer(lambda: theirs.grouped_as_in_trl(x, n).view(G, n)),
             "torch.compile, TRL's expression": compiled(lambda: theirs.grouped_as_in_trl(x, n).view(G, n))}
    return Case("grouped_advantage", (G, n), "float32", 8 * G * n, BOTH,
                lambda backend: ops.grouped_advantage(x, **groups, backend=backend).view(G, n),
                {} if ragged else peers,
                error_of_rows(G, lambda rows: (ops.grouped_advantage_reference(
                    at(rewards, rows).flatten(), group_size=n).view(-1, n),)),
                "offsets" if ragged else "")  # fmt: skip


def grouped_comparison_case(P, n, device):
    ops, theirs = installed()

    random = torch.Generator(device).manual_seed(0)
    scores = 1 + 9 * torch.rand(P, n, n, 2, generator=random, device=device)
    complete = torch.rand(P, n, generator=random, device=device) < 0.9

    def ours(backend):
        return ops.grouped_comparison(scores, complete=complete, backend=backend)[0]

    def exact(rows):
        found, _ = ops.grouped_comparison_reference(at(scores, rows), complete=at(complete, rows))
        return (found.nan_to_num(),)

    known = error_of_rows(P, exact)
    return Case("grouped_comparison", (P, n, n, 2), "float32", 8 * P * n * n, TRITON, ours,
                {"masked_fill + sum": Peer(partial(theirs.masked_fill_comparison, scores, complete)),
                 "torch.compile, masked_fill + sum": compiled(theirs.masked_fill_comparison, scores, complete)},
                lambda name, found: known(name, found.nan_to_num()))  # fmt: skip


def log_softmax_gather(logits, ids):
    logps = torch.log_softmax(logits.float(), -1)
    return logps.gather(1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def gather_minus_lse(logits, ids):
    x = logits.float()
    return (x.gather(1, ids[:, None])[:, 0] - x.logsumexp(-1),)


def selective_peers(table, ids):
    "TRL's and Liger's kernels, where they are installed. Liger's leaves out the last row."
    peers, logits = {}, table[:-1]
    try:
        from trl.trainer.utils import selective_log_softmax

        peers["TRL, selective_log_softmax"] = Peer(lambda: (selective_log_softmax(logits, ids),), captured=False)
    except ImportError:
        print("TRL is not installed")
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        peers["Liger, fused_selective_log_softmax"] = Peer(
            lambda: (fused_selective_log_softmax(table[None], ids[None], 1.0)[0],))
    except ImportError:
        print("Liger is not installed")
    return peers


def table_of_logits(N, V, dtype, device):
    random = torch.Generator(device).manual_seed(0)
    table = torch.randn(N + 1, V, generator=random, device=device, dtype=dtype).mul_(3)
    return table, torch.randint(V, (N,), generator=random, device=device)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def token_logps_case(N, V, dtype, device):
    ops, _ = installed()

    table, ids = table_of_logits(N, V, dtype, device)
    logits = table[:-1]
    peers = {"log_softmax + gather": Peer(partial(log_softmax_gather, logits, ids)),
             "torch.compile, gather - logsumexp": compiled(gather_minus_lse, logits, ids)}
    return Case("token_logps", (N, V), name_of(dtype), logits.numel() * logits.element_size(), TRITON,
                lambda backend: tuple(ops.token_logps(logits, ids, backend=backend)[:2]),
                peers | selective_peers(table, ids),
                error_of_rows(N, lambda rows: ops.token_logps_reference(
                    at(logits, rows), at(ids, rows))[:2]))  # fmt: skip


def token_logps_gradient_case(N, V, dtype, device):
    ops, _ = installed()

    table, ids = table_of_logits(N, V, dtype, device)
    logits = table[:-1].requires_grad_()

    def gradient(logits, ids, op):
        return torch.autograd.grad(op(logits, ids)[0].sum(), logits)

    def exact(rows):
        return gradient(at(logits, rows).requires_grad_(), at(ids, rows), ops.token_logps_reference)

    return Case("token_logps", (N, V), name_of(dtype), 3 * logits.numel() * logits.element_size(), TRITON,
                lambda backend: gradient(logits, ids, partial(ops.token_logps, backend=backend)),
                {"log_softmax + gather": Peer(partial(gradient, logits, ids, log_softmax_gather))},
                error_of_rows(N, exact), "with its gradient", torch.finfo(dtype).eps)  # fmt: skip


def sample_tokens_case(N, V, dtype, device):
    ops, theirs = installed()

    table, _ = table_of_logits(N, V, dtype, device)
    logits, uniforms = table[:-1], torch.rand(N, device=device)
    rows = some_rows(N)

    def error(contender, found):
        "Of the log-probabilities; and ours must draw where the uniform number lies."
        exact = at(logits, rows).log_softmax(-1)
        ids, logps = (at(x, rows) for x in found)
        of_logps = (logps - exact.gather(1, ids[:, None])[:, 0]).abs().max()
        after = exact.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
        before = after - exact.gather(1, ids[:, None])[:, 0].exp()
        outside = torch.maximum(before - at(uniforms, rows), at(uniforms, rows) - after).max()
        return (torch.maximum(of_logps, outside) if contender in BOTH else of_logps).item()

    # multinomial asks the GPU whether its probabilities are sound, and waits
    peers = {"softmax + multinomial + gather": Peer(partial(theirs.multinomial_gather, logits), captured=False)}
    return Case("sample_tokens", (N, V), name_of(dtype), logits.numel() * logits.element_size(), TRITON,
                lambda backend: ops.sample_tokens(logits, uniforms, backend=backend), peers,
                error)  # fmt: skip


def clipped_policy_loss_case(B, T, device):
    ops, theirs = installed()

    random = torch.Generator(device).manual_seed(0)
    old, new, ref = (0.3 * torch.randn(3, B, T, generator=random, device=device) - 2).unbind()
    advantages = torch.randn(B, generator=random, device=device)
    mask = torch.rand(B, T, generator=random, device=device) < 0.8
    new, floats = new.clone().requires_grad_(), mask.float()

    def gradient(loss, new=new):
        return loss.detach(), torch.autograd.grad(loss, new)[0]

    def trl(function=theirs.surrogate_as_in_trl):
        return gradient(function(new, old, advantages, floats, ref))

    def exact():
        wide = new.detach().double().requires_grad_()
        loss, _ = ops.clipped_policy_loss_reference(
            wide, old.double(), advantages.double(), mask=mask, beta=0.1, ref_logps=ref.double())
        return gradient(loss, wide)

    def error(_, found):
        (loss, grad), (exact_loss, exact_grad) = found, exact()
        of_steps = ((grad - exact_grad) * mask.sum()).abs().max()  # the mean divided them
        return torch.maximum((loss - exact_loss).abs(), of_steps).item()

    return Case("clipped_policy_loss", (B, T), "float32", 25 * B * T, TRITON,
                lambda backend: gradient(ops.clipped_policy_loss(
                    new, old, advantages, mask=mask, beta=0.1, ref_logps=ref, backend=backend)[0]),
                {"TRL's expression": Peer(trl),
                 "torch.compile, TRL's expression": Peer(partial(
                     trl, torch.compile(theirs.surrogate_as_in_trl, dynamic=False)))},
                error, "with its gradient")  # fmt: skip


def attention_fusion_case(B, Nv, Nt, D, dtype, device, gradient=False):
    ops, _ = installed()
    heads = math.gcd(D, 8)
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    x = [normal(*shape).requires_grad_(gradient) for shape in ((B, D), (B, Nv, D), (B, Nt, D))]
    projections = [normal(D, D) / D**0.5 for _ in range(3)]

    def through(function, x, projections):
        "What it returns, or the gradient of the first output's sum."
        found = function(*x, *projections)
        return torch.autograd.grad(found[0].sum(), x) if gradient else tuple(found)

    def by_attention(query, visual, tactile, *projections):
        "Linear layers, then torch's attention."
        tokens = torch.cat([visual, tactile], 1)
        q, k, v = (torch.nn.functional.linear(t, w).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for t, w in zip((query[:, None], tokens, tokens), projections, strict=True))  # fmt: skip
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, D),)

    def exact(rows):
        wide = [at(t, rows).requires_grad_(gradient) for t in x]
        function = partial(ops.attention_fusion_reference, heads=heads)
        return through(function, wide, [w.cpu().double() for w in projections])

    absorbed = torch.compile(partial(ops.attention_fusion_reference, heads=heads), dynamic=False)
    size = sum(t.numel() for t in x) * x[0].element_size()
    return Case("attention_fusion", (B, Nv, Nt, D), name_of(dtype), (3 if gradient else 1) * size, BOTH,
                lambda backend: through(
                    partial(ops.attention_fusion, heads=heads, backend=backend), x, projections),
                {"linear + scaled_dot_product_attention": Peer(partial(through, by_attention, x, projections)),
                 "torch.compile, the absorbed reference": Peer(partial(through, absorbed, x, projections))},
                error_of_rows(B, exact), "with its gradient" if gradient else "",
                max(1e-5, 2 * torch.finfo(dtype).eps))  # fmt: skip



BF16, F32 = torch.bfloat16, torch.float32
SHARE = "share_of_copy"
# What builds a case from its shape and a device; its shape; what the default backend should reach.
CASES = [
    (gae_case, (8192, 2048), {SHARE: 0.75}),
    (gae_case, (16, 65536), {"device_us": 20}),
    (gae_case, (32768, 8), {"device_us": 5, "wall_us": 12}),
    (gae_case, (4096, 128), {}),
    (partial(gae_case, masked=True), (8192, 2048), {SHARE: 0.75}),
    (supported_gae_case, (8192, 2048), {SHARE: 0.75}),
    (dual_gae_case, (8192, 2048), {SHARE: 0.75}),
    (grouped_advantage_case, (65536, 16), {"device_us": 6}),
    (partial(grouped_advantage_case, ragged=True), (65536, 16), {"device_us": 6}),
    (grouped_comparison_case, (65536, 16), {SHARE: 0.7}),
    (partial(token_logps_case, dtype=BF16), (4096, 128256), {SHARE: 0.8}),
    (partial(token_logps_case, dtype=F32), (4096, 32000), {SHARE: 0.8}),
    (partial(token_logps_gradient_case, dtype=BF16), (4096, 128256), {}),
    (partial(sample_tokens_case, dtype=F32), (128, 49152), {SHARE: 0.6}),
    (partial(sample_tokens_case, dtype=BF16), (4096, 128256), {SHARE: 0.6}),
    (clipped_policy_loss_case, (8192, 2048), {SHARE: 0.75}),
    (partial(attention_fusion_case, dtype=BF16), (64, 1024, 256, 256), {}),
    (partial(attention_fusion_case, dtype=BF16), (256, 1024, 256, 256), {SHARE: 0.6}),
    (partial(attention_fusion_case, dtype=F32, gradient=True), (64, 1024, 256, 256), {}),
    (partial(token_logps_case, dtype=BF16), (16384, 151936), {SHARE: 0.8}),
]


# ---- benchmarks: how they are timed --------------------------------------------------------


def between_events(batch):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    batch()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def graph_of(run, calls):
    "Replays so many calls, without the host between them."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture must find everything compiled and allocated once
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.empty_cache()  # while it captures, the allocator cannot take back what others keep
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def device_us(run, captured, rounds=20):
    "Quartiles of a call's microseconds on the device, between events."
    run()
    once = between_events(run)
    calls = max(1, min(50, int(2000 / once)))  # an event is good to half a microsecond
    batch = graph_of(run, calls) if captured else lambda: [run() for _ in range(calls)]
    batch()
    return statistics.quantiles([between_events(batch) / calls for _ in range(rounds)], n=4)


def wall_us(run):
    "Microseconds until the host may go on, in the median of 5 to 100 calls."
    times = []
    while len(times) < 5 or len(times) < 100 and sum(times) < 1e5:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


class Timers(NamedTuple):
    device_us: Callable[[Callable, bool], list[float]]
    wall_us: Callable[[Callable], float]


ON_DEVICE = Timers(device_us, wall_us)


def copy_bandwidth(timers, device="cuda", size=2**30):
    "Bytes a microsecond, read and written, of the copy that every share refers to."
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timers.device_us(lambda: target.copy_(source), True)[1]


def met(row, goal):
    "Whether each figure of the goal was reached: shares from below, times from above."
    of = {SHARE: row[SHARE], "device_us": row["device_us"][1], "wall_us": row["wall_us"]}
    return {key: of[key] >= value if key == SHARE else of[key] <= value for key, value in goal.items()}


def timed(case, name, run, captured, bandwidth, timers):
    "Check a contender, then time it. What it raises is its result."
    row = {"contender": name, "captured": captured}
    try:
        row["largest_error"] = case.error(name, run())
        row["agrees"] = row["largest_error"] <= case.tolerance
        quartiles = timers.device_us(run, captured)
        row |= {"device_us": quartiles, "wall_us": timers.wall_us(run),
                SHARE: case.moved / bandwidth / quartiles[1]}  # fmt: skip
    except Exception as error:  # a peer out of memory must not cost the others
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    return row


def rows_of(case, goal, bandwidth, timers):
    "A row for each of our backends and each peer."
    head = {"op": case.op, "shape": list(case.shape), "dtype": case.dtype, "note": case.note,
            "moved": case.moved}  # fmt: skip
    for name in case.backends:
        row = head | timed(case, name, partial(case.ours, name), True, bandwidth, timers)
        if name == case.backends[0] and "failed" not in row:
            row |= {"goal": goal, "met": met(row, goal)}
        yield row | {"sound": "failed" not in row and row["agrees"]}
    for name, peer in case.peers.items():
        yield head | timed(case, name, peer.run, peer.captured, bandwidth, timers)


def line_of(row):
    what = f"{row['op']} {row['shape']} {row['dtype']} {row['note']}"
    figures = row.get("failed") or (f"{row['device_us'][1]:10.1f} us  {row[SHARE]:6.1%} of copy  wall "
                                    f"{row['wall_us']:.1f} us  agrees {row['agrees']}  {row.get('met', '')}")
    return f"{what:55} {row['contender']:36} {figures}"


def bench(work, cases=CASES, timers=ON_DEVICE, device="cuda"):
    found = {"bytes_per_us_of_copy": copy_bandwidth(timers, device), "rows": []}
    for make, shape, goal in cases:
        for row in rows_of(make(*shape, device=device), goal, found["bytes_per_us_of_copy"], timers):
            found["rows"].append(row)
            print(line_of(row), flush=True)
            write(work / "bench.json", found)
        if device == "cuda":
            torch.cuda.empty_cache()
    return all(row.get("sound", True) for row in found["rows"])


# ---- all of it -----------------------------------------------------------------------------


def merge(work, folder):
    "One file of what the steps left, how each ended and how long it took."
    phases = [line.split("\t") for line in (work / "phases.tsv").read_text().splitlines()]
    steps = {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in phases}
    found = {"phases": steps}
    for name in steps:
        path = work / f"{name}.json"
        found[name] = json.loads(path.read_text()) if path.exists() else None
    gpu = re.sub(r"[^a-z0-9]+", "-", found["machine"]["gpu"].lower()).strip("-")
    target = folder / f"gpu_{gpu}_{found['machine']['date']}.json"
    write(target, found)
    print(target)
    return target


def main():
    steps = {f.__name__: f for f in (machine, build, tests, sanitize, bench)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*steps, "merge"])
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    if args.step == "merge":
        merge(args.work, args.folder)
    else:
        sys.exit(steps[args.step](args.work) is False)


if __name__ == "__main__":
    main()
