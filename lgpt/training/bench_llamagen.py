"""LlamaGen's VQ-VAE recipe as one plain PyTorch loop: what `lgpt bench vqvae` compares ours with.

Nothing of lgpt is in it but the encoder and the decoder, so that both train the same architecture.
Source: LlamaGen ce98ec41, tokenizer/tokenizer_image/vq_train.py and vq_model.py. Its LPIPS needs
VGG weights and its discriminator begins at step 20,000: neither is part of this loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lgpt.models.vqvae_blocks import Decoder, Encoder
from lgpt.models.vqvae_config import VQVAEConfig

CODE_DIM = 8
LEARNING_RATE = 1e-4
_BETAS = (0.9, 0.95)
_BETA = 0.25
_CLIPPING = 1.0


class Reconstructed(NamedTuple):
    """Pictures as they come back, their tokens, and codebook plus weighted commitment loss."""

    pictures: Float[Tensor, "b 3 H W"]
    tokens: Int[Tensor, "b h w"]
    code_loss: Float[Tensor, ""]


class LlamagenVQ(nn.Module):
    """Encoder, 8-wide codes of unit length that learn by gradients, decoder.

    Args:
        config: Widths and levels of encoder and decoder, and the number of codes.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, CODE_DIM, 1)
        self.post_quant_conv = nn.Conv2d(CODE_DIM, config.z_channels, 1)
        codes = config.codebook_size
        self.embedding = nn.Embedding(codes, CODE_DIM)
        self.embedding.weight.data.uniform_(-1.0 / codes, 1.0 / codes)
        self.embedding.weight.data = functional.normalize(self.embedding.weight.data, dim=-1)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Reconstructed:
        """Through the codes and back, with a straight-through gradient."""
        latents = self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)
        latents = functional.normalize(latents, dim=-1)
        codebook = functional.normalize(self.embedding.weight, dim=-1)
        tokens = (latents.detach() @ codebook.detach().t()).argmax(-1)
        codes = functional.normalize(self.embedding(tokens), dim=-1)
        code_loss = (codes - latents.detach()).square().mean()
        code_loss = code_loss + _BETA * (codes.detach() - latents).square().mean()
        through = latents + (codes - latents).detach()
        pictures = self.decoder(self.post_quant_conv(through.permute(0, 3, 1, 2)))
        return Reconstructed(pictures, tokens, code_loss)


class LlamagenLoop:
    """Adam (0.9, 0.95) at 1e-4 from the first step to the last, L2 loss, gradients clipped at 1."""

    def __init__(self, config: VQVAEConfig, device: torch.device) -> None:
        self.model = LlamagenVQ(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, betas=_BETAS)

    def step(self, images: Float[Tensor, "b 3 H W"]) -> Reconstructed:
        """One optimizer step in float32 on pictures in [-1, 1]."""
        self.model.train()
        output = self.model(images)
        loss = functional.mse_loss(output.pictures, images) + output.code_loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIPPING)
        self.optimizer.step()
        return output
