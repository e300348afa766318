"""`alignkit judge`: against servers that answer, fail and die, and a model on disk; killed, interrupted, and misused."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_served import Fault, answer, impatient, serve  # noqa: F401 (fixtures)

from alignkit import cli
from alignkit.generate.text import Scripted
from alignkit.judging import evaluation
from alignkit.judging.judges import Judge
from alignkit.judging.metrics import TIE
from alignkit.judging.pairs import read_pairs
from alignkit.judging.verdicts import Choice

ROOT = Path(__file__).resolve().parents[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferences(count):
    return [{"prompt": f"Question {i}?", "chosen": "right", "rejected": "quite wrong"} for i in range(count)]


def knowing(body):
    "Names the place of the right answer, and says why."
    text = body["messages"][0]["content"]
    return answer(f"[[{re.search('answer ([AB]) .{8}>.right', text, re.S)[1]}]]")


def call(capsys, *argv):
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- figures ---------------------------------------------------------------------------


def test_a_judge_that_knows_and_one_that_likes_the_first_place(here, serve, capsys):  # noqa: F811
    data = write(here / "pairs.jsonl", preferences(20))
    server = serve(answers=knowing)
    status, out, err = call(capsys, "judge", data, "--judge", server.url, "--model", "m", "--json")
    found = json.loads(out)  # and nothing else
    assert status == 0 and len(server.bodies) == 40 and "20/20 pairs judged" in err
    assert found["figures"]["right in both orders"]["value"] == 1 and not found["position_flagged"]
    assert found["figures"]["length bias"]["value"] == 0  # it follows the labels
    assert found["outcomes"]["swapped"] == {"decided": 20, "tie": 0, "missing": 0, "malformed": 0, "unfinished": 0}
    assert found["tokens"] == {"prompt": 40 * 7, "completion": 40 * 3} and found["people"] is None
    said = [json.loads(line) for line in Path(found["judgements"]).read_text().splitlines()]
    assert len(said) == 40 and all(one["winner"] == one["label"] for one in said)

    status, out, _ = call(capsys, "judge", data, "--judge", serve().url, "--model", "m", "--limit", "12")
    assert status == 0 and "12 pairs of 12 prompts judged" in out
    assert re.search(r"accuracy +0\.500 .*\(n=12\)", out)
    assert "FLAGGED (p = 0.00049): it prefers the first place" in out and "judgements.jsonl" in out


def test_llmbars_rows_as_a_list_and_as_lines(here, serve, capsys):  # noqa: F811
    rows = [{"input": f"{i}?", "output_1": "right", "output_2": "wrong", "label": 1} for i in range(3)]
    (here / "dataset.json").write_text(json.dumps(rows))
    write(here / "dataset.jsonl", rows)
    server = serve(answers=knowing)
    for name in ("dataset.json", "dataset.jsonl"):
        status, out, _ = call(capsys, "judge", name, "--judge", server.url, "--model", "m", "--json")
        assert status == 0 and json.loads(out)["figures"]["accuracy"]["value"] == 1
    assert len(server.bodies) == 6  # the same questions


def test_people_stand_beside_the_judge_and_their_ties_are_left_out(here, serve, capsys):  # noqa: F811
    def row(i, *votes):
        return {"instruction": f"{i}?", "input": "", "response1": "right", "response2": "wrong",
                **{f"annotator{k}": vote for k, vote in enumerate(votes, 1)}}

    rows = [row(0, 1, 1, 1), row(1, 1, 1, 2), row(2, 1, 2, 0), row(3, 0, 0, 1), row(4, 1, 1, 0), row(5, 3, 1, 1)]
    server = serve(answers=knowing)
    write(here / "people.jsonl", rows)
    status, out, _ = call(capsys, "judge", "people.jsonl", "--judge", server.url, "--model", "m", "--json")
    found = json.loads(out)
    assert status == 0 and (found["pairs"], found["ties_left_out"]) == (3, 2)
    assert found["rejected"] == [{"line": 6, "reason": "annotator1: expected one of [1, 2, 0], got 3"}]
    # panels of two that name one winner: 3 of the first row, 1 of the second, 1 of the fifth
    assert found["people"]["accuracy"]["value"] == pytest.approx((3 + 0 + 0.5) / 5)
    assert found["people"]["judge"]["value"] == 1
    assert "[[C]] for" not in server.bodies[0]["messages"][0]["content"]
    assert "[[C]], the last for a tie" in server.bodies[0]["messages"][0]["content"]


def test_a_judges_two_orders_share_the_panels():
    votes = np.array([[0, 0, 0], [1, 1, TIE]])
    verdicts = np.repeat(np.array([[0, 1], [1, 1]])[:, None], 3, 1)
    assert evaluation.against_panels(verdicts, votes).value == pytest.approx((3 * 0.5 + 1) / 4)


def test_pairs_of_one_prompt_are_one_in_the_intervals(tmp_path):
    "Each pair five times over says as much as once."
    rows = [{"input": f"{i}?", "output_1": "right", "output_2": "wrong", "label": 1 + (i % 3 == 0)} for i in range(40)]
    judge = Judge(Scripted(lambda question: "[[A]]" if question.order == (0, 1) else "[[B]]"), Choice())
    found = []
    for times in (1, 5):
        pairs = read_pairs(write(tmp_path / f"{times}.jsonl", rows * times))
        found.append(evaluation.evaluate(judge, pairs))
    once, often = (one.figures["accuracy"] for one in found)
    assert often.n == 200 and often.value == once.value
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.15)  # one by one: less than half
    sure = [one.figures["consistency"] for one in found]
    assert sure[0].low == sure[1].low < 1  # all alike: still forty prompts


# ---- what does not fit -----------------------------------------------------------------


def test_rows_that_do_not_fit_are_counted_and_named(here, serve, capsys):  # noqa: F811
    good = [json.dumps(row) for row in preferences(3)]
    lines = [good[0], "{broken", good[1], json.dumps({"prompt": "?", "chosen": "x"}), "",
             json.dumps({"prompt": "?", "chosen": "x", "rejected": "\ud800"}), good[2]]
    (here / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    status, out, err = call(capsys, "judge", "pairs.jsonl", "--judge", serve().url, "--model", "m", "--json")
    found = json.loads(out)
    assert status == 0 and found["pairs"] == 3 and [row["line"] for row in found["rejected"]] == [2, 4, 5, 6]
    assert "'rejected' is missing" in found["rejected"][1]["reason"] and "4 rejected" in err
    (here / "none.jsonl").write_text(lines[3] + "\n")
    status, out, err = call(capsys, "judge", "none.jsonl", "--judge", serve().url, "--model", "m", "--json")
    assert (status, out) == (1, "") and "no row fits; line 1: column 'rejected' is missing" in err


def test_a_surrogate_in_a_list_is_set_aside(tmp_path):
    rows = [{"input": "?", "output_1": text, "output_2": "wrong", "label": 1} for text in ("right", "\udc00")]
    pairs = read_pairs(write(tmp_path / "rows.jsonl", rows))
    assert len(pairs.tasks) == 1 and pairs.rejected[0].reason == "output_1: a lone surrogate, which is no text"


def test_a_question_that_the_server_refuses_is_counted_and_the_others_go_on(here, serve, capsys):  # noqa: F811
    server = serve([Fault(b"too long for me", 400)], answers=knowing)
    data = write(here / "pairs.jsonl", preferences(4))
    status, out, _ = call(capsys, "judge", data, "--judge", server.url, "--model", "m", "--json")
    found = json.loads(out)
    assert status == 0 and len(found["refused"]) == 1 and "too long for me" in found["refused"][0]
    assert sum(counts["missing"] for counts in found["outcomes"].values()) == 1
    assert found["figures"]["accuracy"]["value"] == 7 / 8 and found["figures"]["unread"]["value"] == 1 / 8


def test_a_judge_that_refuses_everything_is_no_result(here, serve, capsys):  # noqa: F811
    server = serve([Fault(b"this server is pinned to another model", 400)] * 4)
    data = write(here / "pairs.jsonl", preferences(2))
    status, out, err = call(capsys, "judge", data, "--judge", server.url, "--model", "m", "--json")
    assert (status, out) == (1, "") and "refused all 4 questions, the first: " in err and "pinned" in err


def test_one_pair_with_votes_is_enough(here, serve, capsys):  # noqa: F811
    (here / "people.json").write_text(json.dumps([{
        "instruction": "?", "input": "", "response1": "right", "response2": "wrong",
        **{f"annotator{k}": 1 for k in (1, 2, 3)}}]))
    judge = ("judge", "people.json", "--judge", serve(answers=knowing).url, "--model", "m")
    status, out, _ = call(capsys, *judge)
    assert status == 0 and re.search(r"the judge, on the same +1\.000", out)
    people = json.loads(call(capsys, *judge, "--json")[1])["people"]
    assert people["judge"] == {"value": 1.0, "low": None, "high": None, "n": 1} and people["kappa"] is None


URL = ("--judge", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("argv, status, message", [
    ((), 2, "required: DATA"), (("pairs.jsonl",), 2, "--judge"),
    (("gone.jsonl", *URL, "--model", "m"), 2, "gone.jsonl: No such file"),
    ((".", *URL, "--model", "m"), 2, "Is a directory"),
    (("pairs.jsonl", *URL), 2, "--model: expected the server's name"),
    (("pairs.jsonl", *URL, "--model", "m", "--limit", "0"), 2, "--limit"),
    (("pairs.jsonl", *URL, "--model", "m", "--api-key-variable", "NO_SUCH"), 2, "NO_SUCH is not set"),
    (("pairs.jsonl", "--judge", "localhost:8000/v1"), 2, "a server's address (http://...)"),
    (("pairs.jsonl", "--judge", "./gone"), 2, "a folder with config.json"),
    (("pairs.jsonl", "--judge", "ftp://host/v1", "--model", "m"), 2, "expected http://"),
    (("pairs.jsonl", "--judge", "http://me:planted@host/v1", "--model", "m"), 2, "expected no user, password or query"),
    (("pairs.jsonl", "--judge", "owner/name", "--model", "m"), 2, "--model: expected beside a server's address"),
    (("pairs.jsonl", *URL, "--model", "m", "--out", "pairs.jsonl"), 1, "--out: "),
    (("pairs.jsonl", *URL, "--model", "m"), 1, "refused): is the server running, and is this its address"),
    (("empty.jsonl", *URL, "--model", "m"), 1, "no row fits"),
    (("ties.jsonl", *URL, "--model", "m"), 1, "people call all of these pairs a tie"),
])
def test_what_cannot_be_done_is_said(here, capsys, argv, status, message):
    write(here / "pairs.jsonl", preferences(1))
    (here / "empty.jsonl").write_text("")
    write(here / "ties.jsonl", [{"instruction": "?", "input": "", "response1": "x", "response2": "y",
                                 "annotator1": 0, "annotator2": 0, "annotator3": 0}])
    found, out, err = call(capsys, "judge", *argv, "--json")
    assert (found, out) == (status, "") and message in err, err
    assert "Traceback" not in err and "planted" not in err


def test_an_unknown_model_a_refused_key_and_a_key_that_is_nowhere(here, serve, capsys, monkeypatch):  # noqa: F811
    data = write(here / "pairs.jsonl", preferences(2))
    server = serve([Fault(b"no model named m", 404)] * 4)
    status, _, err = call(capsys, "judge", data, "--judge", server.url, "--model", "m")
    assert status == 1 and "no model named m" in err and "what was answered is kept" in err
    monkeypatch.setenv("PLANTED", "sk-planted-7f3a91")
    server = serve([Fault(b"Incorrect API key sk-planted-7f3a91", 401)] * 4)
    judge = ("judge", data, "--judge", server.url, "--model", "m", "--api-key-variable", "PLANTED")
    status, _, err = call(capsys, *judge)
    assert status == 1 and "status 401" in err and "planted" not in err
    server.faults = iter(())
    status, out, err = call(capsys, *judge)
    assert status == 0 and server.headers[-1]["Authorization"].endswith("sk-planted-7f3a91")
    written = [path.read_bytes() for path in here.rglob("*") if path.is_file()]
    assert not [text for text in (out.encode(), err.encode(), *written) if b"sk-planted" in text]


# ---- begun again -----------------------------------------------------------------------


def test_a_second_run_asks_nobody_even_where_nobody_is_left(here, serve, capsys):  # noqa: F811
    data, server = write(here / "pairs.jsonl", preferences(4)), serve(answers=knowing)
    judge = ("judge", data, "--judge", server.url, "--model", "m", "--json")
    first = call(capsys, *judge)
    server.die()
    assert call(capsys, *judge)[:2] == first[:2] and len(server.bodies) == 8
    write(here / "pairs.jsonl", preferences(5))  # one that is new
    assert call(capsys, *judge)[0] == 1


def start(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = "import sys; from alignkit.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_a_killed_run_asks_nothing_again_and_ctrl_c_says_how_to_go_on(tmp_path, serve, kills):  # noqa: F811
    pairs = 10 * kills
    data, server = write(tmp_path / "pairs.jsonl", preferences(pairs)), serve(answers=knowing, work=0.03)
    argv = ["judge", data, "--judge", server.url, "--model", "m", "--json"]
    for number in range(kills):
        run, goal = start(*argv, cwd=tmp_path), len(server.bodies) + 12
        deadline = time.monotonic() + 60
        while len(server.bodies) < goal and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        run.send_signal((signal.SIGKILL, signal.SIGINT)[number % 2])
        _, err = run.communicate(timeout=30)
        if number % 2:
            assert run.returncode == 130 and "Traceback" not in err, err
            argv = shlex.split(err.strip().splitlines()[-1])[1:]  # the line that goes on
    out, err = start(*argv, cwd=tmp_path).communicate(timeout=60)
    assert json.loads(out)["figures"]["accuracy"] == pytest.approx(json.loads(out)["figures"]["accuracy"] | {"value": 1})
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(set(asked)) == 2 * pairs <= len(asked) <= 2 * pairs + 8 * kills  # what was in flight


# ---- a model that is loaded here -------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from test_generate_text import letter_tokenizer

    from alignkit.models.language import quiet_transformers, tiny_causal_lm

    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = letter_tokenizer()
    with quiet_transformers():
        tiny_causal_lm(tokenizer, seed=0, positions=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_judges_once_and_what_does_not_fit_into_it_is_counted(here, capsys, folder, monkeypatch):
    from alignkit.generate.model import LocalModel

    rows = [*preferences(3), {"prompt": "long?", "chosen": "x" * 1000, "rejected": "y"}]
    data = write(here / "pairs.jsonl", rows)
    judge = ("judge", data, "--judge", str(folder), "--max-tokens", "8", "--json")
    status, out, err = call(capsys, *judge)
    found = json.loads(out)
    assert status == 0, err
    assert len(found["refused"]) == 2 and "expected at most 1024 tokens, got a prompt of" in found["refused"][0]
    assert sum(found["outcomes"]["as given"].values()) == 4 and found["figures"]["unread"]["value"] == 1
    assert found["figures"]["position bias"] == {"value": None, "low": None, "high": None, "n": 0}
    monkeypatch.setattr(LocalModel, "generate", lambda *_: pytest.fail("asked again"))
    assert call(capsys, *judge)[1] == out


def test_a_model_that_cannot_chat_and_a_folder_that_is_no_model(here, capsys, folder):
    from transformers import AutoTokenizer

    data = write(here / "pairs.jsonl", preferences(1))
    mute = here / "mute"
    mute.mkdir()
    for path in folder.iterdir():
        (mute / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(mute)
    tokenizer.chat_template = None
    with contextlib.suppress(FileNotFoundError):
        (mute / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(mute)
    status, _, err = call(capsys, "judge", data, "--judge", str(mute))
    assert status == 1 and "has no chat template" in err
    (mute / "config.json").write_text("{}")
    status, _, err = call(capsys, "judge", data, "--judge", str(mute))
    assert status == 1 and str(mute) in err and "Traceback" not in err
