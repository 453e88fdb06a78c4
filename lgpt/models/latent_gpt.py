"""LatentGPT: a causal transformer that writes VQ tokens in raster order and reads text.

Shapes: B batch, L image tokens, T text tokens, D width, V codes.
Logits at position i predict token i from the start token and tokens < i.
Every parameter is reached through the forward of the module that owns it, so that ZeRO-3 finds it
both in training and in decoding.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, ClassVar, Optional, Union

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lgpt.core.errors import SettingsError
from lgpt.models.attention import (
    ResidualLinear,
    Rope2d,
    build_norm,
    choose_kernel,
    product_dtype,
)
from lgpt.models.block import Block
from lgpt.models.dropout import Dropout
from lgpt.models.kv_cache import BlockCache, DecodingState, ImageCache
from lgpt.models.model_folder import (
    check_fields,
    read_model_config,
    read_weights,
    write_model_config,
    write_model_folder,
)
from lgpt.models.strict_loading import load_strictly
from lgpt.models.token_head import TokenHead
from lgpt.settings.transformer import TransformerSettings

_MODEL_TYPE = "lgpt_latent_gpt"


@dataclasses.dataclass(frozen=True)
class LatentGPTConfig:
    """The model's shape; names as in `TransformerSettings`, plus what the data decide.

    Attributes:
        codebook_size: V.
        grid_height: Rows of the token grid.
        grid_width: Columns.
        text_width: Width of the text embeddings; None for an unconditional model.
    """

    codebook_size: int
    grid_height: int
    grid_width: int
    text_width: Optional[int] = None
    layers: int = 24
    hidden: int = 1024
    heads: int = 16
    mlp: str = "swiglu"
    mlp_hidden: Optional[int] = None
    norm: str = "rmsnorm"
    positions: str = "rope2d"
    qk_norm: bool = True
    dropout: float = 0.0
    pkeep: float = 1.0
    zero_head: bool = False
    cond_drop: float = 0.1
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise SettingsError(
                f"transformer.hidden ({self.hidden}) must be a multiple of transformer.heads "
                f"({self.heads})."
            )
        if self.positions == "rope2d" and self.head_width % 4:
            raise SettingsError(
                f"transformer.positions 'rope2d' needs a head width that 4 divides; hidden / heads "
                f"= {self.hidden} / {self.heads} = {self.head_width}."
            )

    @classmethod
    def from_settings(
        cls,
        settings: TransformerSettings,
        codebook_size: int,
        grid: tuple[int, int],
        text_width: Optional[int],
    ) -> LatentGPTConfig:
        """The model that a run config describes, for a given VQ-VAE and text encoder."""
        return cls(codebook_size, grid[0], grid[1], text_width, **settings.model_dump())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentGPTConfig:
        """Back from `to_dict`; CheckpointError for unknown or missing fields."""
        required = ("codebook_size", "grid_height", "grid_width")
        check_fields(cls, values, required, "LatentGPT")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture."""
        return self.grid_height * self.grid_width

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


def _plain_call(index: int, block: nn.Module, *args: Any) -> Any:
    return block(*args)


class LatentGPT(nn.Module):
    """The transformer.

    Text enters through cross-attention. The learned null embedding stands as text token 0 of every
    sample, seen by the samples without text and by nobody else; their captions are not seen. An
    unconditional model sees the null embedding only.

    Args:
        config: The model's shape.
    """

    zero3_leaf_modules: ClassVar[tuple[type[nn.Module], ...]] = (Block,)

    def __init__(self, config: LatentGPTConfig) -> None:
        super().__init__()
        self.config = config
        # (index, block, arguments) -> output; engine/blocks.py puts checkpointing here.
        self.call_block: Callable[..., Any] = _plain_call
        # ([B, L, N, K], like, dtype, kernel) -> a block's cache; cpu_block.py has its own kind.
        self.empty_cache: Callable[..., Any] = ImageCache.empty
        text_width = config.text_width or config.hidden
        self.token_embedding = nn.Embedding(config.codebook_size, config.hidden)
        self.start_embedding = nn.Embedding(1, config.hidden)
        self.null_embedding = nn.Embedding(1, text_width)
        self.text_norm = build_norm(config.norm, text_width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.num_tokens, config.hidden)
        else:
            self.rope = Rope2d(config.grid_height, config.grid_width, config.head_width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = build_norm(config.norm, config.hidden)
        self.head = TokenHead(config.hidden, config.codebook_size)
        if not self.head.weight.is_meta:  # engine/first_weights.py does it later otherwise
            self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        """First values of the parameters that one of the model's modules owns itself.

        N(0, 0.02); what is added to the residual stream smaller, as GPT-2; the head so that logits
        have a variance of 1/16, which leaves the first loss within 1% of ln V, or 0; norms 1.
        """
        if isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.layers))
        elif isinstance(module, TokenHead) and not self.config.zero_head:
            nn.init.normal_(module.weight, std=0.25 / math.sqrt(self.config.hidden))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        elif any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        text: Optional[Float[Tensor, "batch words text_width"]] = None,
        text_mask: Optional[Bool[Tensor, "batch words"]] = None,
        *,
        targets: Optional[Int[Tensor, "batch length"]] = None,
        null_text: Optional[Bool[Tensor, " batch"]] = None,
        positions: Optional[Int[Tensor, " wanted"]] = None,
    ) -> Union[Float[Tensor, "batch wanted codes"], Float[Tensor, ""]]:
        """Logits [B, L, V] of every token, or with targets the mean cross-entropy in nats.

        Args:
            tokens: Picture tokens in raster order; the start token is put in front here.
            text: Text embeddings; None reads the null embedding.
            text_mask: True where a text position holds a word; None counts every position.
            targets: What each position should predict, usually `tokens` itself.
            null_text: Samples that read the null embedding instead of their text. None draws them
                with probability `cond_drop` in training mode and means nobody otherwise.
            positions: Without targets, those whose logits are wanted; None wants all.
        """
        batch = tokens.shape[0]
        if null_text is None and self.training and text is not None:
            null_text = torch.rand(batch, device=tokens.device) < self.config.cond_drop
        starts = torch.zeros(batch, 1, dtype=torch.long, device=tokens.device)
        seen = self._corrupted(tokens[:, :-1])
        embedded = [self.start_embedding(starts), self.token_embedding(seen)]
        x_BLD, rotation = self._with_positions(torch.cat(embedded, dim=1), 0)
        x_BLD = self.dropout(x_BLD)
        context, context_mask = self._context(batch, text, text_mask, null_text, x_BLD)
        kernel = self._kernel(x_BLD)
        for index, block in enumerate(self.blocks):
            x_BLD = self.call_block(index, block, x_BLD, rotation, context, context_mask, kernel)
        if positions is not None:
            x_BLD = x_BLD[:, positions]
        return self.head(self.final_norm(x_BLD), targets)

    def _corrupted(self, tokens: Tensor) -> Tensor:
        """In training a share 1 - pkeep of the input tokens becomes random codes.

        Source: Esser et al. 2021 (taming-transformers, `pkeep`), https://arxiv.org/abs/2012.09841.
        """
        if not self.training or self.config.pkeep == 1:
            return tokens
        is_kept = torch.rand(tokens.shape, device=tokens.device) < self.config.pkeep
        codes = torch.randint_like(tokens, self.config.codebook_size)
        return torch.where(is_kept, tokens, codes)

    @torch.no_grad()
    def start_decoding(
        self,
        text: Optional[Float[Tensor, "batch words text_width"]] = None,
        text_mask: Optional[Bool[Tensor, "batch words"]] = None,
        null_text: Optional[Bool[Tensor, " batch"]] = None,
        max_batch: Optional[int] = None,
    ) -> DecodingState:
        """Lay out the caches of a batch of pictures.

        Args:
            text: Text embeddings, one row a picture; None reads the null embedding.
            text_mask: As in `forward`.
            null_text: As in `forward`.
            max_batch: Number of pictures, needed when there is no text.
        """
        batch = max_batch if text is None else text.shape[0]
        assert batch is not None, "start_decoding needs text or max_batch"
        device = self.start_embedding.weight.device
        start = self.start_embedding(torch.zeros(batch, 1, dtype=torch.long, device=device))
        context, context_mask = self._context(batch, text, text_mask, null_text, start)
        shape = (batch, self.config.num_tokens, self.config.heads, self.config.head_width)
        dtype = product_dtype(start)
        if context_mask is not None:
            # As numbers that are added to the scores: SDPA makes them of a mask at every call.
            unseen = torch.zeros(context_mask.shape, dtype=dtype, device=device)
            context_mask = unseen.masked_fill_(~context_mask, float("-inf"))
        return DecodingState(
            blocks=[
                BlockCache(self.empty_cache(shape, start, dtype, self._kernel(start)))
                for _ in self.blocks
            ],
            text=context,
            text_mask=context_mask,
        )

    @torch.no_grad()
    def decode_next(
        self, tokens: Optional[Int[Tensor, " batch"]], state: DecodingState
    ) -> Float[Tensor, "batch codes"]:
        """Read one token a picture (None: the start token) and give the next token's logits."""
        assert (tokens is None) == (state.position == 0), "the start token comes first, and once"
        if tokens is None:
            batch, device = state.text.shape[0], state.text.device
            x_B1D = self.start_embedding(torch.zeros(batch, 1, dtype=torch.long, device=device))
        else:
            x_B1D = self.token_embedding(tokens.unsqueeze(1))
        return self._read(x_B1D, state)

    @torch.no_grad()
    def read_given(
        self, tokens: Int[Tensor, "batch given"], state: DecodingState
    ) -> Float[Tensor, "batch codes"]:
        """Read the start token and all of these tokens at once, first thing; the next one's logits.

        What `decode_next` gives after reading them one by one.
        """
        assert state.position == 0, "given tokens come first"
        starts = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        x_BLD = torch.cat([self.start_embedding(starts), self.token_embedding(tokens)], dim=1)
        return self._read(x_BLD, state)

    def _read(self, x_BLD: Tensor, state: DecodingState) -> Tensor:
        x_BLD, rotation = self._with_positions(x_BLD, state.position)
        kernel = self._kernel(x_BLD)
        for block, cache in zip(self.blocks, state.blocks):
            x_BLD = block(
                x_BLD, rotation, state.text, state.text_mask, kernel, cache, state.position
            )
        state.position += x_BLD.shape[1]
        return self.head(self.final_norm(x_BLD[:, -1:]))[:, 0]

    def _with_positions(
        self, x_BLD: Tensor, start: int
    ) -> tuple[Tensor, Optional[tuple[Tensor, Tensor]]]:
        length = x_BLD.shape[1]
        assert start + length <= self.config.num_tokens, (start, length, self.config.num_tokens)
        if self.config.positions == "rope2d":
            return x_BLD, self.rope(start, length, x_BLD.dtype)
        places = torch.arange(start, start + length, device=x_BLD.device)
        return x_BLD + self.position_embedding(places), None

    def _context(
        self,
        batch: int,
        text: Optional[Tensor],
        text_mask: Optional[Tensor],
        null_text: Optional[Tensor],
        like: Tensor,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Null embedding and text behind it [B, 1+T, .], and who sees what [B, 1, 1, 1+T]."""
        null = self.null_embedding(torch.zeros(batch, 1, dtype=torch.long, device=like.device))
        if text is None:
            return self.text_norm(null), None
        if text.shape[2] != self.config.text_width:
            raise ValueError(
                f"text embeddings have width {text.shape[2]}, this model was built for "
                f"{self.config.text_width or 'no text at all (unconditional)'}."
            )
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        is_null = ~text_mask.any(dim=1)  # a caption without a word has nothing else to look at
        if null_text is not None:
            is_null = is_null | null_text
        mask = torch.cat([is_null[:, None], text_mask & ~is_null[:, None]], dim=1)
        context = torch.cat([null, text.to(null.dtype)], dim=1)
        return self.text_norm(context), mask[:, None, None, :]

    def _kernel(self, x: Tensor) -> str:
        return choose_kernel(self.config.attention, x.device.type, x.dtype, self.config.head_width)

    def num_parameters(self) -> int:
        """Number of trained numbers (also where ZeRO-3 holds only a part of each tensor)."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters())

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write `config.json` and `model.safetensors`."""
        write_model_folder(folder, self, _MODEL_TYPE, self.config.to_dict())

    def save_config(self, folder: Path) -> None:
        """Write `config.json` alone: the weights come from elsewhere."""
        write_model_config(folder, _MODEL_TYPE, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, folder: Union[str, Path]) -> LatentGPT:
        """Read a model folder: float32, eval mode, on the CPU.

        The attention kernel is chosen anew for this machine (`auto`), whatever training used.

        Raises:
            CheckpointError: The folder is no LatentGPT, or keys or shapes differ from its config.
        """
        values = read_model_config(
            folder,
            _MODEL_TYPE,
            kind="a LatentGPT",
            folder_kind="a model folder",
            maker="A model folder is what `lgpt convert RUN FOLDER` writes.",
        )
        model = cls(LatentGPTConfig.from_dict({**values, "attention": "auto"}))
        load_strictly(model, *read_weights(folder))
        return model.eval()
