"""What single sections cannot see: values that contradict each other, and values without effect."""

from __future__ import annotations

from lgpt.settings.checks_phase2 import add_inert_of_phase2, contradictions_of_phase2
from lgpt.settings.data import DataSettings
from lgpt.settings.phases import Phase2, Phase3, RunSettings, TransformerRun
from lgpt.settings.problems import At, Located, Problem, Void, neighbours, problem
from lgpt.settings.sources import KeyPath, Sources
from lgpt.settings.training import ScheduleSettings, TrainingSettings
from lgpt.settings.vqvae import VqvaeSourceSettings

_DALLE_MINI = VqvaeSourceSettings.model_fields["checkpoint"].default

_SQUARE = ("shapes", "openmoji")


def settings_without_effect(run: RunSettings) -> list[tuple[KeyPath, Void]]:
    """Settings (or whole sections) that nothing reads because of another setting."""
    void: list[tuple[KeyPath, Void]] = []

    def add(paths: str, switch: str, text: str) -> None:
        for path in paths.split():
            void.append((tuple(path.split(".")), Void(tuple(switch.split(".")), text)))

    if run.data.dataset != "shapes":
        add("data.shapes", "data.dataset", f"with data.dataset: {run.data.dataset}")
    if run.data.dataset != "openmoji":
        add("data.openmoji", "data.dataset", f"with data.dataset: {run.data.dataset}")
    if run.data.dataset in ("shapes", "openmoji"):
        add("data.source", "data.dataset", f"with data.dataset: {run.data.dataset}")
    if run.data.dataset != "flickr30k":
        add(
            "data.cache_folder data.streaming",
            "data.dataset",
            f"with data.dataset: {run.data.dataset}",
        )
    elif run.data.streaming:
        add("data.cache_folder", "data.streaming", "with data.streaming: true (nothing is kept)")
    if run.schedule.decay == "constant":
        add("schedule.final_ratio", "schedule.decay", "with schedule.decay: constant")
    if not run.tracking.enabled:
        add("tracking.uri tracking.experiment", "tracking.enabled", "with tracking.enabled: false")
    if isinstance(run, Phase2):
        add_inert_of_phase2(run, add)
        return void
    if run.conditioning == "unconditional":
        text_only = "text transformer.cond_drop sampling.prompts"
        guidance_only = "sampling.guidance sampling.guidance_schedule sampling.guidance_power"
        add(
            f"{text_only} {guidance_only}",
            "conditioning",
            "in a run with conditioning: unconditional",
        )
    elif run.latent_cache is None:
        add("text.cache_dtype", "latent_cache", "without a latent_cache")
    if run.blocks.checkpointing != "every_n":
        name = run.blocks.checkpointing
        add("blocks.every", "blocks.checkpointing", f"with blocks.checkpointing: {name}")
    if run.blocks.checkpointing == "none":
        add(
            "blocks.checkpointed_by",
            "blocks.checkpointing",
            "with blocks.checkpointing: none",
        )
    if run.sampling.guidance_schedule == "constant":
        constant = "with sampling.guidance_schedule: constant"
        add("sampling.guidance_power", "sampling.guidance_schedule", constant)
    if run.vqvae.source != "pretrained_taming":
        add("vqvae.ddconfig", "vqvae.source", f"with vqvae.source: {run.vqvae.source}")
    if run.vqvae.source == "custom":
        add("vqvae.input_range", "vqvae.source", "with vqvae.source: custom (always -1..1)")
    return void


def contradictions(run: RunSettings, sources: Sources) -> list[Problem]:
    """Settings that cannot both be meant; each text names them, their places and the way out."""
    at = Located(run, sources)
    problems = [*_budget(run.schedule, run.training, at), *_data(run.data, at)]
    problems += _streaming(run, at)
    problems += _retention(run, at)
    problems += _early_stopping(run, at)
    if isinstance(run, Phase2):
        return problems + contradictions_of_phase2(run, at)
    problems += _true_captions(run, at)
    problems += _vqvae_source(run, at)
    problems += _transformer(run, at)
    problems += _blocks(run, at)
    problems += _sampling(run, at)
    return problems


def _retention(run: RunSettings, at: At) -> list[Problem]:
    checkpoint, names = run.checkpoint, ("checkpoint.keep_every", "checkpoint.every_steps")
    if checkpoint.keep_every % checkpoint.every_steps == 0:
        return []
    text = (
        f"{at(names[0])} must be a multiple of {at(names[1])}: only saved steps can be kept; set "
        f"it to {(checkpoint.keep_every // checkpoint.every_steps + 1) * checkpoint.every_steps}."
    )
    return [problem(text, *names)]


def _early_stopping(run: RunSettings, at: At) -> list[Problem]:
    """The best checkpoint must be there when the run ends."""
    training, checkpoint = run.training, run.checkpoint
    if training.early_stopping == 0:
        return []
    names = ("training.early_stopping", "training.validate_every", "checkpoint.every_steps")
    problems = []
    if training.validate_every == 0:
        text = f"{at(names[0])} needs validations on the way; {at(names[1])} has one at the end."
        problems.append(problem(f"{text} Set training.validate_every to 500 or so.", *names[:2]))
    elif training.validate_every % checkpoint.every_steps:
        text = (
            f"with {at(names[0])}, {at(names[1])} must be a multiple of {at(names[2])}: the best "
            "weights must have been saved; "
            f"{neighbours(training.validate_every, checkpoint.every_steps)}."
        )
        problems.append(problem(text, *names))
    if checkpoint.keep_best == 0:
        text = (
            f"{at(names[0])} ends a run long after its best step, and {at('checkpoint.keep_best')} "
            "would not keep that one; set checkpoint.keep_best to 1."
        )
        problems.append(problem(text, names[0], "checkpoint.keep_best"))
    return problems


def _budget(schedule: ScheduleSettings, training: TrainingSettings, at: At) -> list[Problem]:
    if schedule.warmup_steps < training.max_steps:
        return []
    names = ("schedule.warmup_steps", "training.max_steps")
    text = (
        f"{at(names[0])} must be less than {at(names[1])}: the learning rate would never reach its "
        "value; "
        f"set it to {training.max_steps // 10} or so."
    )
    return [problem(text, *names)]


def _data(data: DataSettings, at: At) -> list[Problem]:
    problems = []
    if data.dataset == "folder" and data.source is None:
        text = f"{at('data.dataset')} needs data.source: the folder that holds your pictures."
        problems.append(problem(text, "data.dataset", "data.source"))
    if data.flip and data.crops == 1:
        text = (
            f"{at('data.flip')} has no effect with {at('data.crops')}: every second crop is "
            "mirrored, "
            "and there is one; set data.crops to 2 or more, or data.flip to false."
        )
        problems.append(problem(text, "data.flip", "data.crops"))
    different = 2 if data.flip else 1
    if data.dataset in _SQUARE and data.crop_scale_min == 1 and data.crops > different:
        text = (
            f"{at('data.crops')} makes the same crops again: pictures of {at('data.dataset')} are "
            f"square and {at('data.crop_scale_min')} takes them whole; set data.crops to "
            f"{different} or data.crop_scale_min below 1."
        )
        names = ("data.crops", "data.crop_scale_min", "data.dataset", "data.flip")
        problems.append(problem(text, *names))
    return problems


def _streaming(run: RunSettings, at: At) -> list[Problem]:
    if not run.data.streaming:
        return []
    start = f"{at('data.streaming')} gives pictures in their order only, but "
    if isinstance(run, Phase2):
        text = f"{start}{at('phase')} reads them at random, again and again; set it to false."
        return [problem(text, "data.streaming", "phase")]
    if run.latent_cache is None:
        text = (
            f"{start}without latent_cache every step reads some at random; set latent_cache to a "
            "folder and run `lgpt prepare` first, or data.streaming to false."
        )
        return [problem(text, "data.streaming", "latent_cache")]
    return []


def _true_captions(run: TransformerRun, at: At) -> list[Problem]:
    """Captions of drawn scenes tell place and size, which mirroring and cutting change."""
    if run.data.dataset != "shapes" or run.conditioning == "unconditional":
        return []
    problems = []
    if run.data.flip:
        text = (
            f"{at('data.flip')} makes captions of {at('data.dataset')} false, which say left and "
            "right; set it to false."
        )
        problems.append(problem(text, "data.flip", "data.dataset"))
    if run.data.crop_scale_min < 1:
        text = (
            f"{at('data.crop_scale_min')} makes captions of {at('data.dataset')} false, which say "
            "size and place; set it to 1."
        )
        problems.append(problem(text, "data.crop_scale_min", "data.dataset"))
    return problems


def _vqvae_source(run: TransformerRun, at: At) -> list[Problem]:
    problems = []
    if isinstance(run, Phase3) != (run.vqvae.source == "custom"):
        text = (
            f"{at('vqvae.source')} does not fit {at('phase')}: phase 1 trains on a pretrained "
            "VQ-VAE (pretrained_hf, pretrained_taming or pretrained_llamagen), phase 3 on your own "
            "(custom); change one of them."
        )
        problems.append(problem(text, "vqvae.source", "phase"))
    if run.vqvae.source != "pretrained_hf" and run.vqvae.checkpoint == _DALLE_MINI:
        text = (
            f"{at('vqvae.checkpoint')} is the Flax checkpoint of pretrained_hf, but "
            f"{at('vqvae.source')}; "
            "set vqvae.checkpoint to the file or folder that holds yours."
        )
        problems.append(problem(text, "vqvae.checkpoint", "vqvae.source"))
    factor = run.vqvae.downsample_factor
    if factor and run.data.resolution % factor:
        text = (
            f"{at('data.resolution')} must be a multiple of {at('vqvae.downsample_factor')}; "
            f"{neighbours(run.data.resolution, factor)}."
        )
        problems.append(problem(text, "data.resolution", "vqvae.downsample_factor"))
    return problems


def _transformer(run: TransformerRun, at: At) -> list[Problem]:
    model = run.transformer
    names = ("transformer.hidden", "transformer.heads")
    if model.hidden % model.heads:
        text = f"{at(names[0])} must be a multiple of {at(names[1])}; "
        return [problem(text + neighbours(model.hidden, model.heads) + ".", *names)]
    problems = []
    head_width = model.hidden // model.heads
    if model.positions == "rope2d" and head_width % 4:
        text = (
            f"{at('transformer.positions')} rotates pairs along rows and columns, so the head "
            "width must be "
            f"a multiple of 4; {at(names[0])} over {at(names[1])} gives {head_width}; set hidden "
            "to a "
            f"multiple of {4 * model.heads}, or positions to learned."
        )
        problems.append(problem(text, "transformer.positions", *names))
    if model.attention == "flash" and (head_width % 8 or head_width > 256):
        text = (
            f"{at('transformer.attention')} needs a head width that is a multiple of 8 and at most "
            "256; "
            f"{at(names[0])} over {at(names[1])} gives {head_width}; change them or use auto."
        )
        problems.append(problem(text, "transformer.attention", *names))
    if model.attention == "flash" and run.training.precision == "fp32":
        text = (
            f"{at('transformer.attention')} has no float32 kernel, but {at('training.precision')}; "
            "set attention to auto or sdpa, or precision to bf16."
        )
        problems.append(problem(text, "transformer.attention", "training.precision"))
    return problems


def _blocks(run: TransformerRun, at: At) -> list[Problem]:
    blocks = run.blocks
    if blocks.checkpointing != "selective":
        return []
    problems = []
    if blocks.checkpointed_by != "torch":
        text = (
            f"{at('blocks.checkpointed_by')} computes all again that it is given, but "
            f"{at('blocks.checkpointing')}; set checkpointed_by to torch, or checkpointing to full "
            "or every_n."
        )
        problems.append(problem(text, "blocks.checkpointed_by", "blocks.checkpointing"))
    if blocks.compile:
        text = (
            f"{at('blocks.compile')} does not go with {at('blocks.checkpointing')}: products in "
            "compiled code cannot be kept (torch 2.6 would run the blocks as they are); set "
            "compile to false, or checkpointing to full or every_n."
        )
        problems.append(problem(text, "blocks.compile", "blocks.checkpointing"))
    return problems


def _sampling(run: TransformerRun, at: At) -> list[Problem]:
    problems = []
    sampling = run.sampling
    if len(sampling.prompts) > sampling.images:
        text = (
            f"sampling.prompts has {len(sampling.prompts)} entries, but {at('sampling.images')} "
            "pictures are "
            "drawn, so some would never be; raise sampling.images or shorten the list."
        )
        problems.append(problem(text, "sampling.prompts", "sampling.images"))
    codes = run.vqvae.codebook_size
    if codes and sampling.top_k > codes:
        text = (
            f"{at('sampling.top_k')} must be at most {at('vqvae.codebook_size')}; 0 means all "
            "codes."
        )
        problems.append(problem(text, "sampling.top_k", "vqvae.codebook_size"))
    return problems
