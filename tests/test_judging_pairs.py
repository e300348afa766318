"""judging.pairs: the layouts on small files made here, and, where ALIGNKIT_DATA names them, on the real ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from alignkit.judging.metrics import TIE, UNREAD, majority_vote
from alignkit.judging.pairs import (
    against_panels,
    authors_figures,
    ceiling,
    read_pairs,
    read_recorded,
)

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/results/llmbar.json"
LLMBAR = [{"input": "Add 1 and 1.", "output_1": "2", "output_2": "three", "label": 1},
          {"input": "Say nothing.", "output_1": "Nothing!", "output_2": "", "label": 2}]
PANDALM = {"idx": 0, "instruction": "Add.", "input": "1+1", "response1": "2", "response2": "3",
           "annotator1": 1, "annotator2": 2, "annotator3": 0}


def save(path, content):
    path.write_text(json.dumps(content))
    return path


def test_llmbars_layout(tmp_path):
    pairs = read_pairs(save(tmp_path / "dataset.json", LLMBAR))
    assert [task.answers for task in pairs.tasks] == [("2", "three"), ("Nothing!", "")]
    assert pairs.labels.tolist() == [0, 1] and pairs.votes is None
    assert pairs.lengths.tolist() == [[1, 5], [8, 0]]


def test_pandalms_layout_and_a_row_that_does_not_fit(tmp_path, capsys):
    rows = [PANDALM, {**PANDALM, "response1": True}, {**PANDALM, "annotator2": 1, "input": ""},
            {**PANDALM, "annotator1": 3}, {k: v for k, v in PANDALM.items() if k != "annotator3"}, "row"]
    pairs = read_pairs(save(tmp_path / "test.json", rows))
    assert [task.prompt for task in pairs.tasks] == ["Add.\n\n1+1", "Add."]
    assert pairs.votes.tolist() == [[0, 1, TIE], [0, 0, TIE]] and pairs.labels.tolist() == [TIE, 0]
    assert [r.line for r in pairs.rejected] == [2, 4, 5, 6]
    assert "response1: expected text, got true" in pairs.rejected[0].reason
    assert "annotator1: expected one of" in pairs.rejected[1].reason
    assert "'annotator3' is missing" in pairs.rejected[2].reason
    assert "2 rows accepted, 4 rejected" in capsys.readouterr().out


def test_a_readers_own_rows_and_messages(tmp_path):
    def say(text):
        return [{"role": "assistant", "content": text}]

    chat = [{"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": say("yes"), "rejected": say("no")}
            for i in range(200)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, chat)))
    pairs = read_pairs(path)
    assert all(task.answers[label] == "yes" for task, label in zip(pairs.tasks, pairs.labels, strict=True))
    assert 70 < pairs.labels.sum() < 130 and pairs.tasks[3].prompt == "3?"
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in chat]
    path.write_text("\n".join(map(json.dumps, swapped)))
    assert (read_pairs(path).labels == pairs.labels).all()


@pytest.mark.parametrize("content, message", [
    ("[]", "expected a list of rows with the columns"), ('[{"prompt": "?"}]', "expected a list of rows"),
    ('{"input": "?"}', "expected a list of rows"), ('[{"input": "a", "input": "b"}]', "key 'input' twice"),
    ('[{"label": NaN}]', "NaN is not JSON"),
    (json.dumps([{**LLMBAR[0], "label": True}]), "no row fits")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_people_by_hand():
    votes = np.array([[0, 0, 0], [1, 1, TIE], [0, 0, 1], [TIE, TIE, TIE], [1, 1, 1], [0, 1, TIE]])
    found = ceiling(votes)
    np.testing.assert_allclose(found.agreement.value, (1 + 1 / 3 + 1 / 3 + 1 + 1 + 0) / 6)
    np.testing.assert_allclose(found.unanimous.value, 3 / 6)
    # panels of two that name one winner: 3 of the first row, 1 of the second, 1 of the third, 3 of the fifth
    np.testing.assert_allclose(found.accuracy.value, (3 + 0.5 + 0 + 3) / 8)
    judge = np.repeat(majority_vote(votes)[:, None], 3, 1)
    np.testing.assert_allclose(against_panels(judge, votes).value, 8 / 8)
    with pytest.raises(ValueError, match="votes: expected shape"):
        ceiling(votes[:, :2])


def completion(text, winner):
    return {"completion": [text, "stop"], "winner": winner}


def test_recorded_judgements_by_hand(tmp_path):
    "The second row was asked again; the third was recorded wrongly."
    rows = [
        {**LLMBAR[0], "results": [{"swap = False": completion("Output (a)", "1"),
                                   "swap = True": completion("So Output (b) is better.", "1")}]},
        {**LLMBAR[1], "results": [{"swap = False": completion("Output (a) is better.", "1"),
                                   "swap = True": completion("Output (a) is better.", "2")},
                                  {"swap = False": completion("Output (b)", "2"),
                                   "swap = True": completion("Neither.", None)}]},
        {**LLMBAR[0], "results": [{"swap = False": completion("Output (a) is better? Output (b) is better.", "1"),
                                   "swap = True": completion("Output (a)", "2")}]},
    ]
    found = read_recorded(save(tmp_path / "result.json", rows))
    assert found.verdicts.tolist() == [[0, 0], [1, UNREAD], [1, 1]] and found.completions == 8
    assert found.theirs.tolist() == [[0, 0], [1, UNREAD], [0, 1]]
    assert found.differ == [(2, 0, False)] and found.unread == [(1, 1, True)]
    figures = authors_figures(found)
    assert {k: figures[k] for k in ("correct_False", "correct_True", "correct_both", "equal")} == {
        "correct_False": 2, "correct_True": 1, "correct_both": 1, "equal": 2}


def test_what_is_recorded_is_the_authors_figures():
    record = json.loads(RECORD.read_text())
    assert len(record["cells"]) == 30 and sum(cell["pairs"] for cell in record["cells"]) == 6 * 419
    for cell in record["cells"]:
        assert cell["ours"] == pytest.approx(cell["theirs"], abs=1e-12), cell
    assert record["completions"] - record["read_alike"] == len(record["differences"])
    assert all(one["cause"] != "unknown" for one in record["differences"] + record["unread"])


@pytest.mark.skipif("ALIGNKIT_DATA" not in os.environ, reason="ALIGNKIT_DATA names no folder with llmbar and pandalm")
def test_the_real_files_give_what_is_recorded(tmp_path):
    import subprocess
    import sys

    data = os.environ["ALIGNKIT_DATA"]
    subprocess.run([sys.executable, ROOT / "benchmarks/llmbar.py", data, "--out", tmp_path / "llmbar.json"], check=True)
    found, recorded = (json.loads(path.read_text()) for path in (tmp_path / "llmbar.json", RECORD))
    for cell, known in zip(found.pop("cells"), recorded.pop("cells"), strict=True):
        for name, figure in cell.pop("report").items():
            assert figure == pytest.approx(known["report"][name], abs=1e-9), (cell, name)
        known.pop("report")
        assert cell["ours"] == pytest.approx(cell["theirs"], abs=1e-12)
        assert cell["theirs"] == known["theirs"]
    for name in ("completions", "read_alike", "differences", "unread", "two_verdicts", "unread_in_both_orders"):
        assert found[name] == recorded[name]
