"""Reads a picture of shapes back into words, and compares them with what it should show.

The picture is read without knowing the scene: background and colours by the nearest named colour,
shape and size by the drawn template that fits best, position by the centre of mass. Only then is it
compared with the scene, attribute by attribute. Blur, as a VQ-VAE leaves it, costs little
because templates are compared by how much of each pixel an object covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from lgpt.data.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Rgb, Scene, coverages

_READING_RESOLUTION = 64  # larger pictures are averaged down to this: enough to tell the shapes
_DIFFERS_FROM_GROUND = 50.0  # RGB distance; the closest object and background colours are 130 apart
_SMALLEST_OBJECT = 0.015  # share of the picture; the smallest drawn object covers 0.035
_EDGE = 0.45  # a pixel belongs to an object from this share of the contrast around it
_TEMPLATE_SCALES = (0.93, 1.0, 1.07)


@dataclass(frozen=True)
class SeenObject:
    """One object as read from the pixels."""

    shape: str
    colour: str
    size: str
    position: str


@dataclass(frozen=True)
class ObjectCheck:
    """Which attributes of one object of the scene the picture shows."""

    shape: bool = False
    colour: bool = False
    size: bool = False
    position: bool = False

    @property
    def num_right(self) -> int:
        """How many of the four are right."""
        return self.shape + self.colour + self.size + self.position


@dataclass(frozen=True)
class SceneCheck:
    """A picture compared with a scene; `objects` in the scene's order."""

    objects: tuple[ObjectCheck, ...]
    background: bool
    has_right_count: bool

    @property
    def all_right(self) -> bool:
        """Every attribute of every object, the background, and no object more."""
        objects_right = all(o.num_right == 4 for o in self.objects)
        return objects_right and self.background and self.has_right_count


def check(image: Image.Image, scene: Scene) -> SceneCheck:
    """Per attribute, whether the picture shows what the scene says.

    With two objects, each seen object is held against each of the scene and the better assignment
    counts; an object of the scene without a seen one has no attribute right.
    """
    background, seen = read_picture(image)
    wanted = scene.objects
    padded = [*seen, *[None] * max(0, len(wanted) - len(seen))]
    candidates = [
        tuple(
            ObjectCheck()
            if got is None
            else ObjectCheck(
                shape=got.shape == want.shape,
                colour=got.colour == want.colour,
                size=got.size == want.size,
                position=got.position == want.position,
            )
            for want, got in zip(wanted, chosen)
        )
        for chosen in permutations(padded, len(wanted))
    ]
    best = max(candidates, key=lambda checks: sum(c.num_right for c in checks))
    return SceneCheck(best, background == scene.background, len(seen) == len(wanted))


def read_picture(image: Image.Image) -> tuple[str, list[SeenObject]]:
    """Name of the background, and the objects found (at most three, the largest first)."""
    image = image.convert("RGB")
    if max(image.size) > _READING_RESOLUTION:
        image = image.resize((_READING_RESOLUTION, _READING_RESOLUTION), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    background, ground = _read_background(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    threshold = np.maximum(_DIFFERS_FROM_GROUND, _EDGE * _largest_around(distance))
    regions = _regions(distance > threshold)
    seen = [_read_object(pixels, ground, distance, region) for region in regions[:3]]
    return background, seen


def _read_background(
    pixels: Float[np.ndarray, "side side 3"],
) -> tuple[str, Float[np.ndarray, " 3"]]:
    """The background colour most pixels are nearest to, and those pixels' median colour."""
    palette = np.asarray([*BACKGROUNDS.values(), *COLOURS.values()], dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    votes = np.bincount(nearest.ravel(), minlength=len(palette))[: len(BACKGROUNDS)]
    winner = int(votes.argmax())
    if votes[winner] == 0:
        return "", np.median(pixels.reshape(-1, 3), axis=0)
    return list(BACKGROUNDS)[winner], np.median(pixels[nearest == winner], axis=0)


def _read_object(
    pixels: Float[np.ndarray, "side side 3"],
    ground: Float[np.ndarray, " 3"],
    distance: Float[np.ndarray, "side side"],
    region: Bool[np.ndarray, "side side"],
) -> SeenObject:
    side = len(pixels)
    core = region & (distance >= np.quantile(distance[region], 0.7))
    colour = np.median(pixels[core], axis=0)
    contrast = colour - ground
    alpha = np.clip((pixels - ground) @ contrast / (contrast @ contrast), 0.0, 1.0)
    alpha = np.where(_grow(_grow(region)), alpha, 0.0)
    centres = (np.arange(side) + 0.5) / side
    x = float((alpha.sum(0) * centres).sum() / alpha.sum())
    y = float((alpha.sum(1) * centres).sum() / alpha.sum())
    shape, size = _read_outline(alpha, x, y)
    position = min(POSITIONS, key=lambda p: (POSITIONS[p][0] - x) ** 2 + (POSITIONS[p][1] - y) ** 2)
    return SeenObject(shape, _nearest_colour(colour, COLOURS), size, position)


def _read_outline(alpha: Float[np.ndarray, "side side"], x: float, y: float) -> tuple[str, str]:
    """The shape and size whose drawing at this place differs least, summed over squared pixels."""
    kinds = [(size, scale) for size in SIZES for scale in _TEMPLATE_SCALES]
    radii = [SIZES[size] * scale for size, scale in kinds]
    templates = np.stack([coverages(shape, x, y, radii, len(alpha)) for shape in SHAPES])
    errors = ((templates - alpha) ** 2).sum(axis=(2, 3))
    shape, kind = np.unravel_index(int(errors.argmin()), errors.shape)
    return SHAPES[shape], kinds[kind][0]


def _nearest_colour(colour: Float[np.ndarray, " 3"], palette: Mapping[str, Rgb]) -> str:
    return min(palette, key=lambda name: float(((colour - palette[name]) ** 2).sum()))


def _regions(mask: Bool[np.ndarray, "side side"]) -> list[Bool[np.ndarray, "side side"]]:
    """Connected parts of the mask that are large enough for an object, the largest first."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    parts = []
    while left:
        part, edge = [], [left.pop()]
        while edge:
            row, column = edge.pop()
            part.append((row, column))
            for neighbour in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                if neighbour in left:
                    left.remove(neighbour)
                    edge.append(neighbour)
        if len(part) >= _SMALLEST_OBJECT * mask.size:
            parts.append(sorted(part))
    regions = []
    for part in sorted(parts, key=lambda p: (-len(p), p)):
        region = np.zeros_like(mask)
        region[tuple(np.transpose(part))] = True
        regions.append(region)
    return regions


def _largest_around(values: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "side side"]:
    """The largest value in a square window of about a sixth of the side around every pixel."""
    reach = max(1, len(values) // 12)
    padded = np.pad(values, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return windows.max(axis=(-2, -1))


def _grow(mask: Bool[np.ndarray, "side side"]) -> Bool[np.ndarray, "side side"]:
    """The mask and its neighbours left, right, above and below."""
    padded = np.pad(mask, 1)
    return (
        padded[1:-1, 1:-1]
        | padded[:-2, 1:-1]
        | padded[2:, 1:-1]
        | padded[1:-1, :-2]
        | padded[1:-1, 2:]
    )
