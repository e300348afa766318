"""What operators do when they are called wrongly, from a fork, and from many threads.

Started as a script, this file makes the calls, so that a crash ends a child and not the tests:
    test_ops_contract.py refusals|fork|threads
"""

import concurrent.futures
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignkit import ops
from alignkit.ops import dispatch

B, T, V, D = 9, 4, 5, 6  # a row for each of eight threads, and one more
LEARNING = "token_logps", "linear_token_logps", "clipped_policy_loss", "attention_fusion"


def right_calls():
    """A call of every operator with every argument: positional ones by name as well."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    flags = lambda *shape: torch.rand(*shape, generator=g) < 0.5  # noqa: E731
    steps = {"rewards": normal(B, T), "values": normal(B, T + 1), "terminated": flags(B, T)}
    scan = steps | {"gamma": 0.9, "lam": 0.8, "mask": flags(B, T)}
    cut = {"truncated": flags(B, T)}
    ids = torch.randint(V, (B,), generator=g)
    read = {"ids": ids, "temperature": 0.7, "eps_beta": 0.1}
    return {
        "gae": scan | cut | {"bootstrap": normal(B, T)},
        "supported_gae": scan | {"supported": flags(B, T), "v_min": -1.0},
        "dual_gae": scan | cut | {"costs": normal(B, T), "cost_values": normal(B, T + 1),
                                  "multiplier": 0.5},
        "grouped_advantage": {"rewards": normal(T), "group_size": 2, "eps": 0.1, "mask": flags(T),
                              "baseline": "mean", "scale": "std"},
        "grouped_comparison": {"scores": normal(B, T, T, 2), "complete": flags(B, T)},
        "token_logps": {"logits": normal(B, V)} | read,
        "linear_token_logps": {"hidden": normal(B, D), "weight": normal(V, D), "bias": normal(V)} | read,
        "sample_tokens": {"logits": normal(B, V), "uniforms": torch.rand(B, generator=g),
                          "temperature": 0.7},
        "clipped_policy_loss": {"logps": normal(B, T), "old_logps": normal(B, T),
                                "advantages": normal(B, T), "mask": flags(B, T), "eps_low": 0.2,
                                "eps_high": 0.2, "beta": 0.1, "ref_logps": normal(B, T),
                                "kl": "k3", "reduction": "token"},
        "attention_fusion": {"query": normal(B, D), "visual": normal(B, T, D),
                             "tactile": normal(B, 2, D), "w_q": normal(D, D), "w_k": normal(D, D),
                             "w_v": normal(D, D), "heads": 2, "visual_mask": flags(B, T),
                             "tactile_mask": flags(B, 2)},
    }  # fmt: skip


def broken(x):
    """What is no such argument, whatever the operator."""
    if isinstance(x, torch.Tensor):
        yield from ([1.0, 2.0], "text", x[None], x.flatten()[0], x.to(torch.complex64),
                    x.to("meta") if x.dim() else x, x.to(torch.int16))  # fmt: skip
        yield torch.cat([x, x])
        if x.dtype == torch.bool:
            yield x.float() + 0.5
    elif isinstance(x, float):
        yield from (float("nan"), float("inf"), "text", torch.zeros(2))
    else:
        yield from (-1, 2.5, None if isinstance(x, str) else 0, "no such name")


def shown(x):
    tensor = isinstance(x, torch.Tensor)
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if tensor else repr(x)


def refusal(name, call, argument, wrong):
    try:
        getattr(ops, name)(**(call | {argument: wrong}))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


# Of other shapes these are legitimate; then it is the arguments beside them that do not fit.
SIZES = {"rewards", "logits", "hidden", "weight", "scores", "logps", "query", "visual", "tactile"}


def refusals():
    count, unnamed = 0, []
    for name, call in right_calls().items():
        getattr(ops, name)(**call)
        for argument, x in call.items():
            for wrong in broken(x):
                print(name, argument, shown(wrong), flush=True)  # the last line of a crash
                message = refusal(name, call, argument, wrong)
                count += 1
                fits = argument in SIZES and isinstance(wrong, torch.Tensor)
                expected = ": expected" if fits else f"{argument}: expected"
                if message is None or expected not in message:
                    unnamed.append(f"{name}({argument}={shown(wrong)}): {message}")
    assert not unnamed, "\n".join(unnamed)
    print(count)


def tensors(found):
    """Those of an operator's result, which may hold tuples."""
    return [y for x in found for y in tensors(x)] if isinstance(found, tuple) else [found]


def bits(xs):
    return b"".join(x.detach().numpy().tobytes() for x in xs)


def outputs():
    """Every output of every operator, as bytes."""
    calls = right_calls().items()
    return b"".join(bits(tensors(getattr(ops, name)(**call))) for name, call in calls)


def gradients():
    """The gradient of every floating input of the operators that have one, as bytes."""
    found = []
    for name in LEARNING:
        call = right_calls()[name]
        inputs = [x.requires_grad_() for x in call.values()
                  if isinstance(x, torch.Tensor) and x.is_floating_point()]  # fmt: skip
        results = tensors(getattr(ops, name)(**call))
        whole = sum(x.sum() for x in results if x.requires_grad)
        found += [x for x in torch.autograd.grad(whole, inputs, allow_unused=True) if x is not None]
    assert len(found) > len(LEARNING)
    return bits(found)


def ask_for_threads(n):
    """Even small calls are shared out among n threads from now on."""
    torch.set_num_threads(n)
    dispatch.PARALLEL = 1
    assert dispatch.threads_for(1) == n


def fork():
    ask_for_threads(3)
    expected = outputs()  # the parent's workers run from now on
    child = os.fork()
    if not child:
        signal.alarm(5)  # a child that waits for threads it has not inherited waits for ever
        os._exit(0 if outputs() == expected else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def threads():
    expected = []
    for n in (1, 2, 8):
        ask_for_threads(n)
        expected.append(outputs() + gradients())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        expected += list(pool.map(lambda _: outputs() + gradients(), range(16)))
    print(len(set(expected)))


def child(task):
    done = subprocess.run([sys.executable, Path(__file__), task], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def test_every_operator_is_called():
    assert set(right_calls()) == {n for n in ops.__all__ if f"{n}_reference" in ops.__all__}


def test_calls_out_of_contract_name_the_argument():
    assert child("refusals") >= 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_answers():
    assert child("fork") == 0


def test_same_bits_from_one_two_and_eight_threads():
    assert child("threads") == 1


if __name__ == "__main__":
    {"refusals": refusals, "fork": fork, "threads": threads}[sys.argv[1]]()
