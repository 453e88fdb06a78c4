"""LlamaGen's VQ (vq_ds16, vq_ds8): a .pt whose tensors alone tell the architecture.

Layout: LlamaGen ce98ec41, tokenizer/tokenizer_image/vq_model.py. The blocks are taming's under
other names; attention stands at the last level only; `decoder.conv_blocks.0` is the LOWEST
resolution, where taming's `decoder.up.0` is the highest. Latents and codes are used at unit length,
and the decoder gets the code at unit length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.pytorch_file import read_pytorch_file, tensors_within
from lgpt.models.strict_loading import Layout
from lgpt.models.vqvae_config import VQVAEConfig

# In the order in which LlamaGen's own scripts look for weights.
_HOMES = ("ema", "model", "state_dict")
_USAGE = "quantize.codebook_used"
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_NOMINAL_RESOLUTION = 256
_MOST_LEVELS = 12


class LlamagenLayout(Layout):
    """LlamaGen's names of our tensors; shapes and axes are the same.

    Args:
        levels: Number of resolutions; the decoder counts them the other way round.
    """

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def name(self, key: str) -> str:
        """`decoder.up.4.block.0.q` -> `decoder.conv_blocks.0.res.0.q` with five levels."""
        parts = key.split(".")
        if parts[1] == "mid":
            parts[2] = _MIDDLE[parts[2]]
        elif parts[1] in ("down", "up"):
            level = int(parts[2])
            parts[2] = str(level if parts[1] == "down" else self.levels - 1 - level)
            parts[1] = "conv_blocks"
            parts[3] = "res" if parts[3] == "block" else parts[3]
        return ".".join(parts)


def read_llamagen_state(path: Path) -> tuple[dict[str, Tensor], str, dict[str, list[str]]]:
    """The VQ's tensors under the file's names, which of the file's parts they are, what is left.

    Raises:
        CheckpointError: The file is damaged, would run code, or holds no such VQ.
    """
    content = read_pytorch_file(path)
    content = content if isinstance(content, Mapping) else {}
    home = next((name for name in _HOMES if isinstance(content.get(name), Mapping)), "")
    tensors = tensors_within(content[home] if home else content, path)
    if not any(name.startswith("encoder.conv_blocks.") for name in tensors):
        first = ", ".join(str(name)[:60] for name in list(tensors or content)[:5]) or "nothing"
        hint = (
            " It looks like taming's: its source is pretrained_taming."
            if any(".down.0." in name for name in tensors)
            else ""
        )
        raise CheckpointError(
            f"{path} holds no LlamaGen VQ: it has no encoder.conv_blocks.* tensors, but "
            f"{first}.{hint}"
        )
    ignored = {}
    if tensors.pop(_USAGE, None) is not None:
        ignored[f"usage statistics of training ({_USAGE})"] = [_USAGE]
    return tensors, home, ignored


def config_from_tensors(tensors: Mapping[str, Tensor], path: Path, input_range: str) -> VQVAEConfig:
    """The architecture that shapes and names tell; strict loading then checks all the others.

    Raises:
        CheckpointError: A tensor that tells it is missing or has another rank.
    """

    def side(name: str, axis: int, rank: int = 4) -> int:
        found = tensors.get(name)
        if found is None or found.ndim != rank:
            what = "is missing" if found is None else f"is {list(found.shape)}"
            raise CheckpointError(
                f"{path}: {name} {what}, so the architecture is not known. Copy or download it "
                "again."
            )
        return int(found.shape[axis])

    found = [
        re.match(r"encoder\.conv_blocks\.(\d{1,6})\.(res|attn)\.(\d{1,6})\.", n) for n in tensors
    ]
    blocks = {(int(m[1]), m[2], int(m[3])) for m in found if m}
    levels = 1 + max((level for level, _, _ in blocks), default=0)
    if levels > _MOST_LEVELS:
        raise CheckpointError(f"{path}: {levels} resolutions, at most {_MOST_LEVELS} are possible.")
    ch = side("encoder.conv_in.weight", 0)
    widths = [side(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) for level in range(levels)]
    if ch < 1 or any(width % ch for width in widths):
        raise CheckpointError(f"{path}: the widths {widths} are no multiples of {ch}.")
    attended = sorted({level for level, kind, _ in blocks if kind == "attn"})
    nominal = max(_NOMINAL_RESOLUTION, 1 << (levels - 1))
    return VQVAEConfig.from_dict(
        {
            "codebook_size": side("quantize.embedding.weight", 0, 2),
            "code_dim": side("quantize.embedding.weight", 1, 2),
            "z_channels": side("quant_conv.weight", 1),
            "ch": ch,
            "ch_mult": [width // ch for width in widths],
            "num_res_blocks": sum(level == 0 and kind == "res" for level, kind, _ in blocks),
            "attn_resolutions": [nominal >> level for level in attended],
            "resolution": nominal,
            "l2_normalized_codes": True,
            "input_range": input_range,
        }
    )
