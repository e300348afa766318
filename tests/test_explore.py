"""Controls around a run: their defaults, what the button does, and no front end."""

import contextlib

import pytest

pytest.importorskip("ipywidgets")

from alignkit import explore as room  # noqa: E402


def recorder():
    seen = []

    def run(eps_beta=0.05, margin=2.0, world="S", rounds=4):
        seen.append((eps_beta, margin, world, rounds))
        return len(seen)

    return run, seen


CHOICES = {"eps_beta": (1e-4, 0.5), "margin": (0.0, 10.0), "world": ("S", "I"), "rounds": (1, 9)}


def test_without_a_front_end_it_is_one_plain_call(capsys):
    run, seen = recorder()
    assert room.explore(run, **CHOICES) == 1
    assert seen == [(0.05, 2.0, "S", 4)] and capsys.readouterr().out == ""


def test_each_setting_has_its_control_and_the_button_runs_with_their_values():
    run, seen = recorder()
    *settings, button, _ = room.controls(run, **CHOICES).children
    kinds = [type(control).__name__ for control in settings]
    assert kinds == ["FloatLogSlider", "FloatSlider", "Dropdown", "IntSlider"]
    assert [control.value for control in settings] == [0.05, 2.0, "S", 4]
    settings[0].value, settings[2].value, settings[3].value = 0.1, "I", 7
    button.click()
    assert seen == [(0.1, 2.0, "I", 7)] and not button.disabled


def test_text_may_be_typed():
    seen = []

    def run(comparison="AAB"):
        seen.append(comparison)

    text, button, _ = room.controls(run, comparison=str).children
    assert type(text).__name__ == "Text" and text.value == "AAB"
    text.value = "BBA"
    button.click()
    assert seen == ["BBA"]


def test_the_button_comes_back_after_a_failure():
    def run(world="S"):
        raise RuntimeError("on purpose")

    *_, button, _ = room.controls(run, world=("S", "I")).children
    with contextlib.suppress(RuntimeError):  # the output area shows it where it can
        button.click()
    assert not button.disabled


@pytest.mark.parametrize("choices, message", [
    ({"speed": (0.0, 1.0)}, "^speed: expected a parameter"),
    ({"eps_beta": (0.1, 0.5)}, "^eps_beta: expected the default 0.05 among"),
    ({"world": ("A", "I")}, "^world: expected the default 'S' among"),
    ({"rounds": str}, "^rounds: expected a default that is text, got 4")])
def test_settings_that_do_not_fit_the_function_are_refused(choices, message):
    run, seen = recorder()
    with pytest.raises(ValueError, match=message):
        room.explore(run, **choices)
    assert not seen
