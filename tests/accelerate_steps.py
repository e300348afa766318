"""Started by test_accelerate.py, alone or by `accelerate launch`: a few steps of everything that learns.

Leaves in the folder of the first argument what each process ended with.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from alignkit.models.language import LanguagePolicy, Tokens, tiny_causal_lm, tiny_critic
from alignkit.models.scores import ScoreLMScorer, tiny_scorelm
from alignkit.preferences import PreferencePairs, fit_scorelm, fit_sft
from alignkit.rl.algorithms import BSPO, GRPO, PPO, RLOO, DrGRPO, ReinforcePlusPlus
from alignkit.rl.language import LanguageCollector
from alignkit.rl.train import train
from alignkit.storage import Checkpoints
from alignkit.training import NotFinite, fit, generator
from alignkit.worlds.grammar import grammar_tokenizer

TOKENIZER = grammar_tokenizer()


class EveryRound(Checkpoints):
    def due(self):
        return True


def ragged(rows, seed):
    "Token rows of very unequal lengths, the long ones first: unequal shares for two processes."
    g = generator(seed, "rows")
    lengths = torch.linspace(9, 1, rows).long()
    mask = torch.cat([torch.ones(rows, 1), torch.arange(9) < lengths[:, None]], 1).bool()
    return Tokens(torch.randint(15, mask.shape, generator=g), mask, 1)


def scorelm(seed=2):
    model = tiny_scorelm(TOKENIZER, seed=seed)
    with torch.no_grad():
        model.score_head.weight.copy_(torch.linspace(-1, 1, 32)[None])
    return model


def policy_steps(algorithm, group_size=1, **options):
    policy = LanguagePolicy(tiny_causal_lm(TOKENIZER, seed=0))
    critic = tiny_critic(TOKENIZER, seed=1) if group_size == 1 else None
    prompts = torch.arange(12)[:, None]
    collect = LanguageCollector(
        policy, prompts, torch.ones_like(prompts).bool(), ScoreLMScorer(scorelm(), 0.06),
        batch_size=8, max_new_tokens=6, seed=0, eos_token_id=3, group_size=group_size)
    history = train(collect, policy, critic, algorithm, lr=1e-3, minibatches=2, seed=0,
                    **{"rounds": 2} | options)
    return torch.nn.ModuleList([policy] if critic is None else [policy, critic]), history


def score_steps():
    model = tiny_scorelm(TOKENIZER, seed=2)
    history = fit_scorelm(model, PreferencePairs(ragged(16, 5)), steps=3, batch_size=6, lr=1e-3,
                          lm_coef=0.5, seed=0)
    return model, history


def sft_steps(**options):
    model = tiny_causal_lm(TOKENIZER, seed=3)
    history = fit_sft(model, ragged(12, 6), lr=1e-3, seed=0,
                      **{"steps": 3, "batch_size": 4} | options)
    return model, history


def resumed_steps(folder):
    "Stops after the first of three rounds, and goes on from the checkpoint."
    options = {"checkpoints": EveryRound(folder), "rounds": 3}
    shown = []

    def stop(round_, figures):
        shown.append(round_)

    policy_steps(PPO(), on_round=stop, **options | {"rounds": 1})
    module, history = policy_steps(PPO(), on_round=stop, **options)
    return module, history, shown


class OfRows(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.weight * x).exp().mean(), {}


def refusal(x):
    try:
        fit(OfRows(), lambda round_: [x], rounds=1, lr=0.1)
    except (ValueError, NotFinite) as error:
        return str(error)


def main(out):
    from accelerate import Accelerator

    state = Accelerator()
    process = state.process_index
    histories = {}
    runs = {"ppo": lambda: policy_steps(PPO(entropy_coef=0.01)),
            "bspo": lambda: policy_steps(BSPO(v_min=-3.0)),
            "grpo": lambda: policy_steps(GRPO(), group_size=4),
            "grpo_token": lambda: policy_steps(GRPO(average="token"), group_size=4),
            "dr_grpo": lambda: policy_steps(DrGRPO(max_tokens=6), group_size=4),
            "rloo": lambda: policy_steps(RLOO(), group_size=4),
            "reinforce": lambda: policy_steps(ReinforcePlusPlus(), group_size=4),
            "scorelm": score_steps, "sft": sft_steps}
    for name, steps in runs.items():
        module, histories[name] = steps()
        tensors = {key: x.detach().clone() for key, x in module.state_dict().items()}
        save_file(tensors, out / f"{name}-{process}.safetensors")
    whole, _ = policy_steps(PPO(), rounds=3)
    resumed, history, shown = resumed_steps(out / "checkpoints")
    same = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    overflowing = torch.ones(6)
    overflowing[4] = 200.0
    (out / f"{process}.json").write_text(json.dumps({
        "processes": state.num_processes, "histories": histories, "resumed_equals": same,
        "resumed_rounds": len(history), "shown": shown,
        "odd": refusal(torch.ones(7)), "overflow": refusal(overflowing)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
