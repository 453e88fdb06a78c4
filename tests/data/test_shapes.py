"""Drawn scenes: pictures, captions, what is held out, and that the checker reads them back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lgpt.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    ShapesDataset,
    captions_of,
    draw,
    held_out_prompts,
    is_held_out,
    is_held_out_combination,
    seen_prompts,
)
from lgpt.data.shapes_check import check, read_picture
from lgpt.settings.data import DataSettings, ShapesSettings

ATTRIBUTES = ("shape", "colour", "size", "position")


def dataset(split: str = "train", seed: int = 0, images: int = 300) -> ShapesDataset:
    shapes = ShapesSettings(train_images=images, val_images=images, two_object_fraction=0.4)
    settings = DataSettings(dataset="shapes", resolution=32, seed=seed, shapes=shapes)
    return ShapesDataset(split, settings)


def mixed_scenes(count: int) -> list[Scene]:
    prompts = [
        prompt
        for objects in (1, 2)
        for make in (held_out_prompts, seen_prompts)
        for prompt in make(count // 4, objects, seed=7)
    ]
    return [scene for _, scene in prompts]


@pytest.mark.parametrize("resolution", [32, 64])
def test_checker_reads_at_least_99_percent_of_clean_drawings(resolution: int):
    scenes = mixed_scenes(120)
    right = [check(draw(scene, resolution), scene).all_right for scene in scenes]
    assert np.mean(right) >= 0.99


def test_checker_is_near_chance_on_shuffled_pairs():
    scenes = [scene for _, scene in seen_prompts(250, 1, seed=3)]
    shuffled = scenes[1:] + scenes[:1]
    checks = [check(draw(a, 32), b) for a, b in zip(scenes, shuffled)]
    chances = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS}
    for attribute, values in chances.items():
        share = np.mean([getattr(c.objects[0], attribute) for c in checks])
        assert share == pytest.approx(1 / len(values), abs=0.1), attribute  # over 3 sigma
    assert np.mean([c.background for c in checks]) == pytest.approx(1 / len(BACKGROUNDS), abs=0.1)
    assert not any(c.all_right for c in checks)


def test_checker_tolerates_blur():
    scenes = mixed_scenes(80)
    blurred = [draw(scene, 32).filter(ImageFilter.GaussianBlur(0.7)) for scene in scenes]
    assert np.mean([check(p, s).all_right for p, s in zip(blurred, scenes)]) >= 0.95


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_checker_names_the_one_wrong_attribute(attribute: str):
    thing = SceneObject("circle", "red", "large", "top left")
    other = SceneObject("square", "blue", "small", "right")
    wrong = replace(thing, **{attribute: getattr(other, attribute)})
    result = check(draw(Scene((wrong,), "white"), 32), Scene((thing,), "white"))
    assert {a: getattr(result.objects[0], a) for a in ATTRIBUTES} == {
        a: a != attribute for a in ATTRIBUTES
    }
    assert result.background
    assert not result.all_right


def test_checker_counts_objects_and_takes_them_in_any_order():
    red = SceneObject("circle", "red", "large", "top left")
    blue = SceneObject("square", "blue", "small", "bottom right")
    both = Scene((red, blue), "grey")
    assert check(draw(Scene((blue, red), "grey"), 32), both).all_right

    missing = check(draw(Scene((blue,), "grey"), 32), both)
    assert [o.num_right for o in missing.objects] == [0, 4]
    assert not missing.has_right_count

    extra = check(draw(both, 32), Scene((red,), "grey"))
    assert extra.objects[0].num_right == 4
    assert not extra.all_right


def test_checker_does_not_mix_up_whose_colour_it_is():
    red = SceneObject("circle", "red", "large", "left")
    blue = SceneObject("square", "blue", "large", "right")
    swapped = Scene((replace(red, colour="blue"), replace(blue, colour="red")), "white")
    result = check(draw(swapped, 32), Scene((red, blue), "white"))
    assert not result.all_right


@pytest.mark.parametrize("value", [0, 128, 255])
def test_checker_finds_nothing_in_an_empty_picture(value: int):
    empty = Image.new("RGB", (32, 32), (value, value, value))
    _, seen = read_picture(empty)
    assert seen == []


def test_noise_is_not_read_as_a_right_scene():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    results = [check(Image.fromarray(noise), scene) for scene in mixed_scenes(40)]
    assert not any(result.all_right for result in results)


def test_captions_are_five_wordings_that_name_every_attribute():
    for scene in mixed_scenes(40):
        captions = captions_of(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert scene.background in caption
            for thing in scene.objects:
                for attribute in ATTRIBUTES:
                    assert getattr(thing, attribute) in caption


def test_captions_keep_the_words_of_an_object_together():
    red = SceneObject("circle", "red", "large", "top left")
    blue = SceneObject("square", "blue", "small", "right")
    swapped = (replace(red, colour="blue"), replace(blue, colour="red"))
    captions = captions_of(Scene((red, blue), "white"))
    assert not set(captions) & set(captions_of(Scene(swapped, "white")))


def test_a_sixth_of_the_combinations_is_held_out_and_every_two_of_three_still_seen():
    combinations = [(s, c, p) for s in SHAPES for c in COLOURS for p in POSITIONS]
    seen = [one for one in combinations if not is_held_out_combination(*one)]
    assert 6 * (len(combinations) - len(seen)) == len(combinations)
    assert {(s, c) for s, c, _ in seen} == {(s, c) for s in SHAPES for c in COLOURS}
    assert {(s, p) for s, _, p in seen} == {(s, p) for s in SHAPES for p in POSITIONS}
    assert {(c, p) for _, c, p in seen} == {(c, p) for c in COLOURS for p in POSITIONS}


def test_train_and_val_never_show_what_is_held_out_and_test_shows_nothing_else():
    for split in ("train", "val"):
        assert not any(is_held_out(dataset(split).scene(i)) for i in range(300))
    for i in range(300):
        things = dataset("test").scene(i).objects
        assert all(is_held_out_combination(t.shape, t.colour, t.position) for t in things)


def test_prompts_belong_to_their_scenes_and_to_their_side_of_the_split():
    for objects in (1, 2):
        for caption, scene in held_out_prompts(20, objects):
            assert is_held_out(scene)
            assert len(scene.objects) == objects
            assert caption in captions_of(scene)
        assert not any(is_held_out(scene) for _, scene in seen_prompts(20, objects))


def test_a_scene_depends_on_seed_split_and_number_alone():
    first, again, longer = dataset(), dataset(), dataset(images=301)
    assert first.captions(5) == again.captions(5) == longer.captions(5)
    assert first.load(5).tobytes() == again.load(5).tobytes()
    assert first.fingerprint == again.fingerprint
    for other in (dataset(seed=1), dataset("val"), longer):
        assert other.fingerprint != first.fingerprint
    assert dataset(seed=1).scene(5) != first.scene(5)
    assert dataset("val").scene(5) != first.scene(5)


def test_the_requested_share_of_scenes_has_two_objects_that_do_not_touch():
    scenes = [dataset().scene(i) for i in range(300)]
    assert np.mean([len(s.objects) == 2 for s in scenes]) == pytest.approx(0.4, abs=0.12)
    for scene in scenes[:60]:
        assert len(read_picture(draw(scene, 64))[1]) == len(scene.objects)


def test_scene_numbers_outside_the_split_are_refused():
    with pytest.raises(IndexError, match="scene 300 of 300"):
        dataset().scene(300)
