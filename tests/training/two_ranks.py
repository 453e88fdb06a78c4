"""Run by test_two_ranks.py on two ranks under the launcher: what only ranks can get wrong.

Not a test module: every check leaves what each rank saw in results_<rank>.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch

from lgpt.core.distributed import barrier, rank
from lgpt.core.errors import DataError
from lgpt.data.captioned import open_dataset
from lgpt.engine.ranks import sum_over_ranks
from lgpt.engine.start import start_process_group
from lgpt.settings.run import load_run_settings
from lgpt.training.components import load_text_encoder_of


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


def main() -> None:
    out = Path(sys.argv[-1])
    start_process_group()
    results = {"encoder": a_late_rank_and_a_random_text_encoder(out)}
    (out / f"results_{rank()}.json").write_text(json.dumps(results))
    barrier()


if __name__ == "__main__":
    main()
