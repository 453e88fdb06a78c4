"""The three phases, a union tagged by `phase`: what is trained, with what, tracked where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Optional, Union

from pydantic import Field

from lgpt.settings.blocks import BlockSettings, VqvaeBlockSettings
from lgpt.settings.data import DataSettings
from lgpt.settings.discriminator import DiscriminatorSettings
from lgpt.settings.health import HealthSettings
from lgpt.settings.section import FolderOrFile, NameOrPath, Section, Seed
from lgpt.settings.text import TextSettings
from lgpt.settings.training import (
    BatchSettings,
    CheckpointSettings,
    OptimizerSettings,
    SamplingSettings,
    ScheduleSettings,
    TrackingSettings,
    TrainingSettings,
)
from lgpt.settings.transformer import TransformerSettings
from lgpt.settings.vqvae import (
    FinetuningSettings,
    MetricSettings,
    VqvaeLossSettings,
    VqvaeSettings,
    VqvaeSourceSettings,
)

Trains = Literal["transformer", "vqvae"]


class _PhaseBase(Section):
    """What all phases share."""

    trains: ClassVar[Trains]
    experiment: ClassVar[str]
    default_deepspeed: ClassVar[str]

    name: str = Field(
        ...,
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="of the run, its folder in runs_folder and its MLflow run",
    )
    runs_folder: FolderOrFile = Field(Path("runs"), description="where run folders are made")
    seed: Seed = Field(0, description="of first weights, order, dropout and grids")
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    init_from: Optional[NameOrPath] = Field(
        None,
        description="first weights of a fresh run: a model folder, a run folder (its newest "
        "checkpoint) or one of its checkpoints/step_<n>; all names and shapes must be the same. In "
        "phase 2 also a VQ-VAE from elsewhere: see `finetuning`",
    )
    deepspeed: Optional[NameOrPath] = Field(
        None, description="a name in ds_configs or a JSON file; default: the phase's own"
    )

    @property
    def run_folder(self) -> Path:
        """`<runs_folder>/<name>`: everything this run writes."""
        return self.runs_folder / self.name

    @property
    def deepspeed_config(self) -> str:
        """The name or file of the DeepSpeed config in force."""
        return self.deepspeed or self.default_deepspeed


class _TransformerPhase(_PhaseBase):
    trains: ClassVar[Trains] = "transformer"

    conditioning: Literal["text_conditional", "unconditional"] = Field(
        "text_conditional", description="whether captions are read, by cross-attention"
    )
    vqvae: VqvaeSourceSettings = VqvaeSourceSettings()
    text: TextSettings = TextSettings()
    latent_cache: Optional[FolderOrFile] = Field(
        None,
        description="folder written by `lgpt prepare`; without it images are encoded on the fly",
    )
    transformer: TransformerSettings = TransformerSettings()
    blocks: BlockSettings = BlockSettings()
    sampling: SamplingSettings = SamplingSettings()


class Phase1(_TransformerPhase):
    """A small transformer on a pretrained VQGAN, to validate the pipeline."""

    experiment: ClassVar[str] = "latent-gpt-pretrained-vqvae"
    default_deepspeed: ClassVar[str] = "zero2_bf16"
    phase: Literal[1] = Field(1, description="a small transformer on a pretrained VQ-VAE")


class Phase2(_PhaseBase):
    """The VQ-VAE, from scratch or from a trained one."""

    trains: ClassVar[Trains] = "vqvae"
    experiment: ClassVar[str] = "vqvae-training"
    default_deepspeed: ClassVar[str] = "zero2_bf16"
    phase: Literal[2] = Field(2, description="the VQ-VAE")
    finetuning: FinetuningSettings = FinetuningSettings()
    vqvae: VqvaeSettings = VqvaeSettings()
    blocks: VqvaeBlockSettings = VqvaeBlockSettings()
    loss: VqvaeLossSettings = VqvaeLossSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    metrics: MetricSettings = MetricSettings()
    health: HealthSettings = HealthSettings()


class Phase3(_TransformerPhase):
    """The large transformer on the VQ-VAE of phase 2."""

    experiment: ClassVar[str] = "latent-gpt-custom-vqvae"
    default_deepspeed: ClassVar[str] = "zero3_bf16"
    phase: Literal[3] = Field(3, description="the large transformer on the VQ-VAE of phase 2")


TransformerRun = Union[Phase1, Phase3]
RunSettings = Annotated[Union[Phase1, Phase2, Phase3], Field(discriminator="phase")]


def run_tags(run: RunSettings) -> dict[str, str]:
    """MLflow tags that runs are filtered by."""
    tags = {"phase": str(run.phase), "resolution": str(run.data.resolution)}
    if isinstance(run, Phase2):
        # It makes the custom VQ-VAE, and never sees a caption.
        return {**tags, "vqvae_source": "custom", "conditioning": "unconditional"}
    return {**tags, "vqvae_source": run.vqvae.source, "conditioning": run.conditioning}


def logged_parameters(run: RunSettings) -> dict[str, object]:
    """MLflow parameters that the run config knows; counted ones are added when the models exist."""
    tags = run_tags(run)
    parameters: dict[str, object] = {
        "batch_size": run.batch.global_batch_images,
        "learning_rate": run.optimizer.learning_rate,
        "resolution": run.data.resolution,
        "conditioning": tags["conditioning"],
        "vqvae_source": tags["vqvae_source"],
    }
    if run.training.ema_decay > 0:
        parameters["ema_decay"] = run.training.ema_decay
    if isinstance(run, Phase2):
        return {
            **parameters,
            "vqvae_checkpoint": str(run.run_folder),
            "init_from": run.init_from,
            "trains": run.finetuning.trains,
            "codebook_size": run.vqvae.codebook_size,
            "downsample_factor": run.vqvae.downsample_factor,
        }
    return {
        **parameters,
        "vqvae_checkpoint": run.vqvae.checkpoint,
        "transformer_layers": run.transformer.layers,
        "transformer_hidden": run.transformer.hidden,
        "transformer_heads": run.transformer.heads,
    }
