"""Which parameters AdamW decays."""

from __future__ import annotations

from lgpt.engine.build import parameter_groups
from lgpt.models.vqvae import VQVAE, VQVAEConfig


def test_kernels_are_decayed_and_codes_norms_and_biases_are_not():
    model = VQVAE(
        VQVAEConfig(
            codebook_size=8,
            code_dim=4,
            z_channels=32,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            resolution=16,
            codebook_update="gradient",
        )
    )
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared_names = [names[id(parameter)] for parameter in spared["params"]]
    assert "quantize.embedding.weight" in spared_names
    others = [name for name in spared_names if name != "quantize.embedding.weight"]
    assert all("norm" in name or name.endswith("bias") for name in others)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
