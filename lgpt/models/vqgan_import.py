"""VQ-VAEs from elsewhere, read as data: never is anything unpickled into code.

    pretrained_taming   a taming-transformers .ckpt and its model.yaml
    pretrained_hf       its Flax port (vqgan-jax): config.json and flax_model.msgpack
    pretrained_llamagen LlamaGen's vq_ds16 and vq_ds8: a .pt that needs no config
    custom              our own folder, or a phase 2 run folder with `model/` inside

REFERENCE of the formats is the code of taming-transformers 3ba01b24, vqgan-jax 10ef240 and LlamaGen
ce98ec41.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.files import write_text_atomically
from lgpt.core.logging import get_logger
from lgpt.models.ddconfig import (
    FIXED_DDCONFIG,
    SHAPING_DDCONFIG,
    config_from_json,
    config_from_yaml,
)
from lgpt.models.flax_weights import FlaxLayout, read_flax_tensors
from lgpt.models.llamagen_checkpoint import (
    LlamagenLayout,
    config_from_tensors,
    read_llamagen_state,
)
from lgpt.models.loading_report import LoadingReport
from lgpt.models.model_folder import require_files
from lgpt.models.source_files import flax_folder, llamagen_file, taming_file, yaml_beside
from lgpt.models.strict_loading import (
    Layout,
    Matched,
    match_strictly,
    refuse_not_finite,
)
from lgpt.models.taming_checkpoint import read_taming_state
from lgpt.models.vqvae import VQVAE, inference_state
from lgpt.models.vqvae_config import INPUT_RANGES, VQVAEConfig

_logger = get_logger(__name__)

_CONVERSIONS = {
    "lgpt": ("config.json", "model.safetensors"),
    "taming": ("model.yaml", "last.ckpt"),
}

SOURCES = ("pretrained_hf", "pretrained_taming", "pretrained_llamagen", "custom")


def load_vqvae(
    source: str,
    checkpoint: Union[str, Path],
    ddconfig: Optional[Union[str, Path]] = None,
    input_range: str = "-1..1",
) -> VQVAE:
    """Open a trained VQ-VAE on the CPU, in float32 and eval mode; every weight must fit.

    What matched is logged and kept in `vqvae.report`.

    Args:
        source: `pretrained_hf`, `pretrained_taming`, `pretrained_llamagen` or `custom`.
        checkpoint: Hub name (of `pretrained_hf` and `pretrained_llamagen`), folder or file.
        ddconfig: The model.yaml of a taming .ckpt, when it does not lie beside it.
        input_range: `0..1` for weights that are to be fed as dalle-mini's notebooks did. The
            pictures that `encode` takes and `decode` gives are in [-1, 1] either way.

    Raises:
        CheckpointError: Files are missing, damaged, unsafe, or not such a VQ-VAE.
        SettingsError: An unknown source or input range.
    """
    if input_range not in INPUT_RANGES:
        raise SettingsError(f"input_range must be one of {INPUT_RANGES}, got {input_range!r}.")
    if ddconfig is not None and source != "pretrained_taming":
        raise SettingsError(f"ddconfig belongs to pretrained_taming only, the source is {source}.")
    if source == "custom":
        return _load_custom(Path(checkpoint), input_range)
    if source == "pretrained_taming":
        return _load_taming(Path(checkpoint), ddconfig, input_range)
    if source == "pretrained_hf":
        return _load_flax(str(checkpoint), input_range)
    if source == "pretrained_llamagen":
        return _load_llamagen(str(checkpoint), input_range)
    raise SettingsError(f"vqvae source {source!r} is not known: it is one of {', '.join(SOURCES)}.")


def _load_custom(folder: Path, input_range: str) -> VQVAE:
    folder = folder.parent if folder.is_file() else folder
    home = next((f for f in (folder, folder / "model") if (f / "config.json").is_file()), None)
    if home is None:
        raise CheckpointError(
            f"{folder} holds no VQ-VAE: neither config.json nor model/config.json is there. Give a "
            "VQ-VAE folder, or the run folder of a finished phase 2 run."
        )
    vqvae = VQVAE.from_pretrained(home)
    refuse_not_finite(vqvae.state_dict(), str(home))
    if input_range != vqvae.config.input_range:
        raise CheckpointError(
            f"{home} was made for pictures in {vqvae.config.input_range}, input_range asks for "
            f"{input_range}; leave input_range at {vqvae.config.input_range}."
        )
    state = inference_state(vqvae)
    matched, ignored = Matched(state, 0, 0, 0), {}
    if extra := sorted(vqvae.state_dict().keys() - state.keys()):
        ignored["the moving averages, which only training needs"] = extra
    return _reported(vqvae, matched, "custom", f"custom VQ-VAE {home}", "config.json", ignored)


def _load_taming(checkpoint: Path, ddconfig: Optional[Union[str, Path]], input_range: str) -> VQVAE:
    weights = taming_file(checkpoint)
    tensors, layout, ignored = read_taming_state(weights)
    config_path = Path(ddconfig) if ddconfig is not None else yaml_beside(weights)
    vqvae, matched = _filled(
        config_from_yaml(config_path, input_range), tensors, str(weights), layout
    )
    what = f"taming VQGAN {weights}" + (f" ({layout.prefix}*)" if layout.prefix else "")
    return _reported(vqvae, matched, "pretrained_taming", what, config_path.name, ignored)


def _load_flax(checkpoint: str, input_range: str) -> VQVAE:
    folder = flax_folder(checkpoint)
    names = ("config.json", "flax_model.msgpack")
    require_files(folder, names, "a Flax VQGAN", f"; it needs {' and '.join(names)}.")
    config_path, weights = (folder / name for name in names)
    vqvae, matched = _filled(
        config_from_json(config_path, input_range),
        read_flax_tensors(weights),
        str(weights),
        FlaxLayout(),
    )
    what = f"Flax VQGAN {checkpoint}"
    return _reported(vqvae, matched, "pretrained_hf", what, config_path.name, {})


def _load_llamagen(checkpoint: str, input_range: str) -> VQVAE:
    weights = llamagen_file(checkpoint)
    tensors, home, ignored = read_llamagen_state(weights)
    config = config_from_tensors(tensors, weights, input_range)
    layout = LlamagenLayout(len(config.ch_mult))
    vqvae, matched = _filled(config, tensors, str(weights), layout)
    what = f"LlamaGen VQ {weights}" + (f" ({home})" if home else "")
    return _reported(vqvae, matched, "pretrained_llamagen", what, "the tensors", ignored)


def _filled(
    config: VQVAEConfig, tensors: Mapping[str, Tensor], source: str, layout: Layout
) -> tuple[VQVAE, Matched]:
    """A VQ-VAE with a file's weights; nothing of its size is laid out before they fit."""
    with torch.device("meta"):
        expected = {k: tuple(t.shape) for k, t in VQVAE(config).state_dict().items()}
    matched = match_strictly(expected, tensors, source, layout)
    vqvae = VQVAE(config)
    vqvae.load_state_dict(matched.state, strict=True)
    return vqvae, matched


def _reported(
    vqvae: VQVAE,
    matched: Matched,
    source: str,
    weights: str,
    architecture_from: str,
    ignored: Mapping[str, Sequence[str]],
) -> VQVAE:
    config = vqvae.config
    vqvae.loading = LoadingReport(
        source=source,
        weights=weights,
        architecture_from=architecture_from,
        matched=len(matched.state),
        renamed=matched.renamed,
        transposed=matched.transposed,
        reshaped=matched.reshaped,
        ignored=tuple((why, len(names)) for why, names in ignored.items()),
        parameters=sum(tensor.numel() for tensor in matched.state.values()),
        codebook_size=config.codebook_size,
        code_dim=config.code_dim,
        l2_normalized_codes=config.l2_normalized_codes,
        downsample_factor=config.downsample_factor,
        input_range=config.input_range,
    )
    for fact in vqvae.report:
        _logger.info("%s", fact)
    return vqvae.eval()


def convert_vqvae(
    vqvae: VQVAE, out: Union[str, Path], *, to: str = "lgpt", overwrite: bool = False
) -> tuple[Path, ...]:
    """Write a VQ-VAE from any source as our own folder, or in taming's layout.

    Args:
        to: `lgpt` (config.json and model.safetensors) or `taming` (model.yaml and last.ckpt).
        overwrite: Replace what `out` holds of these files.

    Returns:
        The files written.

    Raises:
        SettingsError: Another `to`.
        CheckpointError: `out` is a file, holds something already, or cannot be written.
    """
    folder = Path(out)
    check_conversion(folder, to=to, overwrite=overwrite)
    files = tuple(folder / name for name in _CONVERSIONS[to])
    try:
        files[0].unlink(missing_ok=True)  # half a conversion must not look whole
        if to == "taming":
            export_taming(vqvae, folder)
        else:
            vqvae.save_pretrained(folder)
    # torch's and safetensors' ways to say that a file cannot be written, a full disk among them.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    return files


def check_conversion(folder: Path, *, to: str, overwrite: bool) -> None:
    """What of `convert_vqvae` can be refused before anything is read.

    Raises:
        SettingsError: Another `to`.
        CheckpointError: The folder is a file, or holds something already.
    """
    if to not in _CONVERSIONS:
        raise SettingsError(f"--to {to!r} is not known: it is one of {', '.join(_CONVERSIONS)}.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise CheckpointError(
            f"{folder} holds something already: give another folder, or --overwrite to replace "
            f"{' and '.join(_CONVERSIONS[to])} in it."
        )


def export_taming(vqvae: VQVAE, folder: Union[str, Path]) -> Path:
    """Write `last.ckpt` and `model.yaml` that taming's strict `VQModel` load takes.

    Args:
        vqvae: From any source. Codes of unit length are written at unit length: between such codes
            taming's distance |z|^2 - 2 z.e + 1 chooses as the angle does, however long z is.
        folder: Made if need be.

    Returns:
        The .ckpt.
    """
    config = vqvae.config
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    ddconfig = {
        **{key: config.to_dict()[key] for key in SHAPING_DDCONFIG},
        **{key: FIXED_DDCONFIG[key] for key in ("double_z", "in_channels", "out_ch")},
        "dropout": config.dropout,
    }
    params = {
        "embed_dim": config.code_dim,
        "n_embed": config.codebook_size,
        "ddconfig": ddconfig,
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }
    document = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    head = f"# Written by lgpt; pictures in {config.input_range}.\n"
    write_text_atomically(target / "model.yaml", head + yaml.safe_dump(document, sort_keys=False))
    state: dict[str, Tensor] = {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in inference_state(vqvae).items()
    }
    if config.l2_normalized_codes:
        codes = state["quantize.embedding.weight"]
        state["quantize.embedding.weight"] = functional.normalize(codes, dim=1)
    staged = target / ".last.ckpt.tmp"
    torch.save({"state_dict": state}, staged)
    return staged.replace(target / "last.ckpt")
