"""judging.benchmarks: small files with the columns of the named sets, and their scores by hand."""

import gzip
import json

import numpy as np
import pytest

from alignkit.judging.benchmarks import (
    NAMED_SETS,
    SECTIONS,
    codeprefbench_scores,
    read_named,
    rewardbench_scores,
    rewardmath_scores,
)
from alignkit.judging.metrics import TIE, UNREAD, estimate


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def say(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


REWARDBENCH = [{"prompt": f"{i}?", "chosen": "yes", "chosen_model": "a", "rejected": "no", "rejected_model": "b",
                "subset": "hep-go", "id": i} for i in range(40)]


def test_rewardbench_from_a_file_a_folder_and_rows(tmp_path, capsys):
    broken = [{**REWARDBENCH[0], "rejected": "yes"}, {**REWARDBENCH[0], "chosen": None},
              {k: v for k, v in REWARDBENCH[0].items() if k != "subset"}, "row"]
    file = lines(tmp_path / "filtered.jsonl", [*REWARDBENCH, *broken])
    found = read_named("rewardbench", file)
    assert all(task.answers[label] == "yes" for task, label in zip(found.pairs.tasks, found.pairs.labels, strict=True))
    assert 8 < found.pairs.labels.sum() < 32 and set(found.subsets) == {"hep-go"} and len(found.subsets) == 40
    assert [(r.line, r.reason.partition(",")[0]) for r in found.pairs.rejected[:3]] == [
        (41, "both answers are the same"), (42, "chosen: expected text"), (43, "column 'subset' is missing")]
    assert "40 rows accepted, 4 rejected, first row 41" in capsys.readouterr().out
    assert read_named("rewardbench", REWARDBENCH).pairs.tasks == found.pairs.tasks
    folder = tmp_path / "hub"
    folder.mkdir()
    lines(folder / "filtered.jsonl", REWARDBENCH)
    assert read_named("rewardbench", folder, split="train").pairs.tasks == found.pairs.tasks


def test_rewardmath_keeps_its_places(tmp_path):
    row = {"problem": "1+1?", "answer": "1+1?", "eval_solution_A": ["So", "2."], "eval_solution_B": ["3."],
           "solution_reference": "m", "chosen_position": "A", "subject": "Algebra", "level": 1, "problem_id": 0, "id": 0}
    swapped = {**row, "eval_solution_A": ["3."], "eval_solution_B": ["So", "2."], "chosen_position": "B"}
    path = tmp_path / "RewardMATH_pairwise.json"
    path.write_text(json.dumps([row, swapped, {**row, "eval_solution_B": "3."}, {**row, "chosen_position": "C"}]))
    found = read_named("rewardmath", path)
    assert found.pairs.labels.tolist() == [0, 1] and found.pairs.tasks[1].answers == ("3.", "So\n2.")
    assert "eval_solution_B: expected a list of steps" in found.pairs.rejected[0].reason
    assert "chosen_position: expected one of ['A', 'B'], got \"C\"" in found.pairs.rejected[1].reason


def test_codeprefbench_names_its_aspects_by_file(tmp_path):
    row = {"task_id": "t", "instruction": "Sort.", "choices": ["a.sort()", "sorted(a)"], "gt_choice": 1}
    lines(tmp_path / "correctness-alignment.jsonl", [row, {**row, "gt_choice": True}, {**row, "choices": ["a"]}])
    (tmp_path / "human-preference-alignment.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({**row, "annotations": ["Tie"], "gt_choice": 0}).encode() + b"\n"))
    found = read_named("codeprefbench", tmp_path)
    assert found.subsets.tolist() == ["correctness", "human-preference"] and found.pairs.labels.tolist() == [1, 0]
    assert read_named("codeprefbench", tmp_path / "correctness-alignment.jsonl").subsets.tolist() == ["correctness"]
    assert ["gt_choice" in found.pairs.rejected[0].reason, "choices" in found.pairs.rejected[1].reason] == [True, True]


@pytest.mark.parametrize("chosen, rejected, prompt, answers", [
    ("\n\nHuman: Hi\n\nAssistant: Hello.", "\n\nHuman: Hi\n\nAssistant: Go.", "Human: Hi", {"Hello.", "Go."}),
    # the conversations part before the last turn: the rest of both is what is judged
    ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C", "\n\nHuman: Hi\n\nAssistant: D", "Human: Hi",
     {"A\n\nHuman: B\n\nAssistant: C", "D"}),
    ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C", "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: D",
     "Human: Hi\n\nAssistant: A\n\nHuman: B", {"C", "D"}),
    # an answer that begins like the other
    ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes, sir", "Human: Hi", {"Yes", "Yes, sir"})])
def test_anthropics_conversations(chosen, rejected, prompt, answers):
    [task] = read_named("hh-harmless", [{"chosen": chosen, "rejected": rejected}]).pairs.tasks
    assert task.prompt == prompt and set(task.answers) == answers


def test_skyworks_conversations_differ_in_the_last_message():
    rows = [{"chosen": say("1+1?", "2"), "rejected": say("1+1?", "3"), "source": "magpie"},
            {"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b", "c", "e"), "source": "helpsteer2"},
            {"chosen": say("a", "b"), "rejected": say("c", "d"), "source": "x"},
            {"chosen": say("a"), "rejected": say("a", "b"), "source": "x"}]
    found = read_named("skywork", rows)
    assert [t.prompt for t in found.pairs.tasks] == ["1+1?", "user: a\n\nassistant: b\n\nuser: c"]
    assert found.subsets.tolist() == ["magpie", "helpsteer2"]
    assert ["two prompts" in found.pairs.rejected[0].reason, "end with an answer" in found.pairs.rejected[1].reason
            ] == [True, True]


def test_rises_columns_have_to_be_named():
    columns = {"question": "q", "first": "a", "second": "b", "judgement": "text"}
    row = {"q": "1+1?", "a": "2", "b": "3", "text": "The second? [[B]] No: [[A]]"}
    found = read_named("rise", [row, {**row, "text": "Both are good."}], columns=columns)
    assert found.pairs.labels.tolist() == [0] and "missing" in found.pairs.rejected[0].reason
    with pytest.raises(ValueError, match="columns: expected a map of .*judgement.* could not be verified"):
        read_named("rise", [row])


def test_columns_of_another_name():
    row = {"instruction": "1+1?", "chosen": "2", "rejected": "3", "section": "hep-go"}
    found = read_named("rewardbench", [row], columns={"prompt": "instruction", "subset": "section"})
    assert found.pairs.tasks[0].prompt == "1+1?"


@pytest.mark.parametrize("call, message", [
    (lambda tmp: read_named("rewardbench2", []), "name: expected one of"),
    (lambda tmp: read_named("rewardmath"), "source: expected one, since rewardmath is not on the Hub"),
    (lambda tmp: read_named("skywork", []), "no row fits"),
    (lambda tmp: read_named("rewardmath", tmp / "none.json"), "none.json"),
    (lambda tmp: read_named("rewardmath", save(tmp / "a.json", {})), "a.json: expected a list of rows, got dict"),
    (lambda tmp: rewardbench_scores(np.ones(1), np.array(["hep-c"])), "subsets: expected those of RewardBench")])
def test_wrong_input_is_named(tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(tmp_path)


def save(path, content):
    path.write_text(json.dumps(content))
    return path


def test_rewardbench_scores_by_hand():
    "What the released counts sum to; half of each chat subset right, all of the rest."
    assert sum(sum(weights.values()) for weights in SECTIONS.values()) == 3522 == 2985 - 447 + 984
    subsets = np.array([subset for weights in SECTIONS.values() for subset in weights for _ in range(2)])
    right = np.array([i % 2 if subset in SECTIONS["Chat"] else 1 for i, subset in enumerate(subsets)])
    scores = rewardbench_scores(right, subsets)
    assert [scores[name].value for name in ("Chat", "Chat Hard", "Safety", "Reasoning", "Score")] == [
        0.5, 1, 1, 1, 3.5 / 4]
    math = np.where(subsets == "math-prm", 0, 1)
    assert rewardbench_scores(math, subsets)["Reasoning"].value == pytest.approx(0.5)
    some = rewardbench_scores(np.array([1, 0, 1]), np.array(["alpacaeval-easy", "mt-bench-easy", "donotanswer"]))
    assert some["Chat"].value == pytest.approx(100 / 128) and set(some) == {"Chat", "Safety", "Score"}


def test_the_interval_of_a_rewardbench_score_covers():
    rng, hits, truth = np.random.default_rng(0), 0, {"llmbar-natural": 0.8, "mt-bench-hard": 0.5}
    weights = SECTIONS["Chat Hard"]
    true = sum(weights[s] * p for s, p in truth.items()) / sum(weights[s] for s in truth)
    subsets = np.repeat(list(truth), [100, 37])
    for _ in range(300):
        right = rng.random(137) < np.repeat(list(truth.values()), [100, 37])
        score = rewardbench_scores(right * 1.0, subsets)["Chat Hard"]
        hits += score.low <= true <= score.high
    assert 0.92 <= hits / 300 <= 0.985


def test_rewardmath_scores_by_hand():
    problems = np.repeat(np.arange(3), 9)
    right = np.ones(27)
    right[9], right[18:] = 0.5, 0  # one tie in the second problem; the third loses all
    scores = rewardmath_scores(right, problems)
    assert scores["pairwise"].value == pytest.approx((9 + 8.5) / 27)
    assert scores["pairwise"].high - scores["pairwise"].low > 2 * (estimate(right).high - estimate(right).low)
    assert scores["beats all"].value == pytest.approx(1 / 3) and scores["beats all"].n == 3
    assert scores["MRR"].value == pytest.approx((1 + 1 / 2 + 1 / 10) / 3)


def test_codeprefbench_gives_a_half_where_nothing_was_decided():
    verdicts = np.array([[0, 0], [TIE, UNREAD], [1, 0], [1, 1]])
    scores = codeprefbench_scores(verdicts, np.zeros(4, int), np.array(["security", "security", "efficiency", "efficiency"]))
    assert {name: x.value for name, x in scores.items()} == {"efficiency": 0.25, "security": 0.75, "Score": 0.5}
    assert codeprefbench_scores(verdicts[:, 0], np.zeros(4, int), np.full(4, "x"))["Score"].value == 1.5 / 4


def test_every_layout_reads_what_it_names():
    for name, layout in NAMED_SETS.items():
        with pytest.raises(KeyError) as missing:
            layout.parse({})
        assert missing.value.args[0] in layout.columns, name
