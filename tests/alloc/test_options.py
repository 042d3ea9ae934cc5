"""A method and its options from text."""

from dataclasses import fields

import pytest

from rankwise.alloc.methods import METHODS, Ara, Llrc, Strs
from rankwise.alloc.options import make_method, own_options
from rankwise.errors import RankwiseError


def test_settings_take_the_type_of_their_field() -> None:
    """Numbers, words, lists and None."""
    made = make_method("ara", 0.7, {"kinds": "dense,lowrank"}, ["steps=7", "lr=0.5", "faithful=false", "start=global"])
    assert isinstance(made, Ara)
    assert (made.ratio, made.kinds, made.steps, made.lr, made.faithful) == (0.7, ("dense", "lowrank"), 7, 0.5, False)
    assert made.start == "global"
    strs = make_method("strs", 0.5, {}, ["grid=0.5,0.7"])
    assert isinstance(strs, Strs)
    assert strs.grid == (0.5, 0.7)
    llrc = make_method("llrc", 0.5, {}, ["after=none", "selection=top-k"])
    assert isinstance(llrc, Llrc)
    assert llrc.after is None


def test_none_is_the_methods_own_default() -> None:
    """Options that were not given do not override."""
    made = make_method("asvd", 0.8, {"kinds": None, "sides": None, "rank_multiple": 16}, [])
    assert (made.kinds, made.sides, made.rank_multiple) == (("dense", "lowrank"), "diagonal", 16)


@pytest.mark.parametrize(
    ("method", "setting", "parts"),
    [
        ("ara", "stepz=3", ["set", "stepz=3", "steps"]),
        ("ara", "steps", ["set", "steps", "NAME=VALUE"]),
        ("ara", "ratio=0.5", ["set", "ratio=0.5"]),
        ("ara", "steps=3.5", ["steps", "3.5", "whole number"]),
        ("ara", "faithful=maybe", ["faithful", "maybe", "true", "false"]),
        ("ara", "start=nowhere", ["start", "nowhere", "uniform"]),
        ("global", "steps=3", ["set", "channel_multiple"]),
        ("uniform", "steps=3", ["set", "none"]),
        ("magic", "steps=3", ["method", "magic", "rankwise"]),
    ],
)
def test_bad_settings_are_named(method: str, setting: str, parts: list[str]) -> None:
    """Field, value and what is allowed."""
    with pytest.raises(RankwiseError) as found:
        make_method(method, 0.8, {}, [setting])
    assert all(part in str(found.value) for part in parts)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_has_a_default(name: str) -> None:
    """So a method can be made from its name alone, and says what its options are."""
    made = make_method(name, 0.8, {}, [])
    assert set(own_options(type(made))) <= set(made.options())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_can_be_set_to_its_default(name: str) -> None:
    """So there is a way to read its type; words are read without their case."""
    default = METHODS[name]()
    texts = {}
    for key in own_options(METHODS[name]):
        value = getattr(default, key)
        texts[key] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    made = make_method(name, default.ratio, {}, [f"{key}={text}" for key, text in texts.items()])
    assert made == default
    assert all(type(getattr(made, f.name)) is type(getattr(default, f.name)) for f in fields(made))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=none", "steps: none; allowed: a whole number"),
        ("lr=fast", "lr: fast; allowed: a number or none"),
        ("checkpointing=1", "checkpointing: 1; allowed: true or false"),
        ("lr=nan", "lr: nan; allowed: a finite number above 0"),
        ("steps=-1", "steps: -1; allowed: a whole number from 1"),
    ],
)
def test_the_whole_message(setting: str, message: str) -> None:
    with pytest.raises(RankwiseError) as found:
        make_method("ara", 0.8, {}, [setting])
    assert str(found.value) == message


def test_a_list_of_numbers_is_refused_as_one() -> None:
    with pytest.raises(RankwiseError, match=r"^grid: 0.5,x; allowed: numbers joined by commas$"):
        make_method("strs", 0.8, {}, ["grid=0.5,x"])
