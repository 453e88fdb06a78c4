"""`lgpt evaluate`: measures of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from lgpt.cli_parts import JSON, LARGEST_SEED, load_transformer_run, print_table


def evaluate(
    model: Path = typer.Argument(..., help="a model folder written by `lgpt convert`"),
    prompt_accuracy: int = typer.Option(
        256, min=1, help="prompts of held-out combinations of the shapes dataset"
    ),
    memorisation: Optional[str] = typer.Option(
        None,
        help="the run folder or config it was trained with: instead, how near drawn pictures come "
        "to training pictures",
    ),
    pictures: int = typer.Option(64, min=1, help="drawn for each kind of caption"),
    clip: Optional[str] = typer.Option(
        None, help="hub name or folder of a whole CLIP that compares pictures too"
    ),
    guidance: Optional[float] = typer.Option(None, help="guidance scale; default: the model's"),
    seed: int = typer.Option(0, min=0, max=LARGEST_SEED),
    as_json: bool = JSON,
) -> None:
    """Measure how often pictures show what their prompts say (models trained on shapes).

    The result is also kept in MODEL/evaluation.json. With --memorisation RUN, any model's pictures
    are compared with the training pictures, beside real pictures that training never saw; what
    comes nearest is shown in MODEL/memorisation.png.
    """
    if memorisation is not None:
        from lgpt.training.memorisation import memorisation_report, memorisation_table

        saved = Path(memorisation) / "config.yaml"
        run = load_transformer_run(str(saved) if saved.is_file() else memorisation, None)
        result = memorisation_report(
            model, run, pictures=pictures, guidance=guidance, seed=seed, clip=clip
        )
        print_table(memorisation_table(result), result, as_json)
        return
    from lgpt.evaluation.prompt_accuracy import accuracy_table, evaluate_model

    result = evaluate_model(model, prompt_accuracy, guidance=guidance, seed=seed)
    print_table(accuracy_table(result), result, as_json)
