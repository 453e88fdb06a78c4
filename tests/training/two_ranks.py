"""Run by test_two_ranks.py on two ranks: what only ranks can get wrong.

Not a test module: every check leaves what each rank saw in results_<rank>.json.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

from lgpt.core.distributed import barrier, leave_process_group, rank, seed_everything
from lgpt.core.errors import DataError, LgptError
from lgpt.data.captioned import open_dataset
from lgpt.engine import start
from lgpt.engine.ranks import sum_over_ranks
from lgpt.engine.start import start_process_group
from lgpt.evaluation import judges
from lgpt.evaluation.frechet import FeatureSums, frechet_distance
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.training.components import load_text_encoder_of
from lgpt.training.train import train
from lgpt.training.train_vqvae import VqvaeTask
from lgpt.training.vqvae_validation import VqvaeValidation


def a_late_rank_and_a_random_text_encoder(home: Path) -> dict[str, Any]:
    """Rank 1 looks for the encoder when rank 0 has made it; what follows must still match."""
    config = tiny.write(home / f"encoder_{rank()}.yaml", tiny.transformer_run(home, 8))
    run = load_run_settings(config, environ={}, world_size=2)
    try:
        load_text_encoder_of(run)
        refusal = "none"
    except DataError as error:
        refusal = str(error)
    barrier()
    time.sleep(2.0 * rank())
    encoder = load_text_encoder_of(run, open_dataset(run.data, "train"))
    total = sum_over_ranks(torch.tensor([rank() + 1.0]))
    return {"refusal": refusal, "digest": encoder.digest, "sum": total.item()}


def a_machine_that_looks_fast_to_rank_1_only() -> bool:
    """Whether this rank computes bf16 products in float32: all ranks or none must."""
    start._slowdown_of_bf16 = lambda: 100.0 if rank() == 0 else 1.0
    return start.afford_bf16(torch.device("cpu"))


# It learns from step 2 on and counts from step 3 on; the stop comes after step 3.
DISCRIMINATOR = {
    "layers": 1,
    "channels": 16,
    "start_step": 2,
    "warmup_steps": 1,
    "adaptive_weight": True,
    "lecam_weight": 0.05,
}


def run_of(home: Path, name: str, *overrides: str, **changes: Any) -> RunSettings:
    config = tiny.vqvae_run(
        home,
        6,
        name=name,
        vqvae={**tiny.VQVAE, "dropout": 0.1},  # draws from every rank's own generator
        tracking={"enabled": False},
        loss={"adversarial": "hinge"},
        discriminator=DISCRIMINATOR,
        **changes,
    )
    path = tiny.write(home / f"{name}_{rank()}.yaml", config)
    return load_run_settings(path, overrides, environ={}, world_size=2)


def ending_of(run: RunSettings) -> str:
    try:
        train(run, resolve_deepspeed_config(run, 2))
    except LgptError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def companions_of(run: RunSettings) -> list[str]:
    return [(run.run_folder / name).read_text() for name in COMPANIONS]


def a_stop_and_a_refused_start_on_the_way(home: Path) -> dict[str, Any]:
    """Rank 1 is told to stop after step 3; a start in another precision comes in between."""
    endings = [ending_of(run_of(home, "straight")), ending_of(run_of(home, "stopped"))]
    run = run_of(home, "stopped")
    written = companions_of(run)
    endings.append(ending_of(run_of(home, "stopped", "training.precision=bf16", "seed=5")))
    untouched = companions_of(run) == written
    barrier()
    endings.append(ending_of(run))
    return {"endings": endings, "untouched": untouched}


def a_time_budget_on_ranks_of_different_speed(home: Path) -> dict[str, Any]:
    training = {**tiny.training(1000), "max_minutes": 0.06, "validate_every": 0}
    ending = ending_of(run_of(home, "budget", training=training))
    return {"ending": ending, "steps": STEPS_TAKEN["budget"]}


def figures_of_a_validation(home: Path) -> dict[str, dict[str, float]]:
    """In both stages, of fewer pictures than ranks and of two numbers that share unevenly."""
    figures = {}
    config = tiny.write(home / f"validation_{rank()}.yaml", tiny.vqvae_run(home, 4))
    for stage in (2, 3):
        run = load_run_settings(config, [f"deepspeed=zero{stage}_bf16"], environ={}, world_size=2)
        seed_everything(run.seed)
        task = VqvaeTask(run, torch.device("cpu"))
        task.build_engines(resolve_deepspeed_config(run, 2))
        for images in (1, 5, 13):
            training = run.training.model_copy(update={"validation_images": images})
            changed = run.model_copy(update={"training": training})
            task.validation = VqvaeValidation(changed, task.val_images, task.device)
            figures[f"zero{stage}, {images} images"] = dict(task.validate())
        task.engine.destroy()
    return figures


def features_shared_by_ranks() -> float:
    """Frechet distance between two sets of rows, of which each rank saw every second one."""
    both = []
    for seed in (0, 1):
        rows = torch.randn(31, 5, generator=torch.Generator().manual_seed(seed))
        sums = FeatureSums(5, torch.device("cpu"))
        for batch in rows.split(4):
            sums.add(batch, torch.arange(len(batch)) % 2 == rank())
        sums.add_over_ranks()
        both.append(sums)
    return frechet_distance(*both)


def judges_that_only_rank_0_could_load() -> list[bool]:
    """Weights lie on the disk of rank 0's machine alone: both ranks must measure the same."""
    judges.missing_lpips_weights = lambda *_: None if rank() == 0 else "vgg.pth is not there"
    judges.missing_inception_weights = lambda *_: "inception.pth is not there"
    return [judge is not None for judge in judges.find_judges(torch.device("cpu"), side=64)]


COMPANIONS = ("config.yaml", "ds_config.json", "model_config.json")
STEPS_TAKEN: dict[str, int] = {"straight": 0, "stopped": 0, "budget": 0}
plain_step = VqvaeTask.train_step


def watched_step(task: VqvaeTask, step: int) -> Mapping[str, float]:
    name = task.run.name
    STEPS_TAKEN[name] += 1
    if name == "stopped" and rank() == 1 and step == 2:
        signal.raise_signal(signal.SIGTERM)
    if name == "budget":
        time.sleep(0.02 * rank())
    return plain_step(task, step)


def main() -> None:
    out = Path(sys.argv[-1])
    start_process_group()
    VqvaeTask.train_step = watched_step
    results = {
        "encoder": a_late_rank_and_a_random_text_encoder(out),
        "stop": a_stop_and_a_refused_start_on_the_way(out),
        "budget": a_time_budget_on_ranks_of_different_speed(out),
        "validation": figures_of_a_validation(out),
        "features": features_shared_by_ranks(),
        "judges": judges_that_only_rank_0_could_load(),
        "float32_products": a_machine_that_looks_fast_to_rank_1_only(),
    }
    (out / f"results_{rank()}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
