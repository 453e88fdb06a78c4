"""What `lgpt bench train` compares with: two systems' training steps in plain PyTorch.

Both train float32 weights with a fused AdamW and clipping at 1.0, as their users run them: under
bf16 autocast, or without it beside a run in fp32. Their feed-forward width is set so that they have
as many parameters as LatentGPT.

Shapes: B batch, L image tokens, C caption tokens, S = C + L, D width, N heads, K head width.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from lgpt.core.errors import SettingsError
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.sampling.bench_peers import RmsNorm, turned_pairs

_CAPTION_TOKENS, _CAPTION_WIDTH = 120, 2048  # Flan-T5-XL's, padded to 120
_DROPOUT = 0.1

PEERS = ("llamagen", "gpt2")


class _LlamaGenBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = RmsNorm(width), RmsNorm(width)
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x_BSD: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x_BSD.shape
        qkv = self.wqkv(self.attention_norm(x_BSD)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.unbind(dim=2)
        q, k = (turned_pairs(part, rotation).transpose(1, 2) for part in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        merged = attended.transpose(1, 2).reshape(batch, length, width)
        x_BSD = x_BSD + functional.dropout(self.wo(merged), _DROPOUT, self.training)
        normed = self.ffn_norm(x_BSD)
        out = self.w2(functional.silu(self.w1(normed)) * self.w3(normed))
        return x_BSD + functional.dropout(out, _DROPOUT, self.training)


class LlamaGenTextToImage(nn.Module):
    """LlamaGen's `Transformer` with model_type t2i: 120 caption tokens in front of the picture.

    A transcription (REFERENCE: FoundationVision/LlamaGen, autoregressive/models/gpt.py): RMSNorm,
    SwiGLU, rotary positions whose caption rows are zero, a dense mask, logits in float32.
    """

    def __init__(self, config: LatentGPTConfig, inner: int) -> None:
        super().__init__()
        width = config.hidden
        self.tok_embeddings = nn.Embedding(config.codebook_size, width)
        self.caption_in = nn.Linear(_CAPTION_WIDTH, width, bias=False)
        self.caption_out = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(
            _LlamaGenBlock(width, config.heads, inner) for _ in range(config.layers)
        )
        self.norm = RmsNorm(width)
        self.output = nn.Linear(width, config.codebook_size, bias=False)
        total = _CAPTION_TOKENS + config.num_tokens
        rotation = torch.zeros(total, config.head_width // 2, 2)
        angles = torch.rand(config.num_tokens, config.head_width // 2)  # any: only time is measured
        rotation[_CAPTION_TOKENS:] = torch.stack([angles.cos(), angles.sin()], dim=-1)
        self.register_buffer("rotation", rotation)
        self.register_buffer("mask", torch.ones(total, total, dtype=torch.bool).tril())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens_BL: Tensor, caption: Tensor, caption_mask: Tensor) -> Tensor:
        front = self.caption_out(functional.gelu(self.caption_in(caption), approximate="tanh"))
        x_BSD = torch.cat([front, self.tok_embeddings(tokens_BL[:, :-1])], dim=1)
        x_BSD = functional.dropout(x_BSD, _DROPOUT, self.training)
        length = x_BSD.shape[1]
        seen = self.mask[None, :length, :length].repeat(len(tokens_BL), 1, 1)
        seen[:, :, :_CAPTION_TOKENS] &= caption_mask[:, None]
        seen |= torch.eye(length, dtype=torch.bool, device=seen.device)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.rotation[:length], seen[:, None])
        logits = self.output(self.norm(x_BSD)).float()
        logits = logits[:, _CAPTION_TOKENS - 1 :].contiguous()
        return functional.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten())


class Gpt2WithCrossAttention(nn.Module):
    """transformers' GPT2 that reads the text through its own cross-attention.

    Without dropout of attention's weights, which neither of the others has: on a CPU PyTorch's
    fused kernel knows none, and with it a step took 1.3 to 1.8 times as long.
    """

    def __init__(self, config: LatentGPTConfig, inner: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.text_in = nn.Linear(config.text_width or config.hidden, config.hidden)
        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.codebook_size,
                n_positions=config.num_tokens,
                n_embd=config.hidden,
                n_layer=config.layers,
                n_head=config.heads,
                n_inner=inner,
                add_cross_attention=True,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def forward(self, tokens_BL: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        out = self.gpt2(
            tokens_BL,
            labels=tokens_BL,
            encoder_hidden_states=self.text_in(text),
            encoder_attention_mask=text_mask.long(),
        )
        loss: Tensor = out.loss
        return loss


def build_peer(name: str, config: LatentGPTConfig, parameters: int) -> nn.Module:
    """A peer with `parameters` weights within 3%, by the width of its feed-forward layers.

    Raises:
        SettingsError: The model is so small that the peer's other layers alone have more.
    """
    kind: Callable[[LatentGPTConfig, int], nn.Module] = {
        "llamagen": LlamaGenTextToImage,
        "gpt2": Gpt2WithCrossAttention,
    }[name]
    multiple = 64 if config.hidden >= 512 else 4
    with torch.device("meta"):
        small, large = (count_parameters(kind(config, n * multiple)) for n in (1, 2))
    count = max(1, round(1 + (parameters - small) / (large - small)))
    if abs(small + (count - 1) * (large - small) - parameters) > 0.03 * parameters:
        raise SettingsError(
            f"{name} cannot have {parameters:,} parameters at transformer.hidden {config.hidden} "
            f"(at least {small:,}); compare a larger model, or leave out --peers."
        )
    return kind(config, multiple * count)


def count_parameters(model: nn.Module) -> int:
    """Weights that are trained; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class PeerStep:
    """One training step of a peer; `parts` are its forward, backward and optimizer."""

    def __init__(
        self,
        name: str,
        config: LatentGPTConfig,
        parameters: int,
        device: torch.device,
        precision: str = "bf16",
    ) -> None:
        self._is_bf16 = precision == "bf16"
        self.model = build_peer(name, config, parameters).to(device).train()
        self.device, self._name = device, name
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )

    def text(self, batch: int, words: int, width: Optional[int]) -> tuple[Tensor, Tensor]:
        """What stands for the same caption of `words` words."""
        if self._name == "llamagen":
            mask = torch.arange(_CAPTION_TOKENS) >= _CAPTION_TOKENS - words  # padded on the left
            return (
                torch.randn(batch, _CAPTION_TOKENS, _CAPTION_WIDTH, device=self.device),
                mask.expand(batch, -1).to(self.device),
            )
        shape = (batch, words, width or self.model.gpt2.config.n_embd)
        mask = torch.ones(batch, words, dtype=torch.bool, device=self.device)
        return torch.randn(shape, device=self.device), mask

    def forward(self, tokens: Tensor, text: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16):
            loss: Tensor = self.model(tokens, *text)
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
