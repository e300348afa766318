"""What is timed beside the operators: peers that agree, goals that are judged, a record that renders."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from ops_cases import require

from alignkit import ops
from alignkit.ops import bench, peers

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"
SMALL = {
    "gae": partial(bench.gae_case, 5, 37),
    "rows end early": partial(bench.masked_gae_case, 5, 37, False),
    "scattered mask": partial(bench.masked_gae_case, 5, 37, True),
    "truncated": partial(bench.truncated_gae_case, 5, 200),
    "supported_gae": partial(bench.supported_gae_case, 5, 37),
    "from logits": partial(bench.from_logits_case, 2, 9, 101),
    "dual_gae": partial(bench.dual_gae_case, 5, 37),
    "grouped": partial(bench.grouped_case, 7, 4),
    "Dr. GRPO": partial(bench.unscaled_case, 7, 4, "mean"),
    "RLOO": partial(bench.unscaled_case, 7, 4, "loo"),
    "ragged": partial(bench.ragged_case, 7, 4),
    "grouped_comparison": partial(bench.grouped_comparison_case, 6, 4),
    "clipped_policy_loss": partial(bench.clipped_policy_loss_case, 5, 37),
    "attention_fusion": partial(bench.attention_fusion_case, 3, 5, 2, 16, 4, False),
    "attention_fusion with gradient": partial(bench.attention_fusion_case, 3, 5, 2, 16, 4, True),
    "token_logps": partial(bench.token_logps_case, 6, 101, torch.float32),
    "token_logps bfloat16": partial(bench.token_logps_case, 6, 102, torch.bfloat16),
    "sample_tokens": partial(bench.sample_tokens_case, 6, 101, torch.float32),
    "sample_tokens bfloat16": partial(bench.sample_tokens_case, 6, 102, torch.bfloat16),
}
COLUMNS = {"op", "variant", "shape", "dtype", "device", "threads", "clock", "moved", "kind", "peer", "rounds",
           "ours_us", "ours_quartiles_us", "peer_us", "peer_quartiles_us", "ratio", "ratio_quartiles",
           "copy_share", "goal", "met", "kernel_share"}  # fmt: skip


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Compiled peers are traced, not compiled: that takes half a minute each."""
    require("cpu")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()


@pytest.mark.parametrize("name", SMALL)
def test_every_peer_agrees(name):
    case = SMALL[name]("cpu")
    installed = [peer for peer in case.peers if not bench.missing(peer.needs)]
    assert installed
    for peer in installed:
        assert bench.difference(case, peer) <= 10 * peer.tolerance


def test_every_way_to_make_a_case_is_tried_here():
    made = {planned.make.func for plans in bench.CASES.values() for planned in plans}
    assert made == {make.func for make in SMALL.values()}


def test_a_peer_that_is_wrong_is_not_timed():
    case = SMALL["gae"]("cpu")
    wrong = case._replace(peers=[bench.Peer("wrong", lambda: torch.ones(5, 37))])
    with pytest.raises(AssertionError, match=r"gae\(5, 37\), wrong: .*not close"):
        bench.measure(wrong, "cpu")


def test_bfloat16_peers_are_shown_to_be_off():
    case = SMALL["token_logps bfloat16"]("cpu")
    off = {peer.name: bench.difference(case, peer) for peer in case.peers if not bench.missing(peer.needs)}
    assert off[bench.LOG_SOFTMAX] > 1e-3 > 1e-5 > off[bench.UPCAST]


def test_what_is_not_installed_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchrl" else find(name))
    rows = {row["peer"]: row for row in bench.measure(SMALL["gae"]("cpu"), "cpu", rounds=3)}
    assert rows[bench.TORCHRL]["skipped"] == "torchrl is not installed: pip install 'alignkit[bench]'"
    assert rows[bench.TORCHRL]["skipped"] in bench.line(rows[bench.TORCHRL])
    assert "skipped" not in rows[bench.LOOP]


def test_rows_judge_their_goals():
    case, goals = SMALL["supported_gae"]("cpu"), {bench.LOOP: 1e-9, bench.COPY: 1e9}
    rows = {row["peer"]: row for row in bench.measure(case, "cpu", rounds=4, goals=goals)}
    assert set(rows) == {bench.LOOP, bench.COPY, bench.COLD_COPY, bench.PLAIN}
    assert all(set(row) - {"difference"} == COLUMNS for row in rows.values())
    assert [rows[name]["met"] for name in (bench.LOOP, bench.COPY, bench.PLAIN)] == [True, False, None]
    loop = rows[bench.LOOP]
    low, high = loop["ratio_quartiles"]
    assert low <= loop["ratio"] <= high and loop["rounds"] == 4
    assert 0 < loop["kernel_share"] < 1
    assert "✓" in bench.line(loop) and "✗" in bench.line(rows[bench.COPY])
    with pytest.raises(ValueError, match="goals: expected some of .*, got .*'numbaa'"):
        bench.measure(case, "cpu", goals={"numbaa": 2.0})


def test_the_share_of_a_call_in_the_kernel():
    x = torch.randn(2**18)
    assert bench.kernel_share(partial(ops.grouped_advantage, x[:8], 4)) < 0.5
    assert bench.kernel_share(partial(ops.grouped_advantage, x, 16)) > 0.5
    assert bench.kernel_share(lambda: x.exp()) == 0


def test_the_slow_run_fewer_rounds_and_the_quick_several_times(monkeypatch):
    ran = {"slow": 0, "quick": 0}

    def count(name):
        ran[name] += 1
        if name == "slow":
            sum(range(200_000))

    monkeypatch.setattr(bench, "PATIENCE", 0.004)
    monkeypatch.setattr(bench, "FLUSH", 64)
    runs = {name: partial(count, name) for name in ran}
    times = bench.alternate(runs, "cpu", rounds=8, cold={"cold": runs["quick"]})
    assert 3 <= len(times["slow"]) < len(times["quick"]) == len(times["cold"]) == 8
    assert ran["slow"] == len(times["slow"]) + 2 and ran["quick"] > 30


def test_bench_restores_threads_and_refuses_unknown_names(monkeypatch):
    monkeypatch.setitem(bench.CASES, "gae", [bench.Planned(SMALL["rows end early"])])
    before = torch.get_num_threads()
    rows = list(bench.bench(["gae"], rounds=3, device="cpu", threads=2))
    assert torch.get_num_threads() == before
    assert {(row["threads"], row["clock"]) for row in rows} == {(2, "wall")}
    (one, *_) = bench.bench(["gae"], rounds=3, device="cpu")
    assert (one["threads"], one["clock"]) == (1, "CPU time of the thread")
    with pytest.raises(ValueError, match="names: expected some of .*, got .*'gea'"):
        bench.bench(["gea"])


def script():
    spec = importlib.util.spec_from_file_location("kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_records_and_replaces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", {"gae": [bench.Planned(SMALL["scattered mask"], {bench.LOOP: 1})],
                                         "dual_gae": [bench.Planned(SMALL["dual_gae"])]})
    monkeypatch.setattr(bench, "overhead", lambda: [bench._figure("a call", 3.0, "µs", 5.0)])
    monkeypatch.setattr(bench, "contention", lambda: [bench._figure("two threads", 3.0, "×", 2.0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels = script()
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["kernels.py", "--rounds", "3"])
    kernels.main()
    recording = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {"date", "commit", "machine", "versions", "rows", "overhead", "contention"} <= set(recording)
    assert recording["machine"]["processor"] and recording["versions"]["torch"]
    first = recording["rows"]
    assert [row["op"] for row in first] == ["gae"] * 4 + ["dual_gae"] * 4
    monkeypatch.setattr("sys.argv", ["kernels.py", "gae", "--rounds", "3"])
    kernels.main()
    second = json.loads((tmp_path / "kernels_cpu.json").read_text())["rows"]
    assert second[4:] == first[4:] and second[:4] != first[:4]
    printed = capsys.readouterr().out
    assert "a call" in printed and "goal at most 2 ✗" in printed and bench.line(second[0]) in printed


def test_the_committed_record_renders():
    recording = bench.recorded()
    assert {row["op"] for row in recording["rows"]} == set(bench.CASES)
    timed = [row for row in recording["rows"] if "skipped" not in row]
    assert all(COLUMNS <= set(row) and row["commit"] and row["date"] for row in timed)
    asked = {(op, peer) for op, plans in bench.CASES.items() for planned in plans for peer in planned.goals}
    assert asked <= {(row["op"], row["peer"]) for row in timed if row["goal"]}
    for row in timed:
        assert row["met"] == (row["goal"] and row["ratio"] >= row["goal"])
    for op in bench.CASES:
        rows = bench.rows_of(recording, op)
        shown = [text for text in bench.table(rows).splitlines()[1:] if text.startswith("  ")]
        assert all(row["peer"] in text for row, text in zip(rows, shown, strict=True))
        assert max(map(len, bench.table(rows).splitlines())) <= 110
        figure = bench.roofline(recording, op)
        axes = figure.axes[0]
        cases = {(*row["shape"], row["variant"], row["dtype"]) for row in rows}
        assert axes.get_title(loc="left") and len(axes.get_yticklabels()) == len(cases)
        plt.close(figure)
    assert recording["machine"]["processor"] in bench.origin(recording)


def test_error_table_has_a_column_for_every_backend():
    head, *lines = bench.error_table("grouped_advantage").splitlines()
    assert "torch" in head and "C++" in head and len(lines) == 2
    assert all(float(x) < 1e-5 for text in lines for x in text.split()[2:])
    assert bench.largest_error("gae", "cpu", torch.float32) < 1e-5


def test_loops_without_an_operator_by_hand():
    """One row, three tokens, the second written by a tool: its neighbours see past it."""
    r, v = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[0.5, 7.0, 1.0, 0.0]])
    found = peers.masked_gae_loop(r, v, torch.tensor([[1.0, 0.0, 1.0]]), 1.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[1 + 1 - 0.5 + 1.0, 0.0, 1.0]]))
    cut = peers.truncated_gae_loop(r, v, torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]]),
                                   torch.tensor([[0.0, 4.0, 0.0]]), 1.0, 1.0)
    torch.testing.assert_close(cut, torch.tensor([[1 + 7 - 0.5 + 6, 9 + 4 - 7.0, 1.0]]))
