"""What loading a VQ-VAE found and did, for logs and for `lgpt vqvae inspect`."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LoadingReport:
    """One per load.

    Attributes:
        source: `pretrained_hf`, `pretrained_taming`, `pretrained_llamagen` or `custom`.
        weights: What was read, in words: the format and the file or folder.
        architecture_from: The config that told the architecture, or "the tensors".
        matched: Tensors of our model, every one of which the file had.
        renamed: How many of them have another name in the file.
        transposed: How many have their axes in another order there.
        reshaped: How many had an old shape there (GroupNorm as (1, 1, 1, C)).
        ignored: Why and how many tensors of the file were left out.
        parameters: Numbers in the matched tensors that decide tokens and pictures.
        codebook_size: Codes.
        code_dim: Width of a code.
        l2_normalized_codes: Codes and latents are used at unit length.
        downsample_factor: f, pixels a side of one token.
        input_range: Range of the pictures that the weights are fed with.
    """

    source: str
    weights: str
    architecture_from: str
    matched: int
    renamed: int
    transposed: int
    reshaped: int
    ignored: tuple[tuple[str, int], ...]
    parameters: int
    codebook_size: int
    code_dim: int
    l2_normalized_codes: bool
    downsample_factor: int
    input_range: str

    def lines(self) -> tuple[str, ...]:
        """One fact a line."""
        head = f"{self.weights} with {self.architecture_from}: all {self.matched} tensors matched"
        changes = [
            f"{count} {what}"
            for count, what in (
                (self.renamed, "renamed"),
                (self.transposed, "transposed"),
                (self.reshaped, "reshaped"),
            )
            if count
        ]
        changed = f" ({', '.join(changes)})" if changes else ""
        unit = " at unit length" if self.l2_normalized_codes else ""
        return (
            head + changed,
            *(f"left out {count} tensors of {why}" for why, count in self.ignored),
            f"{self.parameters:,} parameters; {self.codebook_size} codes of width {self.code_dim}"
            f"{unit}, f={self.downsample_factor}, pictures in {self.input_range}",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `ignored` as {reason: count}."""
        return {**dataclasses.asdict(self), "ignored": dict(self.ignored)}
