"""data: dirty rows are set aside and counted, clean ones arrive unchanged; splits keep groups."""

import json
import random
import re
import subprocess
import sys

import pytest

from alignkit import data
from alignkit.data import PREFERENCE, PROMPT, load_rows, read_jsonl, split_by_group

GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "n": 1, "tags": ["a"]}


def row(**changes) -> bytes:
    changed = {**GOOD, **changes}
    return json.dumps({k: v for k, v in changed.items() if v is not ...}).encode()


def raw(text: str, name: str = "n") -> bytes:
    "A good row whose column holds this JSON text."
    return row(**{name: "@"}).replace(b'"@"', text.encode())


DEEP = "[" * 100_000 + "]" * 100_000
DIRTY = {
    # not one JSON object
    "blank": (b"", "Expecting value"),
    "spaces": (b"  ", "Expecting value"),
    "truncated": (row()[:-7], "Unterminated|delimiter|Expecting"),
    "two objects": (row() + row(), "Extra data"),
    "trailing text": (row() + b" // good one", "Extra data"),
    "trailing comma": (row()[:-1] + b",}", "property name"),
    "single quotes": (row().replace(b'"', b"'"), "property name"),
    "Python literal": (raw("True"), "Expecting value"),
    "array": (b"[" + row() + b"]", "expected an object, got list"),
    "string": (b'"prompt"', "expected an object, got str"),
    "number": (b"7", "expected an object, got int"),
    "null": (b"null", "expected an object, got NoneType"),
    "control character": (row().replace(b"2+2", b"2\x01+2"), "control character"),
    "carriage return inside": (row().replace(b"2+2", b"2\r2"), "control character"),
    "byte order mark": (b"\xef\xbb\xbf" + row(), "BOM"),
    "Latin-1": (row(prompt="caf@").replace(b"@", b"\xe9"), "utf-8"),
    "UTF-16": (row().decode().encode("utf-16"), "utf-8"),
    "encoded surrogate": (row(prompt="@").replace(b"@", b"\xed\xa0\x80"), "utf-8"),
    "overlong NUL": (row(prompt="@").replace(b"@", b"\xc0\x80"), "utf-8"),
    "too deep": (raw(DEEP), "recursion|deep"),
    # strict keys and values
    "duplicate key": (row()[:-1] + b', "chosen": "6"}', "key 'chosen' twice"),
    "duplicate escaped key": (row()[:-1] + b', "chos\\u0065n": "6"}', "key 'chosen' twice"),
    "nested duplicate key": (raw('{"a": 1, "a": 1}'), "key 'a' twice"),
    "NaN": (raw("NaN"), "NaN is not JSON"),
    "Infinity": (raw("Infinity"), "Infinity is not JSON"),
    "minus Infinity": (raw("-Infinity"), "-Infinity is not JSON"),
    "overflow": (raw("1e999"), "1e999 does not fit a float"),
    "underflow": (raw("1e-999"), "1e-999 does not fit a float"),
    "65 bits": (raw("9223372036854775808"), "does not fit 64 bits"),
    "5000 digits": (raw("9" * 5000), "digits"),
    "lone high surrogate": (row(prompt="\ud83d"), "lone surrogate"),
    "lone low surrogate": (row(chosen="a\ude00b"), "lone surrogate"),
    "surrogate in a key": (row(**{"\ud800": 1}), "lone surrogate"),
    "surrogate in a list": (row(tags=["\ud800"]), "lone surrogate"),
    # columns
    "no prompt": (row(prompt=...), "'prompt' is missing"),
    "no rejected": (row(rejected=...), "'rejected' is missing"),
    "null text": (row(chosen=None), "chosen: expected text or a list of messages, got null"),
    "number for text": (row(chosen=4), "chosen: expected text or a list of messages, got 4"),
    "object for text": (row(prompt={"role": "user"}), "prompt: expected text"),
    "empty text": (row(rejected=""), "rejected: expected text"),
    "white space": (row(prompt=" \t\n"), "prompt: expected text"),
    "no messages": (row(prompt=[]), "prompt: expected text"),
    "a message without role": (row(prompt=[{"content": "x"}]), "prompt: expected text"),
    "message content is a number": (row(prompt=[{"role": "u", "content": 1}]), "prompt: exp"),
    "messages beside text": (row(prompt=[{"role": "u", "content": "x"}]), "all columns to be"),
    "no preference": (row(rejected="4"), "chosen and rejected are the same"),
    # the table
    "float in an integer column": (raw("1.0"), "n: expected int as in the rows before, got float"),
    "bool in an integer column": (raw("true"), "n: expected int .* got bool"),
    "text in an integer column": (row(n="1"), "n: expected int .* got str"),
    "number in a list of text": (row(tags=["a", 1]), "a list: expected str .* got int"),
    "another list": (row(tags=[1]), r"tags\[...\]: expected str .* got int"),
    "empty object": (row(n={}), "an empty object"),
    "extra column missing": (row(n=...), "expected the columns"),
    "new column": (row(new=1), "expected the columns"),
    "case of a column": (row(prompt=..., Prompt="x"), "'prompt' is missing"),
}

CLEAN = [
    row(),
    row(prompt="line\u2028separator\u2029 and\x85next\x1cline\x0b."),
    row(prompt="\U0001f600 \u200b \ufeff \u0000 é e\u0301"),
    row(n=2**53 + 1),
    row(n=-(2**63)),
    row(n=None, tags=[]),
    row(tags=None),
    row(chosen=" keep my spaces \r\n\t"),
    row() + b"\r",
    b"  " + row() + b" \t",
    row(prompt="NaN", chosen="null", rejected="1e999"),
]


def test_the_promised_number_of_cases():
    assert len(DIRTY) >= 40


@pytest.mark.parametrize("name", DIRTY)
def test_a_dirty_row_is_set_aside_with_line_and_reason(tmp_path, name, capsys):
    line, reason = DIRTY[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([row(), line, row(prompt="3+1?")]) + b"\n")
    rows = read_jsonl(path)
    assert rows.accepted == [GOOD, {**GOOD, "prompt": "3+1?"}]
    (rejected,) = rows.rejected
    assert rejected.line == 2 and rejected.row == line
    assert re.search(reason, rejected.reason), rejected.reason
    (aside,) = map(json.loads, (tmp_path / "rows.jsonl.rejected.jsonl").read_text().splitlines())
    assert aside["line"] == 2 and aside["reason"] == rejected.reason
    assert "2 rows accepted, 1 rejected" in capsys.readouterr().out


def test_any_mix_of_rows_adds_up_and_clean_ones_arrive_unchanged(tmp_path):
    rng = random.Random(0)
    dirty = [line for line, _ in DIRTY.values() if len(line) < 50_000]
    for trial in range(30):
        lines = [row(), *rng.choices(CLEAN + dirty, k=rng.randint(0, 60))]
        path = tmp_path / f"{trial}.jsonl"
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n"]))
        physical = len(lines) - (lines[-1] == b"" and not path.read_bytes().endswith(b"\n\n"))
        rows = read_jsonl(path)
        assert len(rows.accepted) + len(rows.rejected) == physical
        clean = [json.loads(line) for line in lines if line in CLEAN]
        assert rows.accepted == clean
        assert list(load_rows(path)) == clean


def test_a_clean_file_leaves_no_file_of_rejected_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row() + b"\n[]\n")
    read_jsonl(path)
    path.write_bytes(row())
    assert read_jsonl(path).rejected == []
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert capsys.readouterr().out.endswith("1 rows accepted, 0 rejected\n")


def test_conversations_in_trl_form(tmp_path):
    talk = {name: [{"role": "user", "content": name}] for name in PREFERENCE}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(talk))
    assert load_rows(path)[0] == talk


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": "x"}'])
def test_a_file_without_a_good_row_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl: no row has \['prompt'\]"):
        load_rows(path, PROMPT)


def test_a_local_folder_is_loaded_by_datasets(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(row() + b"\n" + row(prompt="1+1?") + b"\n")
    loaded = load_rows(tmp_path)
    assert loaded["prompt"] == ["2+2?", "1+1?"] and loaded[0] == GOOD
    with pytest.raises(ValueError, match=r"expected columns .* \['text'\] are not among"):
        load_rows(tmp_path, ("text",))


def test_rows_of_a_folder_are_checked_like_those_of_a_file(tmp_path, capsys):
    good = [{"role": "user", "content": "4"}]
    rows = [{"prompt": "2+2?", "chosen": good, "rejected": [{"role": "user", "content": "5"}]},
            {"prompt": "1+1?", "chosen": good, "rejected": good},
            {"prompt": None, "chosen": good, "rejected": []}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert load_rows(tmp_path)["prompt"] == ["2+2?"]  # a text prompt before messages
    assert "1 rows accepted, 2 rejected, first row 1: chosen and rejected are the same" \
        in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no row has"):
        load_rows(tmp_path)
    assert load_rows(tmp_path, ()).column_names == ["prompt", "chosen", "rejected"]


def test_rows_of_one_prompt_never_part(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = random.Random(0)
    prompts = [f"Question {i}?" for i in range(300)]
    variants = [p for p in prompts for p in (p, p.upper(), f"  {p}\n", p.replace(" ", "  "))]
    rng.shuffle(variants)
    dataset = datasets.Dataset.from_list([{"prompt": p, "row": i} for i, p in enumerate(variants)])
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    parts = split_by_group(dataset, fractions, seed=1)
    assert sorted(r for part in parts.values() for r in part["row"]) == list(range(1200))
    groups = {name: {data.same_prompt(r) for r in part} for name, part in parts.items()}
    assert sum(map(len, groups.values())) == 300
    assert abs(len(groups["train"]) / 300 - 0.8) < 0.08
    again = split_by_group(dataset.select(range(600)), fractions, seed=1)
    for name, part in again.items():  # fewer rows: nobody moves
        assert {data.same_prompt(r) for r in part} <= groups[name]
    other = split_by_group(dataset, fractions, seed=2)
    assert {data.same_prompt(r) for r in other["test"]} != groups["test"]


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1, "b": 0}])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions: expected positive ones that add up to 1"):
        split_by_group([], fractions, seed=0)


def test_import_is_light():
    code = ("import sys, alignkit.data; heavy = {'torch', 'datasets', 'numpy', 'pandas'}"
            " & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
