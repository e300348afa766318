"""Where the small model is looked for, in which order, and that its copy is whole or absent."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from alignkit.models import weights
from alignkit.models.weights import (
    GGUF,
    HUB_ID,
    PACKAGE,
    VARIABLE,
    Weights,
    cache_folder,
    small_model,
)

HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def write_snapshot(hub: Path, files=HUB_FILES) -> Path:
    "What the Hub's client leaves after downloading `files`."
    repository = hub / ("models--" + HUB_ID.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.fixture
def machine(monkeypatch, tmp_path):
    "A machine that has the model nowhere; its folder, with `cache` and `hub` to come."
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest:
                        None if name == PACKAGE else find_spec(name, *rest))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def packaged(machine, monkeypatch):
    "The same with the package installed; the list grows with each conversion."
    gguf, converted = machine / "site" / PACKAGE / GGUF, []
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF")
    spec = importlib.util.spec_from_file_location(
        PACKAGE, gguf.parent / "__init__.py", submodule_search_locations=[str(gguf.parent)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec)

    def convert(source: Path, folder: Path):
        converted.append(source)
        write_model(folder)

    monkeypatch.setattr(weights, "_convert", convert)
    return converted


def test_the_order_is_that_of_explicitness(packaged, machine, monkeypatch):
    assert small_model() == Weights(cache_folder(), "package (Q4_1)")
    snapshot = write_snapshot(machine / "hub")
    assert small_model() == Weights(snapshot, "hub")
    named = write_model(machine / "named")
    monkeypatch.setenv(VARIABLE, str(named))
    assert small_model() == Weights(named, "folder")
    argument = write_model(machine / "argument")
    assert small_model(str(argument)) == Weights(argument, "folder")


def test_a_package_is_converted_once(packaged, machine, capsys):
    first = small_model()
    assert first.path.is_relative_to(machine / "cache")
    said = capsys.readouterr()
    assert said.out == "" and str(first.path) in said.err
    assert small_model() == first and packaged == [machine / "site" / PACKAGE / GGUF]
    assert capsys.readouterr().err == ""


def test_what_was_converted_serves_without_the_package(machine):
    write_model(cache_folder())
    assert small_model() == Weights(cache_folder(), "package (Q4_1)")


@pytest.mark.parametrize("missing", HUB_FILES)
def test_half_a_download_does_not_count(machine, missing):
    write_snapshot(machine / "hub", set(HUB_FILES) - {missing})
    write_model(cache_folder())
    assert small_model().origin == "package (Q4_1)"


def test_a_machine_without_the_model_says_how_to_get_it(machine):
    with pytest.raises(FileNotFoundError) as caught:
        small_model()
    for way in ("`make small`", f"`hf download {HUB_ID}`", f"{VARIABLE}=FOLDER"):
        assert way in str(caught.value)
    assert not (machine / "cache").exists()


def test_a_package_without_the_file_is_no_model(packaged, machine):
    (machine / "site" / PACKAGE / GGUF).unlink()
    with pytest.raises(FileNotFoundError, match="make small"):
        small_model()


def test_a_named_folder_without_a_model_is_an_error_not_a_hint(machine, monkeypatch):
    write_model(cache_folder())  # which must not be taken instead
    with pytest.raises(FileNotFoundError, match=r"^path: expected .*config\.json, got 'x/y'"):
        small_model("x/y")
    monkeypatch.setenv(VARIABLE, str(machine))
    with pytest.raises(FileNotFoundError, match=f"^{VARIABLE}: expected .*{machine.name}"):
        small_model()


def test_a_home_folder_is_understood(machine, monkeypatch):
    monkeypatch.setenv("HOME", str(machine))
    named = write_model(machine / "models")
    monkeypatch.setenv(VARIABLE, "~/models")
    assert small_model().path == named


def test_a_conversion_that_fails_leaves_nothing(packaged, monkeypatch):
    def fail(source: Path, folder: Path):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            small_model()
    assert list(cache_folder().parent.iterdir()) == []
    assert small_model().path == cache_folder()


def test_nobody_sees_half_a_copy_and_the_first_to_finish_stays(packaged, monkeypatch):
    def overtaken(source: Path, folder: Path):
        write_model(folder)
        assert not cache_folder().exists()
        (write_model(cache_folder()) / "config.json").write_text("the other's")

    monkeypatch.setattr(weights, "_convert", overtaken)
    folder = small_model().path
    assert (folder / "config.json").read_text() == "the other's"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_damaged_copy_is_not_passed_off_as_a_model(packaged):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "model.safetensors").write_text("")
    with pytest.raises(OSError, match=cache_folder().name):
        small_model()
    assert os.listdir(cache_folder()) == ["model.safetensors"]


@pytest.fixture
def gguf_file():
    pytest.importorskip("gguf", reason="needs the extra llm")
    try:
        return weights._packaged()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_copy_holds_the_packaged_weights_and_writes_sense(gguf_file):
    found = small_model()
    if found.origin != "package (Q4_1)":
        pytest.skip(f"the small model here is another: {found.origin}")
    check_copy(gguf_file, found.path)


@pytest.mark.soak
def test_the_packaged_model_is_converted_exactly(gguf_file, tmp_path):
    weights._convert(gguf_file, tmp_path)
    check_copy(gguf_file, tmp_path)


def check_copy(gguf_file: Path, folder: Path):
    import gguf
    import transformers

    assert json.loads((folder / "origin.json").read_text())["file"] == gguf_file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding, last = lm.get_input_embeddings().weight, lm.model.layers[29]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    for name, parameter in (("token_embd.weight", embedding),
                            ("blk.29.attn_v.weight", last.self_attn.v_proj.weight),
                            ("blk.29.ffn_down.weight", last.mlp.down_proj.weight)):
        tensor = stored[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(parameter.detach(), torch.from_numpy(values)), name
    assert lm.get_output_embeddings().weight is embedding
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = lm.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids.input_ids.shape[1]:])
