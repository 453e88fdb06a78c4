"""Drawn scenes of one or two coloured shapes, each with five captions: a small text-to-image set.

What a caption says is exactly what the picture shows, so that `shapes_check.check` can measure how
often a model draws what it was asked for. A sixth of the combinations of shape, colour and place is
held out: these never appear in training, and prompts made of them ask for pictures the model cannot
have memorised.

Lengths are fractions of the picture's side, x to the right and y downwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from lgpt.settings.data import DataSettings

Split = Literal["train", "val", "test"]
Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS: dict[str, Rgb] = {
    "red": (225, 35, 35),
    "yellow": (245, 220, 40),
    "green": (40, 170, 60),
    "cyan": (40, 220, 230),
    "blue": (40, 70, 225),
    "pink": (255, 90, 190),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (245, 245, 245),
    "grey": (140, 140, 140),
    "black": (20, 20, 20),
}
SIZES: dict[str, float] = {"small": 0.155, "large": 0.22}
POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
# Objects lie this much beside their named place and their radius differs by this share, so that
# pictures differ. Half a pixel instead (0.015 and 0.04) is told by no caption and seen by nobody,
# but it is most of what a model then learns: 1.71 nats a token after its two neighbours, not 1.34.
POSITION_JITTER = 0.005
SIZE_JITTER = 0.015
_SUPERSAMPLE = 8  # drawn this much larger, then averaged: smooth edges
_DRAWING_VERSION = 2  # part of the fingerprint: raise it when any picture or caption changes


@dataclass(frozen=True)
class SceneObject:
    """One shape: what its caption says, and how far it lies off the nominal place and size."""

    shape: str
    colour: str
    size: str
    position: str
    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    objects: tuple[SceneObject, ...]
    background: str


def is_held_out_combination(shape: str, colour: str, position: str) -> bool:
    """Whether training never shows this shape in this colour at this place (1/6 of them).

    Each pair of shape and colour is shown at seven or eight of the nine places, and each shape at
    each place in five of the six colours.
    """
    number = SHAPES.index(shape) + list(COLOURS).index(colour) + list(POSITIONS).index(position)
    return number % len(SHAPES) == 0


def is_held_out(scene: Scene) -> bool:
    """Whether any of its objects is a combination that training never shows."""
    return any(is_held_out_combination(o.shape, o.colour, o.position) for o in scene.objects)


def coverages(
    shape: str, x: float, y: float, radii: Sequence[float], resolution: int
) -> Float[np.ndarray, "n resolution resolution"]:
    """How much of every pixel the shape covers, 0 to 1, once for each radius.

    Args:
        shape: One of `SHAPES`.
        x: Its centre of mass, fraction of the side.
        y: Its centre of mass, fraction of the side.
        radii: Nominal radii, fractions of the side; the outlines are scaled to similar areas.
        resolution: Side of the picture, pixels.
    """
    side = resolution * _SUPERSAMPLE
    x, y = x * side - 0.5, y * side - 0.5
    masks = []
    for radius in radii:
        r = radius * side
        mask = Image.new("L", (side, side))
        pen = ImageDraw.Draw(mask)
        for share, value in _DISCS.get(shape, ()):
            box = (x - r * share, y - r * share, x + r * share, y + r * share)
            pen.ellipse(box, fill=value)
        if shape in _OUTLINES:
            pen.polygon([(x + r * px, y + r * py) for px, py in _OUTLINES[shape]], fill=255)
        masks.append(np.asarray(mask.reduce(_SUPERSAMPLE), dtype=np.float32) / 255.0)
    return np.stack(masks)


def draw(scene: Scene, resolution: int) -> Image.Image:
    """The picture of a scene, RGB and square, with smooth edges; `resolution` in pixels."""
    picture = np.empty((resolution, resolution, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        x, y = POSITIONS[thing.position]
        radius = SIZES[thing.size] * thing.scale
        x, y = x + thing.shift_x, y + thing.shift_y
        alpha = coverages(thing.shape, x, y, [radius], resolution)[0]
        colour = np.asarray(COLOURS[thing.colour], dtype=np.float32)
        picture += alpha[:, :, None] * (colour - picture)
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Five wordings of the same scene; each names every attribute of every object."""
    ground = scene.background
    both = [(f"{o.size} {o.colour} {o.shape}", _place(o), o) for o in scene.objects]
    return (
        " and ".join(f"a {thing} {place}" for thing, place, _ in both)
        + f" on a {ground} background",
        f"on a {ground} background there is "
        + " and ".join(f"{place} a {thing}" for thing, place, _ in both),
        ", ".join(f"{o.colour} {o.shape}, {o.size}, {o.position}" for _, _, o in both)
        + f", {ground} background",
        f"a {ground} picture with "
        + " and ".join(f"a {o.size} {o.shape} in {o.colour} {place}" for _, place, o in both),
        " and ".join(f"{place} we see one {thing}" for thing, place, _ in both)
        + f", all else is {ground}",
    )


class ShapesDataset:
    """Scenes that exist only as numbers until they are drawn; the same for the same settings.

    `train` and `val` show what is not held out; `test` shows one-object and two-object scenes of
    held-out combinations only. Scene `i` depends on (seed, split, i) alone.
    """

    name = "shapes"

    def __init__(self, split: Split, settings: DataSettings) -> None:
        self.split: str = split
        self._settings = settings
        shapes = settings.shapes
        self._length = shapes.train_images if split == "train" else shapes.val_images
        identity = {
            "drawing": _DRAWING_VERSION,
            "split": split,
            "seed": settings.seed,
            "resolution": settings.resolution,
            "length": self._length,
            "two_object_fraction": shapes.two_object_fraction,
        }
        text = json.dumps(identity, sort_keys=True)
        self.fingerprint: str = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    def image_id(self, i: int) -> str:
        """`shapes-train-000017`."""
        return f"shapes-{self.split}-{i:06d}"

    def scene(self, i: int) -> Scene:
        """What picture `i` shows."""
        if not 0 <= i < self._length:
            raise IndexError(f"scene {i} of {self._length}")
        split_number = ("train", "val", "test").index(self.split)
        rng = np.random.default_rng([self._settings.seed, split_number, i])
        two = rng.random() < self._settings.shapes.two_object_fraction
        return _random_scene(rng, 2 if two else 1, held_out=self.split == "test")

    def captions(self, i: int) -> tuple[str, ...]:
        """Five captions of picture `i`."""
        return captions_of(self.scene(i))

    def load(self, i: int) -> Image.Image:
        """Picture `i`, drawn at the settings' resolution."""
        return draw(self.scene(i), self._settings.resolution)


def held_out_prompts(count: int, objects: int = 1, seed: int = 0) -> list[tuple[str, Scene]]:
    """Captions, with their scenes, of which every object is one never shown in training."""
    return _prompts(count, objects, seed, held_out=True)


def seen_prompts(count: int, objects: int = 1, seed: int = 0) -> list[tuple[str, Scene]]:
    """Captions, with their scenes, made of combinations that training shows."""
    return _prompts(count, objects, seed, held_out=False)


def _prompts(count: int, objects: int, seed: int, held_out: bool) -> list[tuple[str, Scene]]:
    rng = np.random.default_rng([seed, objects, int(held_out)])
    scenes = [_random_scene(rng, objects, held_out) for _ in range(count)]
    return [(captions_of(s)[int(rng.integers(5))], s) for s in scenes]


def _random_scene(rng: np.random.Generator, objects: int, held_out: bool) -> Scene:
    places: list[str] = []
    while len(places) < objects:
        place = _pick(rng, list(POSITIONS))
        if all(_are_apart(place, other) for other in places):
            places.append(place)
        elif len(places) == 1 and places[0] == "centre":
            places.clear()  # nothing lies far enough from the centre
    things = []
    for place in places:
        pairs = [
            (s, c)
            for s in SHAPES
            for c in COLOURS
            if is_held_out_combination(s, c, place) == held_out
        ]
        shape, colour = pairs[int(rng.integers(len(pairs)))]
        shift_x, shift_y = rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2).tolist()
        scale = float(rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER))
        size = _pick(rng, list(SIZES))
        things.append(SceneObject(shape, colour, size, place, shift_x, shift_y, scale))
    return Scene(tuple(things), _pick(rng, list(BACKGROUNDS)))


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _are_apart(place: str, other: str) -> bool:
    (x, y), (other_x, other_y) = POSITIONS[place], POSITIONS[other]
    return max(abs(x - other_x), abs(y - other_y)) >= 0.5


def _place(thing: SceneObject) -> str:
    return "in the centre" if thing.position == "centre" else f"at the {thing.position}"


# Discs drawn one over the other: share of the radius, and whether they cover (255) or cut out (0).
_DISCS: dict[str, tuple[tuple[float, int], ...]] = {
    "circle": ((0.95, 255),),
    "ring": ((1.0, 255), (0.55, 0)),
}
# Corners in units of the radius, centre of mass at the origin.
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.18), (1.022, 0.59), (-1.022, 0.59)),
    "diamond": ((0.0, -1.1), (1.1, 0.0), (0.0, 1.1), (-1.1, 0.0)),
    "cross": (
        *((-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36)),
        *((1.0, 0.36), (0.36, 0.36), (0.36, 1.0), (-0.36, 1.0)),
        *((-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36)),
    ),
}
