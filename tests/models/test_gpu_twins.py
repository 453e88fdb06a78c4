"""The model's promises on a CUDA GPU, in bf16 and with flash-attn, as they are tested on a CPU.

The same tests run on the CPU, so that they are known to work before a GPU sees them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_flash_attn import install_fake_flash_attn
from torch import Tensor
from torch.nn import functional

from lgpt.engine.blocks import apply_block_settings
from lgpt.engine.start import multiplies_bf16
from lgpt.models.attention import CrossAttention, causal_attention
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.token_head import TokenHead
from lgpt.sampling.generate import GuidedDecoder, generate_tokens
from lgpt.settings.blocks import BlockSettings

CONFIG = LatentGPTConfig(64, 4, 4, 8, layers=3, hidden=64, heads=4, cond_drop=0.0)
# Device, precision, kernel of self-attention, and how far a result may be from the plain one.
PLACES = [
    pytest.param(("cpu", torch.float32, "sdpa", 1e-4), id="cpu-fp32"),
    pytest.param(("cpu", torch.bfloat16, "sdpa", 5e-2), id="cpu-bf16"),
    pytest.param(("cuda", torch.float32, "sdpa", 1e-4), id="cuda-fp32", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, "sdpa", 5e-2), id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, "flash", 5e-2), id="cuda-flash", marks=pytest.mark.gpu),
]
Place = tuple[str, torch.dtype, str, float]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    if request.param[2] == "flash":
        pytest.importorskip("flash_attn")
    if request.param[:2] == ("cpu", torch.bfloat16) and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this CPU emulates bf16 products, hundreds of times slower")
    place: Place = request.param
    return place


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def model_at(place: Place, **changes: Any) -> LatentGPT:
    device, dtype, kernel, _ = place
    torch.manual_seed(0)
    model = LatentGPT(dataclasses.replace(CONFIG, attention=kernel, **changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(device, dtype)


def batch_at(place: Place, images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype, _, _ = place
    torch.manual_seed(1)
    tokens, text = torch.randint(64, (images, 16)), torch.randn(images, 5, 8)
    null_text = torch.arange(images) == 1
    return tokens.to(device), text.to(device, dtype), null_text.to(device)


def decoded_logits(model: LatentGPT, tokens: Tensor, text: Tensor, null_text: Tensor) -> Tensor:
    """As one forward pass gives them, token by token."""
    state = model.start_decoding(text, null_text=null_text)
    found = [model.decode_next(None, state)]
    found += [model.decode_next(tokens[:, column], state) for column in range(15)]
    return torch.stack(found, dim=1).float()


def test_cached_decoding_gives_the_logits_of_the_full_forward_at_every_position(place: Place):
    model, (tokens, text, null_text) = model_at(place).eval(), batch_at(place)
    with torch.no_grad():
        expected = model(tokens, text, null_text=null_text)
    found = decoded_logits(model, tokens, text, null_text)
    torch.testing.assert_close(found, expected.float(), atol=place[3], rtol=place[3])


def test_guidance_is_the_two_forwards_it_stands_for(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The logits that greedy drawing takes, against those of whole forwards of both halves."""
    used, logits_of = [], GuidedDecoder.logits

    def noted_logits(*args: Any) -> Tensor:
        used.append(logits_of(*args))
        return used[-1]

    monkeypatch.setattr(GuidedDecoder, "logits", noted_logits)
    model, (_, text, _) = model_at(place).eval(), batch_at(place)
    drawn = generate_tokens(model, text, seeds=[0, 1, 2], top_k=1, guidance=3.0).flatten(1)
    found = torch.stack(used, dim=1)
    nobody = torch.zeros(3, dtype=torch.bool, device=text.device)
    halves, rounding = [], place[3]
    for null_text in (nobody, ~nobody):
        with torch.no_grad():
            halves.append(model(drawn, text, null_text=null_text).float())
        error = decoded_logits(model, drawn, text, null_text) - halves[-1]
        rounding = max(rounding, float(error.abs().max()))
    with_text, without = halves
    difference = with_text - without
    allowed = (3 + 2) * rounding  # 3 with_text - 2 without
    assert allowed < 0.5 * float(difference.abs().max()), "guidance 2.5 would pass as well"
    assert float((found - (without + 3.0 * difference)).abs().max()) <= allowed
    # The drawn token may be another one than argmax's only where both logits are equal.
    assert torch.equal(found.gather(2, drawn.unsqueeze(2)).squeeze(2), found.amax(dim=2))


def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(place: Place):
    device, dtype, _, tolerance = place
    torch.manual_seed(2)
    head = TokenHead(32, 512).to(device, dtype)
    head.weight.data.normal_(std=0.3)
    hidden = torch.randn(2, 40, 32, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(512, (2, 40), device=device)
    loss = head(hidden, targets)
    loss.backward()
    plain_hidden = hidden.detach().float().requires_grad_()
    plain_weight = head.weight.detach().float().requires_grad_()
    logits = plain_hidden @ plain_weight.t()
    plain = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    plain.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=tolerance)
    for found, expected in (
        (hidden.grad, plain_hidden.grad),
        (head.weight.grad, plain_weight.grad),
    ):
        scale = float(expected.abs().max())
        assert float((found.float() - expected).abs().max()) <= tolerance * scale


def plain_attention(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask: Tensor) -> Tensor:
    """The formula; `mask` is True where a query sees a key."""
    scores = torch.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK) / math.sqrt(q_BLNK.shape[3])
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return torch.einsum("bnls,bsnk->blnk", weights, v_BSNK)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_and_its_gradients_are_the_plain_formula(place: Place, kind: str):
    device, dtype, kernel, tolerance = place
    torch.manual_seed(3)
    keys = 48 if kind == "self" else 20
    q, upstream = torch.randn(2, 2, 48, 4, 64, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, keys, 4, 64, device=device, dtype=dtype)
    if kind == "self":
        mask = torch.ones(48, 48, dtype=torch.bool, device=device).tril()
    else:  # one sample sees a single key, the other 13
        places = torch.arange(keys, device=device).expand(2, 1, 1, keys)
        mask = places < torch.tensor([1, 13], device=device).view(2, 1, 1, 1)
    layer = CrossAttention(256, 256, 4, "rmsnorm", qk_norm=False).to(device, dtype)
    for matrix in (layer.q.weight, layer.out.weight):
        torch.nn.init.eye_(matrix)

    def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        if kind == "self":
            return causal_attention(q_BLNK, k_BSNK, v_BSNK, kernel)
        k_BNSK, v_BNSK = k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2)
        return layer(q_BLNK.flatten(2), k_BNSK, v_BNSK, mask).view_as(q_BLNK)

    given = [tensor.requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    attended, expected = attend(*given), plain_attention(*exact, mask)
    found = (attended, *torch.autograd.grad(attended, given, upstream))
    references = (expected, *torch.autograd.grad(expected, exact, upstream.double()))
    for mine, reference in zip(found, references):
        error = (mine.detach().double() - reference.detach()).abs().max()
        assert error <= tolerance / 2 * reference.detach().abs().max()


@pytest.mark.parametrize("checkpointing", ["full", "every_n", "selective"])
def test_checkpointing_changes_no_gradient(place: Place, checkpointing: str):
    tokens, text, null_text = batch_at(place)

    def gradients(settings: BlockSettings) -> list[Tensor]:
        model = model_at(place, dropout=0.2).train()
        apply_block_settings(model, settings)
        torch.manual_seed(4)
        model(tokens, text, targets=tokens, null_text=null_text).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(BlockSettings())
    found = gradients(BlockSettings(checkpointing=checkpointing))
    assert len(found) == len(expected) > 20
    for mine, reference in zip(found, expected):
        torch.testing.assert_close(mine, reference, atol=place[3] / 10, rtol=place[3])


def test_a_tiny_model_learns_eight_pictures_to_the_token(place: Place):
    model, (tokens, text, _) = model_at(place).train(), batch_at(place, images=8)
    nobody = torch.zeros(8, dtype=torch.bool, device=tokens.device)
    # As DeepSpeed does in bf16: steps are taken in float32, the model holds them rounded.
    masters = [parameter.detach().float().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=5e-3)
    for _ in range(600):
        loss = model(tokens, text, targets=tokens, null_text=nobody)
        loss.backward()
        if float(loss.detach()) < 0.003:
            break
        for master, parameter in zip(masters, model.parameters()):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for master, parameter in zip(masters, model.parameters()):
            parameter.data.copy_(master)
    drawn = generate_tokens(model.eval(), text, seeds=range(8), top_k=1, guidance=1.0)
    assert torch.equal(drawn.flatten(1), tokens)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("checkpointing", "runs_a_block"), [("none", 1), ("full", 2), ("selective", 1)]
)
def test_selective_checkpointing_does_not_run_flash_attention_again(
    device: str, checkpointing: str, runs_a_block: int, monkeypatch: pytest.MonkeyPatch
):
    if device == "cpu":
        place: Place = ("cpu", torch.float32, "auto", 0)
        install_fake_flash_attn(monkeypatch)
        monkeypatch.setattr("lgpt.models.latent_gpt.choose_kernel", lambda *_: "flash")
    else:
        place = ("cuda", torch.bfloat16, "flash", 0)
    kernels, runs = pytest.importorskip("flash_attn_2_cuda"), []
    forward = kernels.fwd

    def counted_forward(*args: Any) -> Any:
        runs.append(None)
        return forward(*args)

    monkeypatch.setattr(kernels, "fwd", counted_forward)
    model, (tokens, text, null_text) = model_at(place), batch_at(place)
    apply_block_settings(model, BlockSettings(checkpointing=checkpointing))
    model(tokens, text, targets=tokens, null_text=null_text).backward()
    assert len(runs) == runs_a_block * CONFIG.layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu-fp32", "cuda-bf16"]
)
def test_the_first_loss_of_the_full_size_model_is_ln_of_its_codes(device: str):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(16384, 16, 16, 512)).to(device, dtype).eval()
    assert model.num_parameters() > 500e6
    tokens = torch.randint(16384, (1, 256), device=device)
    text = torch.randn(1, 20, 512, device=device, dtype=dtype)
    with torch.no_grad():
        loss = float(model(tokens, text, targets=tokens))
    assert loss == pytest.approx(math.log(16384), rel=0.01)


@pytest.mark.gpu
def test_logits_of_4096_tokens_are_never_whole_in_float32_on_a_gpu():
    rows, codes = 2 * 4096, 16384
    head = TokenHead(64, codes).to("cuda", torch.bfloat16)
    hidden = torch.randn(2, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(hidden, torch.zeros(2, 4096, dtype=torch.long, device="cuda")).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * rows * codes / 2
