"""Which parameters AdamW decays."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lgpt.engine.build import parameter_groups
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
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


@pytest.mark.parametrize("is_in_parts", [False, True], ids=["whole", "in-parts-as-under-zero3"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_of_the_transformer_only_the_products_matrices_are_decayed(norm, is_in_parts):
    shape = {"layers": 2, "hidden": 16, "heads": 2, "positions": "learned", "norm": norm}
    model = LatentGPT(LatentGPTConfig(8, 2, 2, text_width=8, **shape))
    matrices = ["self_attention.qkv", "self_attention.out", "mlp.up", "mlp.down"]
    matrices += ["cross_attention.q", "cross_attention.kv", "cross_attention.out"]
    norms = ["self_norm", "cross_norm", "mlp_norm"]
    norms += [f"{kind}_attention.{of}_norm" for kind in ("self", "cross") for of in "qk"]
    embeddings = ["token_embedding", "start_embedding", "null_embedding", "position_embedding"]
    all_norms = ["text_norm", "final_norm"]
    all_norms += [f"blocks.{block}.{name}" for block in range(2) for name in norms]
    spared_names = {f"{name}.weight" for name in embeddings + all_norms}
    if norm == "layernorm":
        spared_names |= {f"{name}.bias" for name in all_norms}
    decayed_names = {f"blocks.{block}.{name}.weight" for block in range(2) for name in matrices}
    decayed_names.add("head.weight")
    if is_in_parts:
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape
            parameter.data = torch.empty(0)
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == decayed_names
    assert {names[id(parameter)] for parameter in spared["params"]} == spared_names
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    worker = Path(__file__).with_name("one_rank_worker.py")
    command = [sys.executable, str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_rank_alone_shares_no_gradients_and_computes_the_same(one_rank):
    results = one_rank["scattering"]
    assert set(results) == {"fp32 1", "fp32 2", "bf16 2"}
    for seen in results.values():
        assert seen["shares"] == [[False, False], [True, True]]
        assert len(seen["equal"]) > 20
        assert all(seen["equal"])
        assert len(set(seen["norms"])) == 3
        assert min(seen["norms"]) > 0.1  # they are clipped


def test_gradients_that_stay_in_memory_are_those_of_this_step_alone(one_rank):
    alone, among_others = one_rank["in_turn"]
    assert alone["places"] == 1
    assert [math.isinf(norm) for norm in alone["norms"]] == [False] * 3 + [True] + [False] * 2
    assert alone["norms"] == among_others["norms"]
    assert alone["weights"] == among_others["weights"]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_only_a_broken_step_is_skipped_with_the_optimizer_on_the_cpu(one_rank, stage):
    seen = one_rank["broken"][stage]
    assert seen["skipped"] == [False, True, False, False]
    first, _, second, third = seen["losses"]
    assert third < second < first
