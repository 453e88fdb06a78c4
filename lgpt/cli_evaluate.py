"""`lgpt evaluate`: measures of a model or of a VQ-VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

from lgpt.cli_parts import (
    DDCONFIG,
    JSON,
    LARGEST_SEED,
    SOURCE_OPTION,
    load_transformer_run,
    print_table,
)
from lgpt.core.errors import SettingsError

_MODEL = typer.Argument(
    ..., help="a model folder written by `lgpt convert`, or a VQ-VAE: hub name, folder, file or run"
)
_PROMPT_ACCURACY = typer.Option(
    None, min=1, help="prompts of held-out combinations of the shapes dataset; default: 256"
)
_MEMORISATION = typer.Option(
    None,
    help="the run folder or config it was trained with: instead, how near drawn pictures come to "
    "training pictures",
)
_PICTURES = typer.Option(None, min=1, help="drawn for each kind of caption; default: 64")
_CLIP = typer.Option(None, help="hub name or folder of a whole CLIP that compares pictures too")
_GUIDANCE = typer.Option(None, help="guidance scale; default: the model's")
_SEED = typer.Option(None, min=0, max=LARGEST_SEED, help="of prompts and pictures; default: 0")
_IMAGES = typer.Option(None, help="VQ-VAE: a picture or a folder of pictures to measure it on")
_DATA = typer.Option(
    None,
    help="VQ-VAE: or a run config (demo/phase2_openmoji) or a dataset (openmoji, shapes, "
    "flickr30k); default: the data of the run it lies in",
)
_SPLIT = typer.Option(None, help="VQ-VAE: train, val or test of --data; default: val")
_RESOLUTION = typer.Option(
    None, min=1, help="VQ-VAE: side that pictures are cut to; default: that of --data, or its own"
)
_MAX_IMAGES = typer.Option(None, min=1, help="VQ-VAE: so many pictures at most; default: all")
_BATCH = typer.Option(None, min=1, help="VQ-VAE: pictures a call; default: 16")
_PAGE = typer.Option(None, help="VQ-VAE: the HTML page; default: vqvae-evaluation.html")
_VGG16 = typer.Option(None, help="VQ-VAE: vgg16-397923af.pth, for LPIPS; default: torch's cache")
_LPIPS = typer.Option(None, help="VQ-VAE: LPIPS's vgg.pth; default: beside the VGG16")
_INCEPTION = typer.Option(
    None, help="VQ-VAE: pt_inception-2015-12-05-6726825d.pth, for rFID; default: torch's cache"
)


def evaluate(
    model: str = _MODEL,
    prompt_accuracy: Optional[int] = _PROMPT_ACCURACY,
    memorisation: Optional[str] = _MEMORISATION,
    pictures: Optional[int] = _PICTURES,
    clip: Optional[str] = _CLIP,
    guidance: Optional[float] = _GUIDANCE,
    seed: Optional[int] = _SEED,
    images: Optional[Path] = _IMAGES,
    data: Optional[str] = _DATA,
    split: Optional[str] = _SPLIT,
    resolution: Optional[int] = _RESOLUTION,
    max_images: Optional[int] = _MAX_IMAGES,
    batch: Optional[int] = _BATCH,
    page: Optional[Path] = _PAGE,
    source: Optional[str] = SOURCE_OPTION,
    ddconfig: Optional[str] = DDCONFIG,
    vgg16_weights: Optional[Path] = _VGG16,
    lpips_weights: Optional[Path] = _LPIPS,
    inception_weights: Optional[Path] = _INCEPTION,
    as_json: bool = JSON,
) -> None:
    """Measure a transformer by its pictures, or a VQ-VAE by what comes back of pictures.

    A transformer trained on shapes: how often pictures show what their prompts say, kept in
    MODEL/evaluation.json. With --memorisation RUN, any transformer's pictures are compared with
    the training pictures, beside real pictures that training never saw; what comes nearest is
    shown in MODEL/memorisation.png.

    A VQ-VAE of any source: PSNR, SSIM, LPIPS and rFID (where their weights lie on this machine;
    nothing is downloaded), use and perplexity of the codes, dead codes, images a second; and a page
    with originals beside reconstructions, the worst and the best first:

    \b
        lgpt evaluate runs/phase2_vqvae
        lgpt evaluate dalle-mini/vqgan_imagenet_f16_16384 --images my-pictures --max-images 1000
        lgpt evaluate vq_ds16_c2i.pt --data demo/phase2_openmoji --resolution 256 --json
    """
    from lgpt.evaluation.vqvae_evaluation import is_transformer

    of_drawing = {
        "--prompt-accuracy": prompt_accuracy,
        "--memorisation": memorisation,
        "--pictures": pictures,
        "--clip": clip,
        "--guidance": guidance,
        "--seed": seed,
    }
    of_vqvae = {
        "--images": images,
        "--data": data,
        "--split": split,
        "--resolution": resolution,
        "--max-images": max_images,
        "--batch": batch,
        "--page": page,
        "--source": source,
        "--ddconfig": ddconfig,
        "--vgg16-weights": vgg16_weights,
        "--lpips-weights": lpips_weights,
        "--inception-weights": inception_weights,
    }
    if is_transformer(model):
        _refuse_given(of_vqvae, f"{model} is a transformer")
        _evaluate_transformer(Path(model), of_drawing, as_json)
    else:
        _refuse_given(of_drawing, f"{model} is a VQ-VAE, or none of our transformers")
        _evaluate_vqvae(model, of_vqvae, as_json)


def _refuse_given(options: dict[str, Any], what: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise SettingsError(f"{what}: {', '.join(given)} would have no effect; leave it out.")


def _evaluate_transformer(model: Path, options: dict[str, Any], as_json: bool) -> None:
    guidance, seed = options["--guidance"], options["--seed"] or 0
    if options["--memorisation"] is not None:
        from lgpt.training.memorisation import memorisation_report, memorisation_table

        place = options["--memorisation"]
        saved = Path(place) / "config.yaml"
        run = load_transformer_run(str(saved) if saved.is_file() else place, None)
        result = memorisation_report(
            model,
            run,
            pictures=options["--pictures"] or 64,
            guidance=guidance,
            seed=seed,
            clip=options["--clip"],
        )
        print_table(memorisation_table(result), result, as_json)
        return
    from lgpt.evaluation.prompt_accuracy import accuracy_table, evaluate_model

    count = options["--prompt-accuracy"] or 256
    result = evaluate_model(model, count, guidance=guidance, seed=seed)
    print_table(accuracy_table(result), result, as_json)


def _evaluate_vqvae(vqvae: str, options: dict[str, Any], as_json: bool) -> None:
    from lgpt.evaluation.vqvae_evaluation import (
        JudgeFiles,
        Pictures,
        evaluate_vqvae,
        vqvae_table,
    )

    result = evaluate_vqvae(
        vqvae,
        source=options["--source"],
        ddconfig=options["--ddconfig"],
        pictures=Pictures(
            images=options["--images"],
            data=options["--data"],
            split=options["--split"],
            resolution=options["--resolution"],
            max_images=options["--max-images"],
            batch_images=options["--batch"] or 16,
        ),
        judge_files=JudgeFiles(
            vgg16_weights=options["--vgg16-weights"],
            lpips_weights=options["--lpips-weights"],
            inception_weights=options["--inception-weights"],
        ),
        page=options["--page"] or Path("vqvae-evaluation.html"),
    )
    print_table(vqvae_table(result), result, as_json)
