"""`alignkit run j1 --model M --data F` and `--scale small`, on a miniature of the paper's class and files with the sets' columns."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from alignkit import cli, runs
from alignkit.generate.model import LocalModel
from alignkit.generate.text import Scripted
from alignkit.judging import metrics
from alignkit.judging.judges import Judge
from alignkit.judging.pairs import read_pairs
from alignkit.judging.verdicts import Choice
from alignkit.models.language import from_seed, quiet_transformers
from alignkit.own import run_jobs
from alignkit.papers import j1, j1_own, j1_small

SIZES = {"updates": "2", "traces": "8", "sft_epochs": "1", "sft_batch": "8", "sft_lr": "0.001", "waits": "1",
         "max_new_tokens": "12", "answer_tokens": "4", "max_tokens": "512", "batch_size": "4"}
PAIRS = [{"prompt": f"What is {i} + {i}?", "chosen": f"{2 * i}.", "rejected": f"It is {i}{i}."} for i in range(1, 21)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def saved_qwen(folder, texts):
    "A `Qwen2ForCausalLM` with random weights, and a tokenizer without a chat template."
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    with quiet_transformers():
        from_seed(transformers.Qwen2ForCausalLM, config, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A folder with a model, pairs (one of them broken) and traces."
    folder = tmp_path_factory.mktemp("mine")
    jsonl(folder / "pairs.jsonl", [*PAIRS, {"prompt": "a", "chosen": "b"}])
    jsonl(folder / "few.jsonl", PAIRS[:3])
    pairs = read_pairs(folder / "pairs.jsonl")
    teacher = Judge(Scripted(lambda request: "<think>Hm.</think>[[A]]"), Choice())
    traces = j1_own.demonstrate(teacher, pairs)
    assert len(traces) == len(pairs.tasks)  # of each pair the order in which A is better
    assert {trace["completion"] for trace in traces} == {"<think>Hm.</think>[[A]]"}
    jsonl(folder / "traces.jsonl", [*traces, {"prompt": "a", "completion": "no thought"}])
    jsonl(folder / "thoughtless.jsonl", [{"prompt": "a", "completion": "[[A]]"}])
    saved_qwen(folder / "model", [trace["prompt"] + trace["completion"] for trace in traces] * 3)
    return folder


def config_of(mine, **changes):
    return j1_own.own_config(str(mine / "model"), str(mine / "pairs.jsonl"), **{**SIZES, **changes})


def test_every_stage_runs_once(mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {**SIZES, "demonstrations": mine / "traces.jsonl"}
    command = ["run", "j1", "--model", str(mine / "model"), "--data", str(mine / "pairs.jsonl"), "--out", "out",
               "--first-seed", "7", "--set", *(f"{name}={value}" for name, value in changes.items())]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "20 rows accepted, 1 rejected" in said and "1 of 21 rows left out" in said
    assert [line for line in said.splitlines() if line in ("base:", "sft:", "rl:")] == ["base:", "sft:", "rl:"]
    policies = [line.removeprefix("policy: ") for line in said.splitlines() if line.startswith("policy: ")]
    assert [policy.split("/")[2].partition("-")[0] for policy in policies] == ["imitate_own", "reinforce_own"]
    with quiet_transformers():
        base, sft, rl = (transformers.AutoModelForCausalLM.from_pretrained(place)
                         for place in (mine / "model", *policies))
    assert type(rl) is transformers.Qwen2ForCausalLM
    assert not torch.equal(sft.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(rl.model.embed_tokens.weight, base.model.embed_tokens.weight)
    records = {(r.stage, r.arm): r for r in runs.load_records("out", "j1")}
    assert set(records) == {("imitate_own", "sft"), ("reinforce_own", "rl"),
                            *(("judge_own", arm) for arm in ("base", "sft", "rl"))}
    assert records["reinforce_own", "rl"].counts == {"pairs": 18}
    assert records["imitate_own", "sft"].counts == {"traces": 20}
    judged = records["judge_own", "rl"]
    assert judged.seed == 7 and judged.counts["pairs"] == 2 and judged.curves["waits"] == [0, 1]
    assert sum(judged.counts[f"{outcome}_1"] for outcome in
               ("decided", "tie", "missing", "malformed", "unfinished")) == 4
    assert j1_own.worth(judged).shape == (2, 2)
    assert judged.texts["waits_1"][0].startswith("<think>") and "</think>" in judged.texts["waits_1"][0]
    monkeypatch.setattr(LocalModel, "generate", None)  # nobody is asked again
    assert cli.main(command) == 0


def test_a_judging_that_died_repeats_no_answer(mine, tmp_path, monkeypatch):
    [job] = [job for job in j1_own.own_jobs(config_of(mine, judged_pairs="3", judged=str(mine / "pairs.jsonl")), 0)
             if job.arm == "base"]
    generate, asked = LocalModel.generate, []

    def dies_third(self, requests):
        if len(asked) == 2:
            raise OSError("the power went out")
        asked.append(len(requests))
        return generate(self, requests)

    monkeypatch.setattr(LocalModel, "generate", dies_third)
    with pytest.raises(runs.JobsFailed, match="the power went out"):
        run_jobs([job], tmp_path / "died")
    again = []
    monkeypatch.setattr(LocalModel, "generate", lambda self, requests: (
        again.append(len(requests)), generate(self, requests))[1])
    [resumed] = run_jobs([job], tmp_path / "died")
    part = sum(again)
    [whole] = run_jobs([job], tmp_path / "whole")
    assert sum(asked) + part == sum(again) - part and sum(asked) > 0
    assert resumed.curves == whole.curves and resumed.texts == whole.texts


def test_the_reward_is_one_for_the_right_verdict_alone(mine):
    pairs = read_pairs(mine / "pairs.jsonl")
    rows = j1_own.verdict_rows(j1_own.judge_tokenizer(str(mine / "model")), pairs, 12)
    assert len(rows) == 40 and sum(rows["better"]) == 20
    for row, shown in ((rows[0], (0, 1)), (rows[1], (1, 0))):
        texts = [pairs.tasks[0].answers[i] for i in shown]
        assert row["prompt"].index(texts[0]) < row["prompt"].index(texts[1])
        assert texts[row["better"]] == "2." and row["prompt"].endswith("<think>")
    said = ["</think>[[A]]", "</think>[[B]]", "[[A]]", "</think>", "</think>[[C]]", "</think>[[A]] or [[B]]"]
    assert j1_own.right_verdict(said, [0] * 6, [""] * 6) == [1, 0, 0, 0, 0, 0]
    assert j1_own.right_verdict(["</think>[[A]]", "</think>[[aa:A]]"], [0, 0], ["aa", "aa"], prompts=[]) == [0, 1]


def test_no_prompt_is_both_learned_on_and_judged(mine, tmp_path):
    path = jsonl(tmp_path / "twice.jsonl", [*PAIRS, *({**row, "rejected": "No."} for row in PAIRS)])
    config = replace(config_of(mine), data=path)
    learned = {task.prompt for task in j1_own.rewarded_pairs(config, 0).tasks}
    judged = j1_own.pairs_to_judge(config, 0).pairs
    assert len(learned) == 18 and len(judged.tasks) == 4
    assert not learned & {task.prompt for task in judged.tasks}
    other = j1_own.pairs_to_judge(config, 1).pairs
    assert {task.prompt for task in other.tasks} != {task.prompt for task in judged.tasks}
    everything = replace(config, judged=path)
    assert len(j1_own.rewarded_pairs(everything, 0).tasks) == len(j1_own.pairs_to_judge(everything, 0).pairs.tasks) == 40


def stand_ins(folder):
    "The paper's sets, small, by the names of `OwnConfig.judged`."
    bench = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "subset": "hep-go"} for i in range(4)]
    math = [{"problem": f"{i}+1?", "eval_solution_A": ["2."], "eval_solution_B": ["3."], "chosen_position": "AB"[i % 2]}
            for i in range(4)]
    code = [{"instruction": f"Sort {i}.", "choices": ["a.sort()", "sorted(a)"], "gt_choice": i % 2} for i in range(4)]
    talk = [{"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.", "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: Go."}
            for i in range(4)]
    (folder / "codeprefbench").mkdir()
    (folder / "RewardMATH_pairwise.json").write_text(json.dumps(math))
    jsonl(folder / "codeprefbench" / "human-preference-alignment.jsonl", code)
    return {"rewardbench": f"rewardbench:{jsonl(folder / 'filtered.jsonl', bench)}",
            "hh-harmless": f"hh-harmless:{jsonl(folder / 'test.jsonl', talk)}"}


def test_the_papers_names_load_through_stand_ins(mine, tmp_path, monkeypatch, capsys):
    assert j1.Config.paper() == j1_own.OwnConfig.paper()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "j1", "--scale", "paper"]) == 2
    assert "--set judged: expected a file, got 'RewardMATH_pairwise.json'" in capsys.readouterr().err
    places = stand_ins(tmp_path)
    rise = [{"q": f"{language} {i}?", "a": "1", "b": "2", "said": f"So [[{'AB'[i % 2]}]]"}
            for i in range(3) for language in ("What is", "什么")]
    names = j1_own.OwnConfig.paper().judged.split(",")
    judged = ",".join(places.get(name, name) for name in names)
    changes = {**SIZES, "device": "cpu", "judged": judged, "columns": "question=q,first=a,second=b,judgement=said"}
    config = j1_own.own_config(str(mine / "model"), f"rise:{jsonl(tmp_path / 'rise.jsonl', rise)}",
                               base=j1_own.OwnConfig.paper(), **changes)
    learned = j1_own.rewarded_pairs(config, 0)
    assert [task.prompt for task in learned.tasks] == [f"What is {i}?" for i in range(3)]
    assert learned.labels.tolist() == [0, 1, 0]
    jobs = j1_own.own_jobs(config, 0)
    sets = ("rewardbench", "rewardmath", "codeprefbench", "hh-harmless")
    assert [job.arm for job in jobs] == ["rl", *(f"{arm}-{name}" for name in sets for arm in ("base", "rl"))]
    assert j1.jobs(config, [0]) == jobs
    records = {r.arm: r for r in run_jobs([job for job in jobs if job.arm.startswith("base")], tmp_path / "out")}
    for name, score, unread in (("rewardbench", "Score_1", 0.5), ("codeprefbench", "Score_1", 0.5),
                                ("rewardmath", "pairwise_1", 0.0)):
        record = records[f"base-{name}"]
        assert record.counts["decided_1"] == 0 and record.scalars[score] == unread
        assert record.scalars["accuracy_1"] == 0 and record.counts["pairs"] == 4
    assert records["base-hh-harmless"].counts["pairs"] == 4
    with pytest.raises(ValueError, match="^columns: expected a map of"):
        j1_own.rewarded_pairs(replace(config, columns=""), 0)


@pytest.mark.parametrize("data, more, status, message", [
    ("no.jsonl", (), 2, "--data: expected a file"),
    ("pairs.jsonl", ("--scorer", "math:prod"), 2, "--scorer: expected none"),
    ("pairs.jsonl", ("--set", "judged=no.json"), 2, "--set judged: expected a file, got 'no.json'"),
    ("pairs.jsonl", ("--set", "judged=codeprefbench"), 2, "--set judged: expected codeprefbench:FILE"),
    ("pairs.jsonl", ("--set", "demonstrations=no.jsonl"), 2, "--set demonstrations: expected a file"),
    ("pairs.jsonl", ("--set", "waits=0"), 2, "--set waits: expected at least 1"),
    ("pairs.jsonl", ("--set", "max_tokens=8"), 2, "--set: expected 0 < answer_tokens < max_new_tokens"),
    ("pairs.jsonl", ("--set", "without=("), 2, "--set without: expected a regular expression"),
    ("pairs.jsonl", ("--set", "without=.", "judged=pairs.jsonl"), 1, "set without: expected an expression"),
    ("pairs.jsonl", ("--set", "columns=q"), 2, "--set columns: expected ours=theirs"),
    ("pairs.jsonl", ("--set", "speed=1"), 2, "--set: expected some of"),
    ("pairs.jsonl", ("--model", "nowhere"), 1, "model: expected a folder or a name on the Hub"),
    ("pairs.jsonl", ("--set", "max_tokens=64"), 1, "set max_tokens: expected room for a question"),
    ("pairs.jsonl", ("--set", "demonstrations=thoughtless.jsonl"), 1, "set demonstrations: expected completions"),
    ("few.jsonl", (), 1, "data: expected at least 4 different prompts")])  # fmt: skip
def test_what_is_wrong_is_said_by_name(mine, tmp_path, monkeypatch, capsys, data, more, status, message):
    monkeypatch.chdir(mine)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sizes = [f"{name}={value}" for name, value in SIZES.items() if not any(name in word for word in more)]
    command = ["run", "j1", "--model", str(mine / "model"), "--data", str(mine / data), "--out", str(tmp_path),
               "--set", *sizes, *more]
    assert cli.main(command) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_the_small_model_on_llmbar(mine, tmp_path, monkeypatch, capsys):
    command = ["run", "j1", "--scale", "small", "--jobs", "1", "--out", str(tmp_path / "out")]
    monkeypatch.delenv("ALIGNKIT_DATA", raising=False)
    assert cli.main(command) == 1
    assert "set the environment variable ALIGNKIT_DATA to the folder that holds llmbar" in capsys.readouterr().err
    monkeypatch.setenv("ALIGNKIT_DATA", str(tmp_path))
    assert cli.main(command) == 1
    assert "expected Natural/dataset.json in LLMBar's folder" in capsys.readouterr().err
    for count, name in enumerate(j1_small.SUBSETS.values(), 2):
        folder = tmp_path / "llmbar" / name
        folder.mkdir(parents=True)
        rows = [{"input": f"{i}?", "output_1": "yes", "output_2": "no", "label": 1 + i % 2} for i in range(count)]
        (folder / "dataset.json").write_text(json.dumps(rows))
    shutil.copytree(mine / "model", tmp_path / "chat")
    j1_own.judge_tokenizer(str(mine / "model")).save_pretrained(tmp_path / "chat")
    monkeypatch.setenv("ALIGNKIT_SMALL_MODEL", str(tmp_path / "chat"))
    monkeypatch.setattr(j1_small.SmallConfig, "__init__", _short(j1_small.SmallConfig.__init__))
    assert cli.main(command) == 0
    results = {claim["key"]: claim for claim in json.loads((tmp_path / "out" / "j1.json").read_bytes())["claims"]}
    assert set(results) == {claim.key for claim in j1_small.small_claims()}
    others = {key for key, claim in results.items() if claim["verdict"] != "reported"}
    assert others <= {"8c.position-bias-0", "8c.position-bias-3"}  # of no decided verdict there is none
    records = runs.load_records(tmp_path / "out", "j1")
    assert [len({r.arm for r in records}), len(records)] == [5, 5]  # of the first seed alone
    labels, verdicts = j1_small.pooled(records)[100]
    assert verdicts.shape == (2 + 3 + 4 + 4 + 4, 2, 4)  # at most 4 of each
    right, half = (metrics.credit(verdicts, labels, unread).mean(1) for unread in (0, 0.5))
    assert np.allclose(right, np.concatenate([j1_own.worth(r) for r in records]))
    figures = {claim.key: claim.figure(records)[100] for claim in j1_small.small_claims()}
    assert figures["8c.accuracy-3"] == pytest.approx(right[:, 3].mean())
    assert figures["8c.accuracy-half-0"] == pytest.approx(half[:, 0].mean())
    assert figures["8c.slope"] == pytest.approx(np.polyfit(range(4), right.mean(0), 1)[0], abs=1e-12)
    assert figures["8c.consistency-3"] == metrics.consistent(verdicts[:, :, 3]).mean()
    assert 0 <= figures["8c.unread-0"] <= 1


def _short(init):
    "A constructor with a smaller budget, unless one is given."
    def short(self, **fields):
        init(self, **{"pairs": 4, "thinking_tokens": 8, **fields})

    return short
