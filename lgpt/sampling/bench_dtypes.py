"""`lgpt bench dtypes`: what a model folder's weights in bf16 and 8 bits gain, and what they change.

Every prompt's picture is drawn greedily, the likeliest token each time, so that nothing but the
weights can tell two pictures apart. One changed token changes what all later ones see; so it is
also counted how many tokens differ where both have read the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from jaxtyping import Int
from PIL import Image
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.transforms import to_pil
from lgpt.engine.clock import seconds_when_done
from lgpt.models.latent_gpt import LatentGPT
from lgpt.sampling.draw_to_file import check_png
from lgpt.sampling.generate import GuidedDecoder, generate_tokens
from lgpt.sampling.logits import guidance_at
from lgpt.sampling.picture_grid import picture_grid
from lgpt.sampling.pipeline import TextToImagePipeline

_logger = get_logger(__name__)

# Embeddings [1, T, D] and mask [1, T] of a prompt.
Text = tuple[Optional[Tensor], Optional[Tensor]]

REFERENCE = "fp32"
_OTHERS = ("bf16", "int8")


@torch.no_grad()
def bench_dtypes(
    folder: Path, prompts: Sequence[str], out: Path, guidance: Optional[float] = None
) -> dict[str, Any]:
    """Draw the same pictures with float32, bf16 and 8-bit weights, one at a time and in turn.

    Args:
        folder: A model folder (`lgpt convert`).
        prompts: One picture each; none for an unconditional model, which then draws one.
        out: A PNG that is written: the pictures, a row a prompt.
        guidance: Default: the model folder's.

    Returns:
        JSON values. Of every dtype: `tokens_per_second` (median over pictures), `speedup` over
        float32 (median of the pictures' ratios), `weight_bytes`, and `changed_when_drawn` and
        `changed_at_same_tokens`, the shares of tokens that are not float32's. A dtype that cannot
        be had here is left out.

    Raises:
        CheckpointError: The model folder is unusable.
        SettingsError: Prompts are missing, or given to an unconditional model, or `out` cannot be
            written.
    """
    check_png(out, "--out")
    reference = TextToImagePipeline.from_pretrained(folder, dtype=REFERENCE)
    texts = _texts(reference, prompts, guidance)
    pipelines = {REFERENCE: reference}
    for dtype in _OTHERS:
        try:
            pipelines[dtype] = TextToImagePipeline.from_pretrained(folder, dtype=dtype)
        except SettingsError as error:
            _logger.warning("bench dtypes: left out: %s", error)
    choices = {**reference.sampling, "top_k": 1}
    if not prompts:
        choices["guidance"] = 1.0
    elif guidance is not None:
        choices["guidance"] = guidance
    rates: dict[str, list[float]] = {dtype: [] for dtype in pipelines}
    drawn: dict[str, list[Tensor]] = {dtype: [] for dtype in pipelines}
    forced: dict[str, list[Tensor]] = {dtype: [] for dtype in pipelines}
    names = list(pipelines)
    for pipeline in pipelines.values():
        _draw(pipeline.model, texts[0], choices)  # what is done once is not measured
    # disable=None: a bar in a terminal, nothing in a log file.
    for number, text in enumerate(tqdm(texts, desc="pictures", disable=None)):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            tokens, rate = _draw(pipelines[name].model, text, choices)
            rates[name].append(rate)
            drawn[name].append(tokens)
        for name, pipeline in pipelines.items():
            forced[name].append(
                likeliest_tokens(pipeline.model, drawn[REFERENCE][-1], text, choices)
            )
    results = {
        name: {
            "tokens_per_second": statistics.median(rates[name]),
            "speedup": statistics.median(a / b for a, b in zip(rates[name], rates[REFERENCE])),
            "weight_bytes": _weight_bytes(pipelines[name].model),
            "changed_when_drawn": _changed(drawn[name], drawn[REFERENCE]),
            "changed_at_same_tokens": _changed(forced[name], forced[REFERENCE]),
        }
        for name in names
    }
    result = {
        "model": str(folder),
        "pictures": len(texts),
        "tokens_per_image": reference.model.config.num_tokens,
        "guidance": choices["guidance"],
        "threads": torch.get_num_threads(),
        "dtypes": results,
    }
    _sheet(reference, drawn, prompts or ["unconditional"]).save(out)
    _logger.info("Wrote the pictures to %s.", out)
    return result


def _texts(
    pipeline: TextToImagePipeline, prompts: Sequence[str], guidance: Optional[float]
) -> list[Text]:
    if pipeline.model.config.num_tokens < 2:
        raise SettingsError("this model's pictures are one token: there is no rate to measure.")
    if pipeline.model.config.text_width is None:
        if prompts or guidance is not None:
            raise SettingsError(
                "this model is unconditional: it takes no prompts and no guidance, and greedily "
                "it draws one picture."
            )
        return [(None, None)]
    if not prompts:
        raise SettingsError("nothing to draw: give --prompt or --prompts-file.")
    text, mask = pipeline.text_encoder.encode(list(prompts))
    return [(text[n : n + 1], mask[n : n + 1]) for n in range(len(prompts))]


def _draw(
    model: LatentGPT, text: Text, choices: dict[str, Any]
) -> tuple[Int[Tensor, " length"], float]:
    """One picture's tokens, and tokens a second from the first one on."""
    device = model.start_embedding.weight.device
    stamps: list[float] = []
    tokens = generate_tokens(
        model,
        *text,
        seeds=[0],
        progress=lambda count: stamps.append(seconds_when_done(device)),
        **choices,
    )
    return tokens.flatten(), (len(stamps) - 1) / (stamps[-1] - stamps[0])


def likeliest_tokens(
    model: LatentGPT, tokens: Int[Tensor, " length"], text: Text, choices: dict[str, Any]
) -> Int[Tensor, " length"]:
    """What the model would draw greedily at each position after the given tokens before it.

    Args:
        model: In eval mode, packed or not.
        tokens: Of one picture.
        text: Of its prompt.
        choices: guidance, guidance_schedule and guidance_power as `generate_tokens` takes them.
    """
    scale = choices["guidance"]
    schedule, power = choices["guidance_schedule"], choices["guidance_power"]
    decoder = GuidedDecoder(model, *text, batch=1, is_guided=scale != 1)
    likeliest = []
    for position in range(len(tokens)):
        now = guidance_at(position, len(tokens), scale, schedule, power)
        likeliest.append(decoder.logits(tokens.unsqueeze(0), position, now).argmax())
    return torch.stack(likeliest)


def _weight_bytes(model: LatentGPT) -> int:
    """Of everything that is kept, packed or not."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _changed(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return float((torch.cat(list(some)) != torch.cat(list(others))).float().mean())


def _sheet(
    pipeline: TextToImagePipeline, drawn: dict[str, list[Tensor]], prompts: Sequence[str]
) -> Image.Image:
    config = pipeline.model.config
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for number, prompt in enumerate(prompts):
        for name, tokens in drawn.items():
            grid = tokens[number].view(1, config.grid_height, config.grid_width)
            pictures += to_pil(pipeline.vqvae.decode(grid).float().cpu())
            share = _changed([tokens[number]], [drawn[REFERENCE][number]])
            others = "" if name == REFERENCE else f", {share:.0%} other tokens"
            captions.append(f"{name}: {prompt}{others}")
    return picture_grid(pictures, captions, columns=len(drawn))


def dtypes_table(result: dict[str, Any]) -> Table:
    """The result of `bench_dtypes` for people."""
    table = Table(
        title=f"{result['pictures']} pictures of {result['tokens_per_image']} tokens, one at a "
        f"time, guidance {result['guidance']:g}, {result['threads']} threads"
    )
    table.add_column("weights")
    for name in ("MiB", "tokens/s", "of fp32's", "tokens changed", "at the same tokens before"):
        table.add_column(name, justify="right")
    for name, measured in result["dtypes"].items():
        changed = [measured["changed_when_drawn"], measured["changed_at_same_tokens"]]
        table.add_row(
            name,
            f"{measured['weight_bytes'] / 2**20:,.1f}",
            f"{measured['tokens_per_second']:.1f}",
            f"{measured['speedup']:.2f}x",
            *(("", "") if name == REFERENCE else (f"{share:.1%}" for share in changed)),
        )
    return table
