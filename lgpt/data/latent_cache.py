"""The latent cache: every crop of every picture as VQ tokens, every caption as CLIP embeddings.

Built once, in float32, by all ranks together; read through memory maps. `latent_cache_writer` tells
what the files hold and why the bytes depend neither on the number of ranks nor on kills.

Embeddings are kept in half the bytes of the float32 they were computed in, and given back as
float32. `float16` rounds to 11 significant bits: a relative error of at most 2^-11 = 0.05% (CLIP's
last hidden states lie within +-40; a value above 65,504 is refused). `bfloat16` has float32's range
but 8 bits: at most 2^-8 = 0.4%, what bf16 training makes of its input anyway. Measured over the
embeddings of the fixture clip_tiny (root mean square, relative): 0.021% and 0.17%. A caption of 20
tokens takes 20.5 KB at width 512. Tokens lose nothing.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lgpt.core.errors import DataError
from lgpt.core.logging import get_logger
from lgpt.data.captioned import BadImages, CaptionedDataset
from lgpt.data.encoder_calls import encoder_calls
from lgpt.data.latent_cache_writer import (
    FORMAT,
    MANIFEST,
    CachePlan,
    Chunk,
    LatentCacheWriter,
    refuse_other_fingerprint,
)
from lgpt.data.progress import progress
from lgpt.data.transforms import ImageTransform

_log = get_logger(__name__)

ImageEncoder = Callable[[Float[Tensor, "b 3 H W"]], Int[Tensor, "b h w"]]
CaptionEncoder = Callable[[list[str]], tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]]

# An encoder of 128 channels takes some 0.5 GB an activation for 16 pictures of 256 x 256.
_PIXELS_PER_CALL = 16 * 256 * 256
_IMAGES_PER_CALL_MAX = 256
_CAPTIONS_PER_CALL = 128
_TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_STATISTICS_ITEMS = 4096


@dataclass(frozen=True)
class CachedBatch:
    """Tokens of n crops and one caption's embeddings each, padded to the longest with zeros."""

    tokens: Int[Tensor, "n tokens"]
    text: Optional[Float[Tensor, "n words width"]]
    text_mask: Optional[Bool[Tensor, "n words"]]


@dataclass(frozen=True)
class TokenStatistics:
    """Use of the codebook over a whole cache. Entropy in nats, at most ln(codebook_size)."""

    tokens: int
    used_codes: int
    usage: float
    entropy: float


class LatentCache:
    """A finished cache of one split, opened read-only.

    Attributes:
        text_width: None when there is no text, or none is wanted.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], with_text: bool = True) -> None:
        self.folder, self.manifest = folder, manifest
        self.grid: tuple[int, int] = (manifest["grid"][0], manifest["grid"][1])
        self.crops: int = manifest["crops"]
        self.codebook_size: int = manifest["codebook_size"]
        self.text_width: Optional[int] = manifest["text_width"] if with_text else None
        shape = (manifest["items"], self.crops, self.grid[0] * self.grid[1])
        self._tokens = np.memmap(
            folder / "tokens.bin", dtype=manifest["tokens_dtype"], mode="r", shape=shape
        )
        self._caption_offsets = np.load(folder / "caption_offsets.npy")
        self._caption_rows = np.load(folder / "caption_rows.npy", mmap_mode="r")
        if self.text_width is not None:
            self._text_type = _TORCH_TYPES[manifest["text_dtype"]]
            self._offsets = np.load(folder / "embedding_offsets.npy", mmap_mode="r")
            self._embeddings = np.memmap(
                folder / "embeddings.bin", dtype=np.int16, mode="r"
            ).reshape(-1, self.text_width)

    @classmethod
    def open(
        cls,
        folder: Union[Path, str],
        expected_fingerprint: Optional[dict[str, Any]] = None,
        with_text: bool = True,
    ) -> LatentCache:
        """Open the cache of one split, `<cache folder>/<split>`.

        Args:
            expected_fingerprint: What the run would make the cache from; None skips the comparison.
            with_text: False leaves the text of a cache that has some unread.

        Raises:
            DataError: Missing, unfinished, cut short, or made from something else.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"{folder} is not a finished latent cache (it has no {MANIFEST}); run "
                "`lgpt prepare CONFIG`, which goes on where it was stopped, or leave latent_cache "
                "out to encode on the fly."
            )
        try:
            manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{folder / MANIFEST} is damaged: {error}; make the cache again: rm -r {folder} && "
                "lgpt prepare CONFIG"
            ) from None
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{folder} has cache format {manifest.get('format')}, this lgpt reads {FORMAT}; "
                f"make it again: rm -r {folder} && lgpt prepare CONFIG"
            )
        for name, size in manifest["files"].items():
            found = (folder / name).stat().st_size if (folder / name).exists() else "missing"
            if found != size:
                raise DataError(
                    f"{folder / name} is damaged: {size} bytes in its manifest, {found} on disk; "
                    f"make it again: rm -r {folder} && lgpt prepare CONFIG"
                )
        if expected_fingerprint is not None:
            refuse_other_fingerprint(folder, manifest["fingerprint"], expected_fingerprint)
        return cls(folder, manifest, with_text)

    def __len__(self) -> int:
        return int(self._tokens.shape[0])

    def num_captions(self, item: int) -> int:
        """How many captions a picture has."""
        return int(self._caption_offsets[item + 1] - self._caption_offsets[item])

    def batch(self, items: np.ndarray, crops: np.ndarray, captions: np.ndarray) -> CachedBatch:
        """Crop `crops[k]` and caption `captions[k]` of picture `items[k]`, for k = 0 .. n - 1.

        Text is None in a cache made without a text encoder, or opened without its text.
        """
        tokens = torch.from_numpy(self._tokens[items, crops].astype(np.int64))
        if self.text_width is None:
            return CachedBatch(tokens, None, None)
        rows = self._caption_rows[self._caption_offsets[items] + captions]
        starts, stops = self._offsets[rows], self._offsets[rows + 1]
        longest = int((stops - starts).max())
        bits = np.zeros((len(items), longest, self.text_width), np.int16)
        for place, (start, stop) in enumerate(zip(starts, stops)):
            bits[place, : stop - start] = self._embeddings[start:stop]
        mask = np.arange(longest)[None] < (stops - starts)[:, None]
        text = torch.from_numpy(bits).view(self._text_type).float()
        return CachedBatch(tokens, text, torch.from_numpy(mask))

    def token_statistics(self) -> TokenStatistics:
        """Counts every token of the cache."""
        counts = np.zeros(self.codebook_size, np.int64)
        for first in range(0, len(self), _STATISTICS_ITEMS):
            piece = self._tokens[first : first + _STATISTICS_ITEMS]
            counts += np.bincount(piece.ravel(), minlength=self.codebook_size)
        shares = counts[counts > 0] / counts.sum()
        used = len(shares)
        entropy = float(-(shares * np.log(shares)).sum())
        return TokenStatistics(int(counts.sum()), used, used / self.codebook_size, entropy)


def pictures_per_call(resolution: int, crops: int) -> int:
    """How many pictures, each with all its crops, one call of the image encoder gets.

    Args:
        resolution: Side of a crop, pixels.
        crops: Crops a picture.
    """
    pixels = resolution**2 * crops
    return max(1, min(_PIXELS_PER_CALL // pixels, _IMAGES_PER_CALL_MAX // crops))


def build_latent_cache(
    folder: Path,
    dataset: CaptionedDataset,
    transform: ImageTransform,
    *,
    encode_images: ImageEncoder,
    encode_captions: Optional[CaptionEncoder],
    count_cut_captions: Callable[[list[str]], int] = lambda captions: 0,
    fingerprint: dict[str, Any],
    codebook_size: int,
    downsample_factor: int,
    text_dtype: str,
    max_bad_images: int,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    workers: int = 2,
    show_progress: bool = True,
) -> None:
    """Make the cache of one split, or complete it; all ranks call this together.

    A finished cache with this fingerprint is left alone. Bad pictures are left out of the cache.

    Args:
        folder: The split's own folder, `<cache folder>/<split>`, seen by all ranks.
        encode_images: Float32 pictures in [-1, 1], on the CPU, to codes; all ranks' must agree.
        encode_captions: Captions to embeddings and mask (True: a word; words first); None: no text.
        count_cut_captions: How many of these captions the encoder cuts; kept in the manifest.
        fingerprint: Everything that decides the content, as named JSON values.
        text_dtype: float16 or bfloat16, see above.
        max_bad_images: Corrupt or missing pictures allowed, over all ranks.
        barrier: Returns when all ranks have called it.
        workers: Threads a rank that read and cut pictures.

    Raises:
        DataError: The folder holds something else, or too many pictures are bad.
    """
    captions = [dataset.captions(item) for item in range(len(dataset))]
    different = list(dict.fromkeys(text for texts in captions for text in texts))
    side = transform.resolution // downsample_factor
    plan = CachePlan(
        fingerprint=fingerprint,
        dataset=dataset.name,
        split=dataset.split,
        items=len(dataset),
        crops=transform.crops,
        grid=(side, side),
        codebook_size=codebook_size,
        downsample_factor=downsample_factor,
        different_captions=len(different),
        text_dtype=None if encode_captions is None else text_dtype,
    )
    writer = LatentCacheWriter(folder, plan, rank, world)
    if not writer.is_finished:
        chunks = writer.begin(barrier)
        _log.info("Latent cache %s: %d chunks to do on this rank", folder, len(chunks))
        is_shown = show_progress and rank == 0
        bad = BadImages(max_bad_images, f"{dataset.name}/{dataset.split}")
        _encode_images(writer, chunks, dataset, transform, encode_images, bad, workers, is_shown)
        if encode_captions is not None:
            _encode_captions(
                writer, chunks, different, encode_captions, count_cut_captions, is_shown
            )
        barrier()
        _refuse_too_many(writer, dataset, max_bad_images)
        if rank == 0:
            writer.finish([dataset.image_id(item) for item in range(len(dataset))], captions)
    barrier()
    if rank == 0:
        writer.remove_parts()


def _encode_images(
    writer: LatentCacheWriter,
    chunks: list[Chunk],
    dataset: CaptionedDataset,
    transform: ImageTransform,
    encode: ImageEncoder,
    bad: BadImages,
    workers: int,
    is_shown: bool,
) -> None:
    mine = [chunk for chunk in chunks if chunk.kind == "images"]
    total = sum(chunk.stop - chunk.first for chunk in mine)
    title = f"{dataset.name}/{dataset.split} to tokens"
    with progress(title, total, unit="pictures", is_shown=is_shown) as advance:
        pictures = pictures_per_call(transform.resolution, transform.crops)
        tokens: list[np.ndarray] = []
        items: list[int] = []
        bad_items: dict[int, str] = {}
        calls = encoder_calls(mine, dataset, transform, pictures=pictures, workers=workers)
        with closing(calls):
            for call in calls:
                for item, reason in call.bad.items():
                    bad.skip(dataset.image_id(item), reason)
                tokens.append(_tokens_of(writer.plan, call.images, encode))
                items += call.items
                bad_items.update(call.bad)
                advance(len(call.items) + len(call.bad))
                if call.is_last:
                    writer.write_chunk(
                        call.chunk,
                        tokens=np.concatenate(tokens),
                        items=np.array(items, dtype=np.int64),
                        bad_items=np.array(list(bad_items), dtype=np.int64),
                        bad_reasons=np.array(list(bad_items.values()), dtype=np.str_),
                    )
                    tokens, items, bad_items = [], [], {}


def _tokens_of(plan: CachePlan, images: Tensor, encode: ImageEncoder) -> np.ndarray:
    """Tokens [pictures, crops, h * w] of one call's crops."""
    tokens = np.zeros((0, *plan.grid), plan.tokens_dtype)
    if len(images) > 0:
        codes = encode(images)
        assert tuple(codes.shape) == (len(images), *plan.grid), (codes.shape, plan.grid)
        assert int(codes.min()) >= 0, codes.min()
        assert int(codes.max()) < plan.codebook_size, (codes.max(), plan.codebook_size)
        tokens = codes.cpu().numpy().astype(plan.tokens_dtype)
    return tokens.reshape(-1, plan.crops, plan.grid[0] * plan.grid[1])


def _encode_captions(
    writer: LatentCacheWriter,
    chunks: list[Chunk],
    different: list[str],
    encode: CaptionEncoder,
    count_cut: Callable[[list[str]], int],
    is_shown: bool,
) -> None:
    mine = [chunk for chunk in chunks if chunk.kind == "captions"]
    total = sum(chunk.stop - chunk.first for chunk in mine)
    assert writer.plan.text_dtype is not None
    kept_type = _TORCH_TYPES[writer.plan.text_dtype]
    title = f"{writer.plan.dataset}/{writer.plan.split} captions"
    with progress(title, total, unit="different captions", is_shown=is_shown) as advance:
        for chunk in mine:
            pieces, lengths, cut = [], [], 0
            for first in range(chunk.first, chunk.stop, _CAPTIONS_PER_CALL):
                texts = different[first : min(first + _CAPTIONS_PER_CALL, chunk.stop)]
                text, mask = (value.cpu() for value in encode(texts))
                words = mask.sum(1)
                assert torch.equal(mask, torch.arange(mask.shape[1])[None] < words[:, None])
                kept = text[mask].to(kept_type)
                if not torch.isfinite(kept).all():
                    raise DataError(
                        f"Embeddings of captions do not fit into {writer.plan.text_dtype}: largest "
                        f"value {float(text[mask].abs().max()):g}; set text.cache_dtype=bfloat16."
                    )
                pieces.append(kept.view(torch.int16).numpy())
                lengths.append(words.numpy())
                cut += count_cut(texts)
                advance(len(texts))
            writer.write_chunk(
                chunk,
                embeddings=np.concatenate(pieces),
                lengths=np.concatenate(lengths),
                cut=np.array(cut),
            )


def _refuse_too_many(writer: LatentCacheWriter, dataset: CaptionedDataset, limit: int) -> None:
    """The limit holds over all ranks; every rank comes to the same answer."""
    all_bad = BadImages(limit, f"{dataset.name}/{dataset.split}")
    for item, reason in writer.bad_images():
        all_bad.count(dataset.image_id(item), reason)
