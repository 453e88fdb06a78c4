"""`lgpt bench prepare`: is preparation limited by the VQ-VAE's encoder alone?

The whole way (dataset, transform, encoder, writer, into a temporary folder) against a bare loop
over `vqvae.encode` on pictures that lie on the device, in batches of the same size. Both do the
same number of pictures in every round, taking turns at being first, so that a machine that gets
slower or warmer does it to both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.captioned import BadImage, CaptionedDataset
from lgpt.data.latent_cache import ImageEncoder, build_latent_cache, pictures_per_call
from lgpt.data.progress import progress
from lgpt.data.transforms import ImageTransform, to_unit_range
from lgpt.engine.clock import seconds_when_done
from lgpt.engine.memory import forget_peak, peak_bytes
from lgpt.engine.start import device_of_this_rank
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.data import DataSettings
from lgpt.settings.phases import TransformerRun
from lgpt.settings.vqvae import VqvaeSourceSettings
from lgpt.training.components import load_vqvae_of, open_split, transform_of
from lgpt.training.encode_latents import image_encoder

_log = get_logger(__name__)

_VQGAN = VQVAEConfig(codebook_size=16384, code_dim=256)  # vqgan_imagenet_f16_16384


def bench_prepare(
    run: TransformerRun, *, images: int, rounds: int, random_vqvae: bool = False
) -> dict[str, Any]:
    """Measure the preparation of a run's pictures against the bare encoder.

    Args:
        run: Whose data, transform and VQ-VAE are taken; its latent cache is not touched.
        images: The first so many training pictures, fewer if there are not as many; each is encoded
            with all its crops.
        rounds: Each measures both ways once; medians are given.
        random_vqvae: Take random weights where the run's VQ-VAE is missing.

    Returns:
        JSON values. `images_per_second` counts encoded crops, `prepare_tokens_per_second` what they
        become; `peak_bytes` is the most that this process took while it prepared (on CUDA:
        allocated), None where the system does not tell; `ratio` is the median over rounds of
        preparation's rate by the bare loop's. `encoder_share` is the part of preparation's own time
        in which the encoder ran: about the ratio, but steady on a busy machine; it does not see
        threads that read pictures taking cores from the encoder. `reading_seconds_per_image` is
        what one thread takes to load, cut and resize a crop, `encoding_seconds_per_image` the bare
        loop's time.

    Raises:
        CheckpointError: The VQ-VAE is missing or unusable.
        DataError: The dataset cannot be had, or its pictures are bad.
        SettingsError: The resolution is no multiple of the VQ-VAE's f.
    """
    device = device_of_this_rank()
    vqvae, remark = _vqvae_for(run.vqvae, random_vqvae)
    vqvae = vqvae.to(device)
    _check_sides(run.data.resolution, vqvae)
    dataset = _First(open_split(run.data, "train"), images)
    transform = transform_of(run.data, "train")
    pictures = pictures_per_call(transform.resolution, transform.crops)
    batch, reading_seconds = _batch_in_memory(dataset, transform, pictures)
    encoded = len(dataset) * transform.crops
    batch = batch.to(device)
    vqvae.encode(batch)  # kernels are chosen, memory is taken
    prepared_seconds, bare_seconds, shares, peaks = [], [], [], []
    with progress("bench prepare", 2 * rounds, unit="passes", is_shown=True) as advance:
        for number in range(rounds):
            for is_bare in (True, False) if number % 2 == 0 else (False, True):
                if is_bare:
                    bare_seconds.append(_seconds_of_bare_loop(vqvae, batch, encoded, device))
                else:
                    counts_peak = forget_peak(device)
                    encode = _TimedEncoder(image_encoder(vqvae, device))
                    seconds = _seconds_of_preparation(vqvae, encode, dataset, transform, run.data)
                    prepared_seconds.append(seconds)
                    shares.append(encode.seconds / seconds)
                    peaks += [peak_bytes(device)] if counts_peak else []
                advance(1)
    grid_side = transform.resolution // vqvae.downsample_factor
    prepared = encoded / statistics.median(prepared_seconds)
    return {
        "device": _name_of(device),
        "threads": torch.get_num_threads(),
        "workers": run.data.workers,
        "vqvae": remark,
        "vqvae_parameters": sum(p.numel() for p in vqvae.parameters()),
        "dataset": run.data.dataset,
        "resolution": run.data.resolution,
        "pictures": len(dataset),
        "crops": transform.crops,
        "images_per_call": len(batch),
        "rounds": rounds,
        "bare_images_per_second": encoded / statistics.median(bare_seconds),
        "prepare_images_per_second": prepared,
        "prepare_tokens_per_second": prepared * grid_side**2,
        "peak_bytes": max(peaks, default=None),
        "ratio": statistics.median(b / p for b, p in zip(bare_seconds, prepared_seconds)),
        "ratios": [b / p for b, p in zip(bare_seconds, prepared_seconds)],
        "encoder_share": statistics.median(shares),
        "encoding_seconds_per_image": statistics.median(bare_seconds) / encoded,
        "reading_seconds_per_image": reading_seconds,
    }


def prepare_table(result: dict[str, Any]) -> Table:
    """The result of `bench_prepare` for people."""
    table = Table(title=f"Preparation against the bare encoder, on {result['device']}")
    table.add_column("")
    table.add_column("images/s", justify="right")
    table.add_column("", overflow="fold")
    table.add_row("bare encoder", f"{result['bare_images_per_second']:.2f}", result["vqvae"])
    table.add_row(
        "preparation",
        f"{result['prepare_images_per_second']:.2f}",
        f"{result['pictures']} pictures of {result['dataset']} x {result['crops']} crop(s) at "
        f"{result['resolution']} pixels, {result['images_per_call']} a call",
    )
    peak = result["peak_bytes"]
    table.add_row(
        "",
        "",
        f"{result['prepare_tokens_per_second']:,.0f} tokens/s"
        + ("" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"),
    )
    table.add_row(
        "ratio",
        f"{result['ratio']:.3f}",
        f"median of {result['rounds']} rounds: "
        + ", ".join(f"{ratio:.3f}" for ratio in result["ratios"]),
    )
    table.add_row(
        "encoder's share",
        f"{result['encoder_share']:.3f}",
        "of preparation's time; far from the ratio, the machine is busy with something else",
    )
    table.add_row(
        "",
        "",
        f"a crop takes {1000 * result['reading_seconds_per_image']:.1f} ms to read in one of "
        f"{result['workers']} thread(s), {1000 * result['encoding_seconds_per_image']:.1f} ms to "
        f"encode with {result['threads']} thread(s)",
    )
    return table


class _First:
    """The first pictures of a split."""

    def __init__(self, whole: CaptionedDataset, count: int) -> None:
        self._whole, self._count = whole, min(count, len(whole))
        self.name, self.split, self.fingerprint = whole.name, whole.split, whole.fingerprint

    def __len__(self) -> int:
        return self._count

    def image_id(self, index: int) -> str:
        return self._whole.image_id(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._whole.captions(index)

    def load(self, index: int) -> Image.Image:
        return self._whole.load(index)


def _vqvae_for(settings: VqvaeSourceSettings, random_vqvae: bool) -> tuple[VQVAE, str]:
    """The run's VQ-VAE, or one of random weights; and what it is, for people.

    One that is there but unusable stays an error: random weights are for those that have none yet.
    """
    try:
        return load_vqvae_of(settings), f"{settings.source} {settings.checkpoint}"
    except CheckpointError as error:
        if Path(settings.checkpoint).exists():
            raise
        if not random_vqvae:
            raise CheckpointError(
                f"{error} To measure without weights, give --random-vqvae."
            ) from error
    config = expected_architecture(settings)
    remark = (
        f"RANDOM weights ({settings.checkpoint} is missing): {config.codebook_size} codes, "
        f"f={config.downsample_factor}, ch {config.ch} x {list(config.ch_mult)}"
    )
    _log.warning("%s", remark)
    return VQVAE(config).requires_grad_(False).eval(), remark


def expected_architecture(settings: VqvaeSourceSettings) -> VQVAEConfig:
    """The published VQGAN's, with the codes and the f that the run config expects."""
    factor = settings.downsample_factor or _VQGAN.downsample_factor
    levels = factor.bit_length()
    if factor != 2 ** (levels - 1):
        raise SettingsError(
            f"vqvae.downsample_factor ({factor}) must be a power of 2 for --random-vqvae, such as "
            "8 or 16."
        )
    # As published: f=16 has 1 1 2 2 4, f=8 has 1 2 2 4, f=4 has 1 2 4.
    mult = (1, 2, 4) if levels == 3 else ((1,) * (levels - 3) + (2, 2, 4))[-levels:]
    return VQVAEConfig(
        codebook_size=settings.codebook_size or _VQGAN.codebook_size,
        code_dim=_VQGAN.code_dim,
        ch_mult=mult,
        attn_resolutions=(_VQGAN.resolution // factor,),
    )


def _check_sides(resolution: int, vqvae: VQVAE) -> None:
    factor = vqvae.downsample_factor
    if resolution % factor:
        raise SettingsError(
            f"data.resolution ({resolution}) must be a multiple of the VQ-VAE's f ({factor}); set "
            f"it to {resolution // factor * factor or factor}."
        )


def _batch_in_memory(
    dataset: CaptionedDataset, transform: ImageTransform, pictures: int
) -> tuple[Tensor, float]:
    """One call's crops [pictures * crops, 3, H, W] in [-1, 1], and the seconds to read one."""
    crops = []
    started_at = time.perf_counter()
    for item in range(min(pictures, len(dataset))):
        try:
            image = dataset.load(item)
        except BadImage:
            continue
        crops += [torch.from_numpy(transform(image, item, crop)) for crop in range(transform.crops)]
    if not crops:
        dataset.load(0)  # raises what is wrong with it
    seconds = (time.perf_counter() - started_at) / len(crops)
    return to_unit_range(torch.stack(crops)), seconds


def _seconds_of_bare_loop(vqvae: VQVAE, batch: Tensor, images: int, device: torch.device) -> float:
    started_at = seconds_when_done(device)
    for first in range(0, images, len(batch)):
        vqvae.encode(batch[: images - first])
    return seconds_when_done(device) - started_at


class _TimedEncoder:
    """An image encoder that adds up its own time; its codes are on the CPU, so a GPU is done."""

    def __init__(self, encode: ImageEncoder) -> None:
        self._encode, self.seconds = encode, 0.0

    def __call__(self, images: Tensor) -> Tensor:
        started_at = time.perf_counter()
        codes = self._encode(images)
        self.seconds += time.perf_counter() - started_at
        return codes


def _seconds_of_preparation(
    vqvae: VQVAE,
    encode: ImageEncoder,
    dataset: CaptionedDataset,
    transform: ImageTransform,
    data: DataSettings,
) -> float:
    with tempfile.TemporaryDirectory(prefix="lgpt-bench-") as folder:
        started_at = time.perf_counter()
        build_latent_cache(
            Path(folder) / "train",
            dataset,
            transform,
            encode_images=encode,
            encode_captions=None,
            fingerprint={"made_by": "lgpt bench prepare"},
            codebook_size=vqvae.vocab_size,
            downsample_factor=vqvae.downsample_factor,
            text_dtype="float16",
            max_bad_images=data.max_bad_images,
            rank=0,
            world=1,
            barrier=lambda: None,
            workers=data.workers,
            show_progress=False,
        )
        return time.perf_counter() - started_at


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
