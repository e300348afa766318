"""Reads LLMBar's recorded judgements and PandaLM's votes, and records how our figures compare with the authors'.

    python benchmarks/llmbar.py DATA [--out benchmarks/results/llmbar.json]

DATA holds the folders llmbar/ (princeton-nlp/LLMBar at 900616bf, Dataset/LLMBar) and pandalm/ (WeOpenML/PandaLM at
3871806e, data/testset-v1.json). Only figures, places and causes are recorded, no text.
"""

import argparse
import json
from dataclasses import astuple
from pathlib import Path

from alignkit.judging.metrics import UNREAD, report
from alignkit.judging.pairs import authors_figures, ceiling, read_pairs, read_recorded

SUBSETS = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")
JUDGES, PROMPTS = ("ChatGPT", "LLaMA2"), ("Vanilla", "CoT", "Swap")


def theirs(path):
    "Counts out of '80 / 100 = 80.0%', and the kappa between orders."
    stored = json.loads(path.read_text())
    counts = {name: int(stored[name].split(" / ")[0])
              for name in ("correct_False", "correct_True", "correct_both", "equal")}
    return {**counts, "kappa_agreement": stored["kappa_agreement"]}


def two_verdicts(completion):
    "Both outputs are called better: the first and the last verdict may differ."
    return all(f"Output ({label}) is better" in completion for label in "ab")


def why_differ(completion, _):
    return "two verdicts: the authors take the first label, we the last" if two_verdicts(completion) else "unknown"


def why_unread(completion, finish):
    "Why a completion holds no verdict."
    text = completion.strip()
    if "cannot provide a response" in text:
        return "refuses to judge"
    if finish == "length" or not text.endswith((".", ")", "!", '"')) or text.endswith("Output (b)"):
        return "cut by the limit of length"
    if any(word in text.rsplit("\n", 1)[-1].lower() for word in ("neither", "both", "equally")):
        return "names neither output"
    return "unknown"


def places(subset, judge, prompt, found, rows, cause):
    for row, stage, swapped in found:
        completion, finish = rows[row]["results"][stage][f"swap = {swapped}"]["completion"]
        yield {"subset": subset.split("/")[-1], "judge": judge, "prompt": prompt, "row": row, "stage": stage,
               "swapped": swapped, "cause": cause(completion, finish)}


def record(data):
    cells, differences, unread, completions, several, unread_twice = [], [], [], 0, 0, 0
    for subset in SUBSETS:
        lengths = read_pairs(data / "llmbar" / subset / "dataset.json").lengths
        for judge in JUDGES:
            for prompt in PROMPTS:
                folder = data / "llmbar" / subset / "evaluators" / judge / prompt
                found = read_recorded(folder / "result.json")
                rows = json.loads((folder / "result.json").read_text())
                differences += places(subset, judge, prompt, found.differ, rows, why_differ)
                unread += places(subset, judge, prompt, found.unread, rows, why_unread)
                completions += found.completions
                several += sum(two_verdicts(asked["completion"][0]) for row in rows
                               for stage in row["results"] for asked in stage.values())
                unread_twice += int((found.verdicts == UNREAD).all(1).sum())
                figures = report(found.verdicts, found.labels, lengths)
                cells.append({"subset": subset.split("/")[-1], "judge": judge, "prompt": prompt,
                              "pairs": len(found.labels), "ours": authors_figures(found),
                              "theirs": theirs(folder / "statistics.json"),
                              "report": {name: astuple(figure) for name, figure in figures.items()}})
    people = read_pairs(data / "pandalm" / "testset-v1.json")
    top = ceiling(people.votes, people.items)
    return {"source": "LLMBar (princeton-nlp/LLMBar, MIT) and PandaLM (WeOpenML/PandaLM, Apache-2.0)",
            "completions": completions, "read_alike": completions - len(differences), "cells": cells,
            "differences": differences, "unread": unread, "two_verdicts": several,
            "unread_in_both_orders": unread_twice,
            "pandalm": {"accepted": len(people.tasks), "rejected": len(people.rejected), "kappa": top.kappa,
                        **{name: astuple(getattr(top, name)) for name in ("agreement", "unanimous", "accuracy")}}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default="benchmarks/results/llmbar.json")
    args = parser.parse_args()
    args.out.write_text(json.dumps(record(args.data), indent=1, allow_nan=False) + "\n")
