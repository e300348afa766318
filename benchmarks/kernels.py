"""Every operator beside its peers, with what calls cost and what contention does: recorded.

    python benchmarks/kernels.py [OP ...] [--rounds 20] [--threads 1]

Writes benchmarks/results/kernels_cpu.json (kernels_cuda.json on a GPU), which the notebooks of `nbs/kernels` render;
of the operators named, the rows there are replaced. Takes a quarter of an hour on two cores, mostly torch.compile's.
kernels_cpu_epyc.json is an earlier record, of another processor.
"""

import argparse
import itertools
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from alignkit import runs
from alignkit.ops import bench

RESULTS = Path(__file__).parent / "results"


def peer_versions():
    found = {}
    for package in ("torchrl", "trl", "numba"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="*", metavar="OP")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, load = RESULTS / f"kernels_{device}.json", round(os.getloadavg()[0], 2)
    when = {"date": datetime.now(UTC).date().isoformat(), "commit": runs.code_commit()}
    rows, shown = itertools.tee(bench.bench(args.operators, args.rounds, device, args.threads))
    for text in bench.lines(shown):
        print(text, flush=True)
    rows = [row | when for row in rows]
    kept = []
    if args.operators:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = [row for row in before["rows"] if row["op"] not in args.operators]
    order = list(bench.CASES)
    recording = {
        **when,
        "machine": runs.machine(),
        "versions": runs.versions() | peer_versions(),
        "load_before": load,
        "rows": sorted(kept + rows, key=lambda row: order.index(row["op"])),
        "overhead": bench.overhead(),
        "contention": bench.contention(),
    }
    print(bench.figures(recording["overhead"] + recording["contention"]))
    path.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
