"""Triton kernels of alignkit.ops. Without a GPU they run in Triton's interpreter.

The interpreter is chosen by an environment variable that Triton reads while it is imported.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise ImportError(
            "triton was imported before alignkit's kernels, too late for its interpreter: "
            "set TRITON_INTERPRET=1, or import alignkit._triton before transformers' models"
        )
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import triton  # noqa: E402, F401  # missing: the backend is, and this says so
