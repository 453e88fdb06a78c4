"""Exact parameter counts of LatentGPT, the VQ-VAE and its discriminator, from settings alone.

The same sums as the modules make (`models/latent_gpt.py`, `models/vqvae.py`,
`models/discriminator.py`; the tests compare them), but in a moment and without torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

from pydantic import ValidationError

from lgpt.core.errors import SettingsError
from lgpt.settings.discriminator import DiscriminatorSettings
from lgpt.settings.phases import Phase2, RunSettings, TransformerRun
from lgpt.settings.text import RANDOM_ENCODER, RANDOM_ENCODER_WIDTH
from lgpt.settings.transformer import TransformerSettings
from lgpt.settings.vqvae import VqvaeSettings, VqvaeSourceSettings

# Width of the text tower's hidden states; other encoders are read from their folder.
_TEXT_WIDTHS = {
    RANDOM_ENCODER: RANDOM_ENCODER_WIDTH,
    "openai/clip-vit-base-patch32": 512,
    "openai/clip-vit-base-patch16": 512,
    "openai/clip-vit-large-patch14": 768,
}
_HF_CODEBOOK_SIZE = 16384  # dalle-mini/vqgan_imagenet_f16_16384
_HF_DOWNSAMPLE_FACTOR = 16


def run_parameters(run: RunSettings) -> int:
    """Trained numbers of what a run trains.

    Raises:
        SettingsError: The codebook, the token grid or the text width cannot be known from the
            settings and the files they name.
    """
    if isinstance(run, Phase2):
        if run.finetuning.trains == "decoder":
            return _decoder(run.vqvae) + _conv(run.vqvae.code_dim, run.vqvae.z_channels, 1)
        return vqvae_parameters(run.vqvae)
    codes, side, text_width = transformer_surroundings(run)
    return latent_gpt_parameters(run.transformer, codes, side * side, text_width)


def transformer_surroundings(run: TransformerRun) -> tuple[int, int, Optional[int]]:
    """What data decide of a transformer: codes, side of the token grid, width of the text.

    Raises:
        SettingsError: One of them cannot be known from the settings and the files they name.
    """
    codes, factor = _codes_and_factor(run.vqvae)
    return codes, run.data.resolution // factor, _text_width(run)


def latent_gpt_parameters(
    settings: TransformerSettings, codebook_size: int, tokens: int, text_width: Optional[int]
) -> int:
    """Parameters of LatentGPT.

    Args:
        settings: The transformer's shape.
        codebook_size: V.
        tokens: Tokens of one picture; only learned positions depend on it.
        text_width: Width of the text embeddings, None for an unconditional model.
    """
    width = settings.hidden
    words = text_width or width
    embeddings = codebook_size * width + width + words  # tokens, start, null
    if settings.positions == "learned":
        embeddings += tokens * width
    norms = _norm(settings, words) + _norm(settings, width)  # text, final
    head = codebook_size * width
    return embeddings + norms + head + settings.layers * _block_parameters(settings, words)


def _block_parameters(settings: TransformerSettings, text_width: int) -> int:
    width = settings.hidden
    self_attention = 4 * width * width
    cross_attention = 2 * width * width + 2 * text_width * width
    matrices = 3 if settings.mlp == "swiglu" else 2
    mlp = matrices * width * (settings.mlp_hidden or 4 * width)
    head_norms = 4 * _norm(settings, width // settings.heads) if settings.qk_norm else 0
    return self_attention + cross_attention + mlp + 3 * _norm(settings, width) + head_norms


def _norm(settings: TransformerSettings, width: int) -> int:
    return width if settings.norm == "rmsnorm" else 2 * width


def vqvae_parameters(settings: VqvaeSettings) -> int:
    """Parameters of the VQ-VAE; codes that follow moving averages are no parameters."""
    codebook = settings.codebook_size * settings.code_dim
    if settings.codebook_update == "ema":
        codebook = 0
    latents, codes = settings.z_channels, settings.code_dim
    quant_convs = _conv(latents, codes, 1) + _conv(codes, latents, 1)
    return _encoder(settings) + _decoder(settings) + quant_convs + codebook


def discriminator_parameters(settings: DiscriminatorSettings) -> int:
    """Parameters of the second player of phase 2, which has gradients and moments of its own."""
    widths = [settings.channels * min(1 << level, 8) for level in range(settings.layers + 1)]
    total = 3 * widths[0] * 16 + widths[0]
    for width_in, width in zip(widths, widths[1:]):
        total += width_in * width * 16 + _group_norm(width)  # no bias
    return total + widths[-1] * 16 + 1


def _encoder(s: VqvaeSettings) -> int:
    total, width = _conv(3, s.ch, 3), s.ch
    for level, multiple in enumerate(s.ch_mult):
        total += _level(s, level, width, s.num_res_blocks)
        width = s.ch * multiple
        if level < len(s.ch_mult) - 1:
            total += _conv(width, width, 3)
    return total + _middle(width) + _group_norm(width) + _conv(width, s.z_channels, 3)


def _decoder(s: VqvaeSettings) -> int:
    width = s.ch * s.ch_mult[-1]
    total = _conv(s.z_channels, width, 3) + _middle(width)
    for level in reversed(range(len(s.ch_mult))):
        total += _level(s, level, width, s.num_res_blocks + 1)
        width = s.ch * s.ch_mult[level]
        if level > 0:
            total += _conv(width, width, 3)
    return total + _group_norm(width) + _conv(width, 3, 3)


def _level(s: VqvaeSettings, level: int, width_in: int, blocks: int) -> int:
    width = s.ch * s.ch_mult[level]
    total = _res_block(width_in, width) + (blocks - 1) * _res_block(width, width)
    has_attention = s.resolution // 2**level in s.attn_resolutions
    return total + (blocks * _attention(width) if has_attention else 0)


def _middle(width: int) -> int:
    return 2 * _res_block(width, width) + _attention(width)


def _res_block(width_in: int, width: int) -> int:
    shortcut = _conv(width_in, width, 1) if width_in != width else 0
    convs = _conv(width_in, width, 3) + _conv(width, width, 3)
    return _group_norm(width_in) + _group_norm(width) + convs + shortcut


def _attention(width: int) -> int:
    return _group_norm(width) + 4 * _conv(width, width, 1)


def _group_norm(width: int) -> int:
    return 2 * width


def _conv(width_in: int, width: int, kernel: int) -> int:
    return width_in * width * kernel * kernel + width


def _codes_and_factor(vqvae: VqvaeSourceSettings) -> tuple[int, int]:
    """Codebook size and downsample factor: as expected by the settings, else as the files say."""
    codes, factor = vqvae.codebook_size, vqvae.downsample_factor
    if codes and factor:
        return codes, factor
    found = _vqvae_of_folder(vqvae.checkpoint)
    if found is not None:
        return codes or found.codebook_size, factor or found.downsample_factor
    if vqvae.source == "pretrained_hf":
        return codes or _HF_CODEBOOK_SIZE, factor or _HF_DOWNSAMPLE_FACTOR
    raise SettingsError(
        f"the VQ-VAE {vqvae.checkpoint!r} is not there to be asked; set vqvae.codebook_size and "
        "vqvae.downsample_factor."
    )


def _vqvae_of_folder(folder: str) -> Optional[VqvaeSettings]:
    """The architecture written in a model folder, or in the `model` folder of a run."""
    for place in (Path(folder), Path(folder) / "model"):
        values = _read_json(place / "config.json")
        if "codebook_size" in values:
            known = {key: values[key] for key in VqvaeSettings.model_fields if key in values}
            try:
                return VqvaeSettings.model_validate(known)
            except ValidationError as error:
                wrong = ".".join(map(str, error.errors()[0]["loc"]))
                raise SettingsError(
                    f"{place / 'config.json'} describes no VQ-VAE of lgpt: its {wrong} is not "
                    "allowed; write the model folder again."
                ) from None
    return None


def _text_width(run: TransformerRun) -> Optional[int]:
    if run.conditioning == "unconditional":
        return None
    if run.text.encoder in _TEXT_WIDTHS:
        return _TEXT_WIDTHS[run.text.encoder]
    values = _read_json(Path(run.text.encoder) / "config.json")
    text_config = values.get("text_config", values)  # of a whole CLIP, or of its text tower
    width = text_config.get("hidden_size") if isinstance(text_config, dict) else None
    if isinstance(width, int):
        return width
    raise SettingsError(
        f"the width of text.encoder {run.text.encoder!r} is unknown: its folder has no config.json "
        f"with hidden_size, and it is none of {', '.join(_TEXT_WIDTHS)}."
    )


def _read_json(file: Path) -> dict[str, Any]:
    # Unlike Path.is_file, isfile takes names that are too long or lie in unreadable folders.
    if not os.path.isfile(file):
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file} cannot be read as JSON: {error}.") from None
    return values if isinstance(values, dict) else {}
