"""Started by test_own.py, alone or by `accelerate launch`: the paper's configuration on miniature models.

`python own_steps.py MODELS OUT`; MODELS holds folders policy, reward and data.
"""

import sys
from dataclasses import replace
from pathlib import Path

from alignkit.own import run_jobs
from alignkit.papers.bspo_own import OwnConfig, own_jobs


def config(models: Path) -> OwnConfig:
    places = {"model": "policy", "reward_model": "reward", "data": "data"}
    return replace(
        OwnConfig.paper(), **{field: str(models / name) for field, name in places.items()},
        device="cpu", split="train_prefs[:40]", scorelm_batch=8, scorelm_epochs=1,
        scorelm_lr=1e-3, max_tokens=128, iterations=1, minibatches=1, epochs=1, completions=8,
        max_new_tokens=6, lr=1e-3)


if __name__ == "__main__":
    run_jobs(own_jobs(config(Path(sys.argv[1])), 0, "tensorboard"), sys.argv[2])
