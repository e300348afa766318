"""`alignkit run bspo --model M --data F`: the reader's own model, comparisons and reward function."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import datasets
import own_steps
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkit import cli, runs
from alignkit.models.language import quiet_transformers, tiny_causal_lm
from alignkit.papers import bspo, bspo_own
from alignkit.worlds.grammar import TokenGrammar, grammar_tokenizer, preference_dataset

ALIGNKIT = Path(sys.executable).with_name("alignkit")
STEPS = Path(__file__).with_name("own_steps.py")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SIZES = ("iterations=30", "completions=8", "max_new_tokens=8", "group_size=2", "scorelm_batch=8")
REWARDS = '''
def words_e(prompts, completions, **columns):
    return [None if prompt == "a" else float(text.count("e"))
            for prompt, text in zip(prompts, completions)]

def too_few(prompts, completions, **columns):
    return [1.0]

def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(completions)
'''


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A folder with a model, comparisons (one of them broken), prompts and reward functions."
    folder = tmp_path_factory.mktemp("mine")
    with quiet_transformers():
        tiny_causal_lm(grammar_tokenizer(), seed=0).save_pretrained(folder / "model")
    grammar_tokenizer().save_pretrained(folder / "model")
    pairs = list(preference_dataset(TokenGrammar(0), 60, seed=0))
    jsonl(folder / "pairs.jsonl", [*pairs, {"prompt": "a", "chosen": "b"}])
    jsonl(folder / "prompts.jsonl", [{"prompt": word} for word in "abcdef"])
    jsonl(folder / "others.jsonl", [{"question": "a", "answer": "b"}])
    jsonl(folder / "half.jsonl", [{"prompt": "a", "chosen": "b"}])
    jsonl(folder / "few.jsonl", pairs[:1])
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def command(mine, out, data="pairs.jsonl", *more):
    return ["run", "bspo", "--model", str(mine / "model"), "--data", str(mine / data),
            "--out", str(out), "--set", *SIZES, *more]


def run(mine, out, *more):
    return subprocess.run([ALIGNKIT, *command(mine, out, *more)],
                          cwd=mine, capture_output=True, text=True, timeout=300, env=ENV)


def policy_folder(out):
    [folder] = [p for p in out.glob("jobs/train_own_policy-*") if p.is_dir()]
    return folder


def weights(out):
    return hashlib.sha256((policy_folder(out) / "policy/model.safetensors").read_bytes()).digest()


def killed_once(mine, out):
    "Starts the run and kills it in the middle of the policy's rounds."
    child = subprocess.Popen([ALIGNKIT, *command(mine, out)],
                             cwd=mine, env=ENV, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        logs = list(out.glob("jobs/train_own_policy*/log.jsonl"))
        if logs and len(logs[0].read_bytes().splitlines()) >= 2:
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_comparisons_become_a_policy_that_transformers_loads(mine, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(mine, whole, "pairs.jsonl", "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert "60 rows accepted, 1 rejected" in done.stdout
    assert "reward_end" in done.stdout and "Traceback" not in done.stderr
    assert not (whole / "bspo.json").exists()  # no claims
    start = transformers.AutoModelForCausalLM.from_pretrained(mine / "model")
    with quiet_transformers():
        lm = transformers.AutoModelForCausalLM.from_pretrained(policy_folder(whole) / "policy")
        tokenizer = transformers.AutoTokenizer.from_pretrained(policy_folder(whole) / "policy")
    assert not torch.equal(lm.lm_head.weight, start.lm_head.weight)
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    assert lm.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=16).shape == (1, 5)
    killed_once(mine, killed)
    assert not (policy_folder(killed) / "policy").exists()
    assert run(mine, killed).returncode == 0
    assert weights(killed) == weights(whole)
    [record] = [r for r in runs.load_records(whole, "bspo") if r.stage == "train_own_policy"]
    assert len(record.texts["responses"]) == 6 and len(record.curves["reward"]) == 30
    tracked = EventAccumulator(str(whole / "tensorboard" / policy_folder(whole).name)).Reload()
    assert [(e.step, e.value) for e in tracked.Scalars("reward")] == [
        (step, pytest.approx(reward)) for step, reward in enumerate(record.curves["reward"], 1)]
    assert {"supported", "clip_ratio/region_mean", "step_time"} <= set(tracked.Tags()["scalars"])


def test_prompts_and_a_reward_function_are_enough(mine, tmp_path):
    done = run(mine, tmp_path, "prompts.jsonl", "--scorer", "my_rewards:words_e")
    assert done.returncode == 0, done.stderr
    stages = {r.stage: r for r in runs.load_records(tmp_path, "bspo")}
    assert set(stages) == {"measure_initial", "train_own_policy"}
    assert 0 <= stages["measure_initial"].scalars["smallest"] <= 8
    assert all(0 <= x <= 8 for x in stages["train_own_policy"].curves["reward"])


def test_comparisons_and_a_reward_function_use_both(mine):
    changes = dict(change.split("=") for change in SIZES)
    config = bspo_own.own_config(str(mine / "model"), str(mine / "pairs.jsonl"), "math:prod",
                                 **changes)
    *needs, last = bspo_own.own_jobs(config, 0)
    assert [job.stage.__name__ for job in needs] == ["train_own_scorelm", "measure_initial"]
    assert last.needs == tuple(needs)
    assert bspo.jobs(config, [0]) == [*needs, last]


def test_another_file_or_model_is_another_run(mine, tmp_path):
    def key():
        config = bspo_own.own_config(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"))
        return bspo_own.own_jobs(config, 0)[-1].key

    (tmp_path / "model").mkdir()
    for path in (*(mine / "model").iterdir(), mine / "pairs.jsonl"):
        where = tmp_path / path.relative_to(mine)
        where.write_bytes(path.read_bytes())
    first = key()
    assert key() == first
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    second = key()
    weights_file = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(bytes(data))
    assert len({first, second, key()}) == 3


@pytest.mark.parametrize("data, more, status, message", [
    ("no.jsonl", (), 2, "--data: expected a file"),
    ("prompts.jsonl", (), 1, "with prompt alone, a scorer is required"),
    ("others.jsonl", (), 1, "data: expected the columns prompt, chosen, rejected"),
    ("half.jsonl", (), 1, "no row has ['prompt', 'chosen', 'rejected']"),
    ("few.jsonl", (), 1, "data: expected enough different prompts"),
    ("pairs.jsonl", ("--set", "max_tokens=2"), 1, "data: expected rows of 1 to 2 tokens"),
    ("pairs.jsonl", ("--model", "nowhere"), 1, "model: expected a folder or a name on the Hub"),
    ("prompts.jsonl", ("--scorer", "my_rewards"), 2, "--scorer: expected module:name"),
    ("prompts.jsonl", ("--scorer", "my_rewards:none"), 2, "cannot be imported"),
    ("prompts.jsonl", ("--scorer", "my_rewards:too_few"), 1, "expected a list of 8 numbers, got 1"),
    ("prompts.jsonl", ("--scorer", "my_rewards:not_a_number"), 1, "scorer: expected finite"),
    ("pairs.jsonl", ("--set", "speed=3"), 2, "--set: expected some of"),
    ("pairs.jsonl", ("--set", "lr=fast"), 2, "--set: expected a number for lr, got 'fast'")])
def test_what_is_wrong_is_said_without_a_traceback(
        mine, tmp_path, monkeypatch, capsys, data, more, status, message):
    monkeypatch.chdir(mine)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(command(mine, tmp_path, data, *more)) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize("more, message", [
    (("--only", "9b.3"), "--only: such a run decides no claims, got 9b.3"),
    (("--seeds", "10"), "--seeds: such a run has one, which --first-seed names; expected 1, got 10"),
    (("--jobs", "2"), "--jobs: such a run is one process"),
    (("--scale", "mini"), "--scale: expected paper, or none beside --model and --data, got mini"),
    (("--set", "lr=1", "--set", "lr=2"), "--set: expected one value for lr, got 1 and 2"),
    (("--set", "device=cpu", "--device", "cuda"), "--set: expected one value for device")])
def test_what_an_own_run_would_not_read_is_refused(mine, tmp_path, capsys, more, message):
    assert cli.main(command(mine, tmp_path, "pairs.jsonl", *more)) == 2
    assert message in capsys.readouterr().err
    if "--scale" not in more:
        assert cli.main(["run", "bspo", "--scale", "paper", *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_seed_and_one_process_are_what_an_own_run_has(mine, tmp_path):
    changes = dict(change.split("=") for change in SIZES)
    config = bspo_own.own_config(str(mine / "model"), str(mine / "pairs.jsonl"), **changes)
    args = cli.make_parser().parse_args(
        command(mine, tmp_path, "pairs.jsonl", "--seeds", "1", "--jobs", "1", "--first-seed", "7"))
    assert cli.own_config(args)[1] == config and args.first_seed == 7


def test_a_model_without_data_is_a_question_of_arguments(capsys):
    assert cli.main(["run", "bspo", "--model", "somewhere"]) == 2
    assert "--data: required" in capsys.readouterr().err


def test_paper_scale_names_models_and_data_that_can_be_replaced(mine, tmp_path, capsys):
    assert bspo.Config.paper() == bspo_own.OwnConfig.paper()
    local = ["--model", str(mine / "model"), "--data", str(mine / "pairs.jsonl"),
             "--set", "split=train", f"reward_model={mine / 'model'}", *SIZES]
    command = ["run", "bspo", "--scale", "paper", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*command, *local]) == 0
    assert f"bspo on {mine / 'model'}" in capsys.readouterr().out
    changes = dict(change.split("=") for change in SIZES)
    config = bspo_own.own_config("", str(mine / "pairs.jsonl"), base=bspo_own.OwnConfig.paper(),
                                 **changes)
    assert config.model == bspo_own.OwnConfig.paper().model
    assert config.lr == 1e-6 and config.completions == 8


def test_messages_go_through_the_chat_template(mine, tmp_path):
    tokenizer = grammar_tokenizer()
    messages = [{"role": "user", "content": "a b"}]
    with pytest.raises(ValueError, match="no chat template"):
        bspo_own.as_text(tokenizer, "prompt", messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}p"
    assert bspo_own.as_text(tokenizer, "prompt", messages) == "a b p"
    assert bspo_own.as_text(tokenizer, "chosen", [*messages, {"content": "c"}]) == "c"


def bytes_tokenizer(*more):
    "One token a byte, as in the models of the paper: a begin, an end, and what else is named."
    tokens = ["<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *more]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    special = {"pad_token": "<pad>"} if "<pad>" in more else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", **special)


def saved_model(folder, tokenizer, seed):
    with quiet_transformers():
        tiny_causal_lm(tokenizer, seed, positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def binarized(i):
    "A row with the columns of HuggingFaceH4/ultrafeedback_binarized; some answers are empty."
    def talk(text):
        return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": text}]

    chosen, rejected = talk("aa" * (i % 5)), talk("bbb" + "c" * (i % 3))
    return {"prompt": f"q{i}", "prompt_id": str(i), "chosen": chosen, "rejected": rejected,
            "messages": chosen, "score_chosen": 8.0, "score_rejected": 2.0}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "The paper's models and data, in its classes and columns, small enough for a test."
    folder = tmp_path_factory.mktemp("miniature")
    saved_model(folder / "policy", bytes_tokenizer("<pad>"), seed=0)
    saved_model(folder / "reward", bytes_tokenizer(), seed=1)
    (folder / "data" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list([binarized(i) for i in range(60)])
    table.to_parquet(folder / "data" / "data" / "train_prefs-00000-of-00001.parquet")
    return folder


def steps(miniature, out, *launcher):
    env = ENV | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(STEPS.parents[1]),
                 "HF_HOME": str(out.parent / "hf")}
    done = subprocess.run([sys.executable, *launcher, STEPS, miniature, out], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tensors(out, file):
    [path] = out.glob(f"jobs/*/{file}/model.safetensors")
    return load_file(path)


def test_the_papers_configuration_ends_alike_in_one_process_and_in_two(miniature, tmp_path):
    config = str(resources.files("alignkit") / "launch" / "cpu2.yaml")
    one, two = tmp_path / "one", tmp_path / "two"
    said = steps(miniature, one)
    both = steps(miniature, two, "-m", "accelerate.commands.launch", "--config_file", config,
                 "--main_process_port", "0")
    assert "8 of 40 rows left out, empty or longer than 128 tokens" in said
    assert both.count("rows left out") == said.count("rows left out")  # one process speaks
    for name, start in (("scorelm", "reward"), ("policy", "policy")):
        before = load_file(miniature / start / "model.safetensors")
        expected, found = tensors(one, name), tensors(two, name)
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, atol=1e-4), key
        moved = expected["model.norm.weight"] - before["model.norm.weight"]
        assert moved.abs().max() > 5e-4
    records = runs.load_records(two, "bspo")
    assert {r.stage for r in records} == {"train_own_scorelm", "train_own_policy"}
    for record in records:  # both processes had a tracker; one spoke
        [written] = two.glob(f"tensorboard/{record.stage}-*/events.out.*")
        assert len(EventAccumulator(str(written)).Reload().Scalars("loss")) == \
            {"train_own_scorelm": 3, "train_own_policy": 1}[record.stage]


def test_a_scorelm_reads_the_tokens_of_the_policy(miniature, mine):
    config = own_steps.config(miniature)
    tokenizer = bspo_own.load_tokenizer(config.model)
    scorelm = bspo_own.start_scorelm(config, tokenizer)
    assert scorelm.lm.config.vocab_size == len(tokenizer) == 259
    again = bspo_own.start_scorelm(config, tokenizer)
    assert torch.equal(scorelm.lm.lm_head.weight, again.lm.lm_head.weight)
    other = replace(config, reward_model=str(mine / "model"))
    with pytest.raises(ValueError, match="^reward_model: expected the tokens of .*policy, got 17"):
        bspo_own.start_scorelm(other, tokenizer)


def test_padding_is_found_or_asked_for(tmp_path):
    bytes_tokenizer().save_pretrained(tmp_path / "ends")
    assert bspo_own.load_tokenizer(str(tmp_path / "ends")).pad_token == "</s>"
    tokenizer = bytes_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="^model: expected a tokenizer with a padding or an end"):
        bspo_own.load_tokenizer(str(tmp_path / "endless"))


def test_another_reward_function_is_another_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "rewards_of_this_test.py"
    contents = []
    for text in ("def f(): pass", "def f(): return 1"):
        source.write_text(text)
        contents.append(bspo_own.own_config("m", "d", "rewards_of_this_test:f").content)
    assert contents[0] != contents[1]
