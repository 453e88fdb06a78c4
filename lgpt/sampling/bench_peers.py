"""Two other samplers at about the same size, for `lgpt bench sample`.

LlamaGen's text-to-image sampler, transcribed into plain PyTorch from its design (sun2024
autoregressive/models/gpt.py and generate.py at ce98ec4, https://arxiv.org/abs/2406.06525): a prefix
of 120 text tokens, a static cache over the whole length read through a dense mask by SDPA's plain
kernel, rotary positions in float32, logits in float32, guidance as two halves of a batch.
And transformers' GPT2 with cross-attention, drawn by its own `generate` with its own cache.

Shapes: B rows, L tokens, S cache positions, D width, N heads, K head width, V codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lgpt.engine.clock import seconds_when_done
from lgpt.models.latent_gpt import LatentGPTConfig

PREFIX = 120
# Of the feed-forward's inner width. LlamaGen's 256 steps over sizes that are to be met within 3%.
_MULTIPLE = 64


def closest_width(parameters: int, count: Callable[[int], int], step: int) -> int:
    """The multiple of `step` whose model, `count(width)`, has the nearest number of parameters."""
    width = step
    while count(width + step) <= parameters:
        width += step
    return min((width, width + step), key=lambda w: abs(count(w) - parameters))


def llamagen_parameters(config: LatentGPTConfig, width: int, multiple: int = _MULTIPLE) -> int:
    """Of the transcription at a width, without its norms; LlamaGen's own multiple is 256."""
    layer = 4 * width * width + 3 * width * _llamagen_inner(width, multiple)
    caption = (config.text_width or config.hidden) * width + width * width
    return config.layers * layer + 2 * config.codebook_size * width + caption


def gpt2_parameters(config: LatentGPTConfig, width: int) -> int:
    """Of GPT2 with cross-attention at a width, without norms and biases; its head is tied."""
    layers = config.layers * 16 * width * width
    return layers + (config.codebook_size + config.num_tokens + 2) * width


class RmsNorm(nn.Module):
    """LlamaGen's own: in float32, cast back, times the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scaled = x32 * torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + 1e-5)
        return scaled.type_as(x) * self.weight


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = _llamagen_inner(width)
        self.attention_norm, self.ffn_norm = RmsNorm(width), RmsNorm(width)
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(self, x: Tensor, turns: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        h = self.attention_norm(x)
        batch, length, width = h.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1) for part in self.wqkv(h).split(width, dim=-1)
        )
        q, k, v = (t.transpose(1, 2) for t in (turned_pairs(q, turns), turned_pairs(k, turns), v))
        self.k_cache[:, :, places], self.v_cache[:, :, places] = k, v
        attended = functional.scaled_dot_product_attention(
            q, self.k_cache, self.v_cache, attn_mask=mask
        )
        x = x + self.wo(attended.transpose(1, 2).contiguous().view(batch, length, width))
        h = self.ffn_norm(x)
        return x + self.w2(functional.silu(self.w1(h)) * self.w3(h))


def _llamagen_inner(width: int, multiple: int = _MULTIPLE) -> int:
    """Two thirds of 4 D, up to a multiple."""
    return -(-int(8 * width / 3) // multiple) * multiple


def turned_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions of neighbouring pairs of x [B, S, N, K], in float32; turns [S, K/2, 2]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = turns[None, :, None, :, 0], turns[None, :, None, :, 1]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(3).type_as(x)


class LlamaGenSampler(nn.Module):
    """The transcription; random weights.

    Args:
        config: Of our model: its codes, grid, layers and heads are taken.
        parameters: Of our model; the width is chosen to match.
        device: Where it is built, in bf16.
    """

    def __init__(
        self, config: LatentGPTConfig, parameters: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        text_width = config.text_width or config.hidden
        count = functools.partial(llamagen_parameters, config)
        width = closest_width(parameters, count, 4 * config.heads)
        self.config, self.heads, self.width = config, config.heads, width
        self.caption_in = nn.Linear(text_width, width, bias=False)
        self.caption_out = nn.Linear(width, width, bias=False)
        self.tok_embeddings = nn.Embedding(config.codebook_size, width)
        self.layers = nn.ModuleList(_Layer(width, config.heads) for _ in range(config.layers))
        self.norm = RmsNorm(width)
        self.output = nn.Linear(width, config.codebook_size, bias=False)
        self.parameters_count = sum(p.numel() for p in self.parameters())
        self.to(device, dtype)
        # Turns of the prefix and the grid; whatever they are, they cost the same.
        places = PREFIX + config.num_tokens
        angles = torch.rand(places, width // config.heads // 2, device=device)
        self.turns = torch.stack([angles.cos(), angles.sin()], dim=-1)

    @torch.no_grad()
    def draw(
        self,
        text: Tensor,
        given: Tensor,
        *,
        guidance: float,
        temperature: float,
        top_k: int,
    ) -> list[float]:
        """Draw the tokens after the given ones; the moment at which each was there.

        Args:
            text: Text embeddings [B, T, .]; padded in front to 120.
            given: [B, n].
        """
        batch, device = len(text), text.device
        rows, length = 2 * batch, PREFIX + self.config.num_tokens
        dtype = self.output.weight.dtype
        shape = (rows, self.heads, length, self.width // self.heads)
        for layer in self.layers:
            layer.k_cache = torch.zeros(shape, device=device, dtype=dtype)
            layer.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool, device=device))
        causal = causal.unsqueeze(0).repeat(rows, 1, 1)
        causal[:, :, : PREFIX - text.shape[1]] = False
        causal |= torch.eye(length, dtype=torch.bool, device=device)
        padded = functional.pad(text.to(dtype), (0, 0, PREFIX - text.shape[1], 0))
        caption = self.caption_out(
            functional.gelu(self.caption_in(torch.cat([padded, padded])), approximate="tanh")
        )
        x = torch.cat([caption, self.tok_embeddings(given.repeat(2, 1))], dim=1)
        places = torch.arange(x.shape[1], device=device)
        stamps = []
        for _ in range(self.config.num_tokens - given.shape[1]):
            token = self._next(x, places, causal, guidance, temperature, top_k)
            stamps.append(seconds_when_done(device))
            x = self.tok_embeddings(torch.cat([token, token]))
            places = places[-1:] + 1
        return stamps

    def _next(
        self,
        x: Tensor,
        places: Tensor,
        causal: Tensor,
        guidance: float,
        temperature: float,
        top_k: int,
    ) -> Tensor:
        mask = causal[:, None, places]
        with sdpa_kernel(SDPBackend.MATH):
            for layer in self.layers:
                x = layer(x, self.turns[places], places, mask)
        logits = self.output(self.norm(x)).float()[:, -1]
        with_text, without = logits.chunk(2)
        logits = without + (with_text - without) * guidance
        return _sample(logits, temperature, top_k)


def _sample(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    logits = logits / temperature
    if top_k:
        least = torch.topk(logits, min(top_k, logits.shape[-1]))[0][..., -1, None]
        logits[logits < least] = -float("inf")
    return torch.multinomial(functional.softmax(logits, dim=-1), num_samples=1)


class Gpt2Sampler:
    """transformers' GPT2 with cross-attention and its `generate`; random weights.

    Args: As `LlamaGenSampler`.
    """

    def __init__(
        self, config: LatentGPTConfig, parameters: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        codes = config.codebook_size
        count = functools.partial(gpt2_parameters, config)
        self.width = closest_width(parameters, count, config.heads)
        self.codes, self.tokens = codes, config.num_tokens
        description = GPT2Config(
            vocab_size=codes + 1,  # and the start token
            n_positions=config.num_tokens + 1,
            n_embd=self.width,
            n_layer=config.layers,
            n_head=config.heads,
            add_cross_attention=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(description).to(device, dtype).eval()
        self.parameters_count = self.model.num_parameters()

    @torch.no_grad()
    def draw(
        self,
        text: Tensor,
        given: Tensor,
        *,
        guidance: float,
        temperature: float,
        top_k: int,
    ) -> list[float]:
        """As `LlamaGenSampler.draw`."""
        from transformers import LogitsProcessorList

        batch, words = text.shape[:2]
        device, dtype = text.device, self.model.dtype
        read = torch.randn(2 * batch, words, self.width, device=device, dtype=dtype)
        starts = torch.full((2 * batch, 1), self.codes, device=device)
        guide = _Guide(guidance, temperature, top_k)
        ids = torch.cat([starts, given.repeat(2, 1)], dim=1)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=read,
            max_new_tokens=self.tokens - given.shape[1],
            do_sample=False,
            use_cache=True,
            pad_token_id=self.codes,
            logits_processor=LogitsProcessorList([guide]),
        )
        return guide.stamps


class _Guide:
    """Guidance and the draw as a logits processor: both halves of the batch get the same token."""

    def __init__(self, guidance: float, temperature: float, top_k: int) -> None:
        self.guidance, self.temperature, self.top_k = guidance, temperature, top_k
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with_text, without = scores.float()[:, :-1].chunk(2)
        logits = without + (with_text - without) * self.guidance
        token = _sample(logits, self.temperature, self.top_k)
        chosen = torch.full_like(scores, -float("inf")).scatter_(1, token.repeat(2, 1), 0.0)
        self.stamps.append(seconds_when_done(scores.device))
        return chosen
