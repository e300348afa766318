"""Verdicts at their edges, and a results file that cannot say what nobody measured."""

import json
import os

import numpy as np
import pytest

from alignkit import claims as c
from alignkit.claims import AtMost, Claim, Exact, Greater, NotTested, Reported, Within
from alignkit.runs import Record

PROVENANCE = {"commit": "abc1234", "machine": {"processor": "cpu", "cores": 2}, "versions": {}}


def record(arm, seed, gold, commit="abc1234"):
    return Record(f"{arm}{seed}", "bspo", "train", arm, seed, {"gold": gold}, {}, {}, 1.0, commit,
                  {}, {})


def records(a, b, first=100):
    """Records of arms "a" and "b", one a seed."""
    return [record(arm, first + i, gold) for arm, golds in (("a", a), ("b", b))
            for i, gold in enumerate(golds)]


def gain(found):
    return c.difference(c.scalar(found, "a", "gold"), c.scalar(found, "b", "gold"))


def claim(accept=Greater(), key="9b.3-b", figure=gain, arms=("a", "b"), scale="mini"):  # noqa: B008
    return Claim(key, "a beats b", "2.1", "figure 4", scale, arms, figure, accept)


def verdict(accept, a, b=None):
    [result] = c.evaluate([claim(accept)], records(a, [0.0] * len(a) if b is None else b))
    return result["verdict"]


def write(path, results, **changed):
    known = dict(paper="bspo", arxiv="2503.18130", scale="mini", seeds=[100], seconds=1.0,
                 provenance=PROVENANCE)
    return c.write_results(path, claims=results, **{**known, **changed})


@pytest.fixture
def good():
    [result] = c.evaluate([claim()], records(np.arange(1.0, 11.0), [0.0] * 10))
    return result


@pytest.mark.parametrize("accept, figures, expected", [
    (Greater(), [1.0] * 10, "reproduced"),
    (Greater(margin=1.0), [1.0] * 10, "reproduced"),  # at the margin counts
    (Greater(margin=1.1), [1.0] * 10, "direction only"),
    (Greater(), [-1.0] * 10, "not reproduced"),
    (Greater(), [0.0] * 10, "not reproduced"),
    (Greater(seeds=5), [1.0] * 5, "reproduced"),
    (Greater(seeds=5), [1.0] * 4 + [-0.1], "not reproduced"),  # five seeds must agree
    (Greater(), [1.0] * 9, "not tested"),
    (AtMost(1.0), [0.9] * 10, "reproduced"),
    (AtMost(1.0), [1.0] * 10, "not reproduced"),
    (Within(1.0), [0.5, -0.5] * 5, "reproduced"),
    (Within(1.0), [-1.5] * 10, "not reproduced"),
    (Exact(1e-9), [1e-10], "reproduced"),
    (Exact(1e-9), [0.0, -1e-8], "not reproduced"),
    (Reported(), [1.0, 2.0], "reported"),
    (NotTested("next issue"), [1.0] * 10, "not tested"),
])
def test_verdicts(accept, figures, expected):
    assert verdict(accept, figures) == expected


def test_every_rule_has_words_or_none():
    assert [r.words for r in (Reported(), NotTested("x"))] == [None, None]
    assert "at least 2" in Greater(2).words and "±3" in Within(3).words
    assert "at most 4" in AtMost(4).words and "1e-09" in Exact(1e-9).words


@pytest.mark.parametrize("rule", [Greater, lambda seeds: AtMost(1, seeds),
                                  lambda seeds: Within(1, seeds)])
def test_a_rule_that_no_figures_could_meet_is_refused(rule):
    with pytest.raises(ValueError, match="seeds: .* at least 5, got 4"):
        rule(seeds=4)


def test_too_few_seeds_print_figures_and_decide_nothing():
    [result] = c.evaluate([claim()], records([3.0, 2.0], [0.0, 0.0]))
    assert result["note"] == "2 of 10 seeds" and result["p"] is None
    assert result["value"] == 2.5 and result["per_seed"] == [3.0, 2.0]
    assert result["ci95"] is None


def test_a_missing_arm_is_a_reason():
    [result] = c.evaluate([claim()], [record("a", s, 1.0) for s in range(10)])
    assert result["verdict"] == "not tested" and "no record of b for seeds 0–9" in result["note"]
    [result] = c.evaluate([claim()], [])
    assert result["verdict"] == "not tested" and "no record of a, b" in result["note"]


def test_incomplete_seeds_are_set_aside_by_name():
    [result] = c.evaluate([claim()], records([1.0] * 12, [0.0] * 11))
    assert result["verdict"] == "reproduced" and result["seeds"] == list(range(100, 111))
    assert "no record of b for seeds 111" in result["note"]


def test_order_of_records_does_not_matter(good):
    shuffled = records(np.arange(1.0, 11.0), [0.0] * 10)
    np.random.default_rng(0).shuffle(shuffled)
    assert c.evaluate([claim()], shuffled) == [good]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_disqualifies_the_claim(value, tmp_path):
    [result] = c.evaluate([claim()], records([1.0] * 9 + [value], [0.0] * 10))
    assert result["verdict"] == "not tested" and f"figure of seed 109 is {value}" in result["note"]
    assert result["per_seed"] == [] and result["value"] is None
    write(tmp_path / "bspo.json", [result])


def test_a_figure_may_leave_seeds_out():
    def some(found):
        return {seed: x for seed, x in gain(found).items() if seed != 104}

    [result] = c.evaluate([claim(Greater(seeds=9), figure=some)], records([1.0] * 10, [0.0] * 10))
    assert result["verdict"] == "reproduced" and result["note"] == "no figure for seeds 104"


def test_two_records_of_a_seed_are_refused():
    with pytest.raises(ValueError, match="two of a hold 'gold' for seed 100"):
        c.scalar([record("a", 100, 1.0), record("a", 100, 2.0)], "a", "gold")


def test_commits_of_all_records_used():
    mixed = [record(arm, s, 1.0, commit="old" if s < 5 else "new")
             for arm in "ab" for s in range(10)]
    [result] = c.evaluate([claim()], mixed)
    assert result["commit"] == "new, old"


def test_smoke_scale_decides_nothing():
    listed = [claim(), claim(Exact(1.0), key="9a.1"), claim(Reported(), key="9c.1", scale="small")]
    for result in c.evaluate(listed, records([1.0] * 10, [0.0] * 10), scale="smoke"):
        assert (result["verdict"], result["scale"]) == ("not tested", "smoke")
        assert "smoke scale decides nothing" in result["note"] and result["value"] == 1.0


def test_a_claim_belongs_to_one_scale():
    listed = [claim(), claim(key="9c.1", scale="small")]
    found = c.evaluate(listed, records([1.0] * 10, [0.0] * 10), scale="small")
    assert [r["key"] for r in found] == ["9c.1"]


@pytest.mark.parametrize("make, message", [
    (lambda: claim(scale="tiny"), "scale: .*'tiny'"),
    (lambda: claim(figure=None), "figure: 9b.3-b has a rule"),
    (lambda: c.evaluate([claim(), claim()], []), "claims: key '9b.3-b' is used twice"),
    (lambda: c.evaluate([claim()], [], scale="tiny"), "scale: .*'tiny'"),
])
def test_bad_claims_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("key, only, expected", [
    ("9b.3", ["9b.3"], True), ("9b.3-WCO", ["9b.3"], True), ("9b.3-WCO", ["9b.3-WCO"], True),
    ("9b.31", ["9b.3"], False), ("9b.3", ["9b.3-WCO"], False), ("M4", [], True),
    ("9b.control", ["9a.1", "9b.control"], True), ("9b.3-PPO-KL", "9b.3-PPO", True),
    ("9b.3-WCO", ["9b"], True), ("9a.1", ["9b"], False),
])
def test_matches(key, only, expected):
    assert c.matches(key, only) is expected


def test_holm_is_over_the_claims_that_have_a_p():
    listed = [{"key": str(i), "p": p} for i, p in enumerate([0.01, None, 0.03])]
    assert c.holm_by_key(listed) == {"0": 0.02, "2": 0.03}


# The results file


def test_round_trip(good, tmp_path):
    written = write(tmp_path / "bspo.json", [good])
    assert c.load_results(tmp_path / "bspo.json") == written
    assert written["claims"] == [good]
    contract = {"key", "statement", "paper_value", "source", "accept", "value", "ci95", "p",
                "per_seed", "exact", "verdict", "note", "scale", "seeds", "commit"}
    assert set(good) == contract


@pytest.mark.parametrize("name", ["key", "statement", "source", "scale", "seeds", "commit",
                                  "accept", "value", "ci95", "p", "per_seed", "exact", "verdict",
                                  "note", "paper_value"])
def test_a_claim_with_a_field_missing_cannot_be_written(name, good, tmp_path):
    with pytest.raises((ValueError, KeyError), match=name):
        write(tmp_path / "bspo.json", [{k: v for k, v in good.items() if k != name}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    {"per_seed": [], "seeds": [], "value": None}, {"seeds": []}, {"seeds": [100] * 10}, {"seeds": [[1]] * 10},
    {"accept": None}, {"value": 99.0}, {"value": None}, {"p": None}, {"p": 1.5}, {"p": 0},
    {"p": float("nan")}, {"ci95": [2.0, 1.0]}, {"ci95": [1.0]}, {"ci95": [1.0, float("inf")]},
    {"per_seed": [float("nan")] * 10}, {"per_seed": ["1"] * 10}, {"verdict": "proved"},
    {"verdict": "not tested"}, {"scale": "tiny"}, {"key": ""}, {"statement": ""}, {"exact": 1},
])
def test_a_claim_that_nothing_stands_behind_cannot_be_written(change, good, tmp_path):
    with pytest.raises(ValueError, match="claim "):
        write(tmp_path / "bspo.json", [{**good, **change}])
    assert not list(tmp_path.iterdir())


def test_no_commit_anywhere_cannot_be_written(good, tmp_path):
    with pytest.raises(ValueError, match="commit may not be ''"):
        write(tmp_path / "bspo.json", [{**good, "commit": ""}],
              provenance={**PROVENANCE, "commit": ""})


def test_a_run_replaces_only_what_it_evaluated(good, tmp_path):
    path = tmp_path / "bspo.json"
    write(path, [{**good, "key": key} for key in ("9b.10", "9b.2", "9a.1")])
    write(path, [{**good, "key": "9b.2", "note": "again"}], seeds=[7], seconds=2.0)
    merged = c.load_results(path)
    assert [r["key"] for r in merged["claims"]] == ["9a.1", "9b.2", "9b.10"]
    assert [r["note"] for r in merged["claims"]] == ["", "again", ""]
    assert (merged["seeds"], merged["seconds"]) == ([7], 2.0)


@pytest.mark.parametrize("change, message", [
    ({"scale": "smoke"}, "holds 9b.3-b at mini, not smoke"),
    ({}, "holds bspo, not j1"),
])
def test_other_scales_and_papers_do_not_mix(change, message, good, tmp_path):
    path = tmp_path / "bspo.json"
    write(path, [good])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write(path, [{**good, **change}], paper="bspo" if change else "j1")
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(good, tmp_path, monkeypatch):
    path = tmp_path / "bspo.json"
    write(path, [good])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no room"):
        write(path, [{**good, "note": "new"}])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["bspo.json"]


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[:200], "bspo.json"),
    (lambda text: text.replace('"seconds": 1.0', '"seconds": NaN'), "NaN is not a number"),
    (lambda text: text.replace('"reproduced"', '"proved"'), "verdict may not be 'proved'"),
    (lambda text: text.replace('"machine"', '"maschine"'), "machine is missing"),
    (lambda text: "[]", "bspo.json"),
    (lambda text: json.dumps({**json.loads(text), "claims": ["x"]}), "bspo.json"),
])
def test_a_damaged_file_is_named(damage, message, good, tmp_path):
    path = tmp_path / "bspo.json"
    write(path, [good])
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        c.load_results(path)


@pytest.mark.parametrize("name", ["key", "statement", "source"])
def test_a_claim_without_text_is_refused_when_it_is_made(name):
    parts = {"key": "1", "statement": "s", "paper_value": "1.0", "source": "Table 1"} | {name: ""}
    with pytest.raises(ValueError, match=f"^{name}: "):
        Claim(**parts, scale="mini", arms=(), figure=lambda records: {}, accept=Reported())
