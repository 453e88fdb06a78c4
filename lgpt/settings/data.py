"""Where captioned images come from and how they are cut."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from lgpt.settings.section import FolderOrFile, NameOrPath, Section, Seed


class ShapesSettings(Section):
    """The drawn scenes of `data.dataset: shapes`."""

    train_images: int = Field(20_000, ge=1, description="scenes drawn for training")
    val_images: int = Field(512, ge=1, description="scenes drawn for validation")
    two_object_fraction: float = Field(
        0.3, ge=0, le=1, description="share of scenes with two objects instead of one"
    )


class OpenmojiSettings(Section):
    """The emoji of `data.dataset: openmoji`."""

    skin_tones: bool = Field(
        True,
        description="also the drawings of people and hands in five skin tones, half of all; "
        "false: each emoji once",
    )


class DataSettings(Section):
    """One schema for every dataset: image, captions, split, id."""

    dataset: Literal["flickr30k", "shapes", "openmoji", "folder"] = Field(
        "flickr30k",
        description="shapes are drawn scenes and openmoji emoji, both without a download; folder: "
        "your own pictures",
    )
    source: Optional[NameOrPath] = Field(
        None,
        description="flickr30k: hub name, save_to_disk folder, folder of parquet files, or of "
        "results_20130124.token and flickr30k-images (default nlphuji/flickr30k); folder: your "
        "pictures; unused by shapes and openmoji",
    )
    cache_folder: Optional[FolderOrFile] = Field(
        None,
        description="flickr30k: where downloads (hub/) and Arrow files (datasets/) are kept; "
        "default HF_HOME",
    )
    streaming: bool = Field(
        False,
        description="flickr30k: `lgpt prepare` reads the hub's parquet files (or local ones) in "
        "order and keeps no picture on the disk, only the latent cache; training then reads "
        "captions from the source and latents from the cache",
    )
    resolution: int = Field(256, ge=8, description="side of the square training images, pixels")
    crops: int = Field(
        1,
        ge=1,
        description="different crops of every training image: in the cache, or in phase 2 one an "
        "epoch in turn",
    )
    crop_scale_min: float = Field(
        1.0, gt=0, le=1, description="smallest crop side as a fraction of the image's shorter side"
    )
    flip: bool = Field(False, description="mirror every second crop left to right")
    max_bad_images: int = Field(
        100, ge=0, description="corrupt or missing images to skip before it is an error"
    )
    workers: int = Field(2, ge=0, description="threads that load and cut images, per rank")
    seed: Seed = Field(0, description="seed of drawn scenes and of crops")
    shapes: ShapesSettings = ShapesSettings()
    openmoji: OpenmojiSettings = OpenmojiSettings()
