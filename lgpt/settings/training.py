"""Batch, optimizer, budget, checkpoints, tracking and sample grids of a run."""

from __future__ import annotations

from typing import Literal, Optional, get_args

from pydantic import Field

from lgpt.settings.section import Section, Text

GuidanceSchedule = Literal["constant", "linear", "cosine"]
GUIDANCE_SCHEDULES: tuple[str, ...] = get_args(GuidanceSchedule)


class BatchSettings(Section):
    """Images per optimizer step over all ranks, and per forward pass of one rank."""

    global_batch_images: int = Field(256, ge=1, description="of an optimizer step, over all ranks")
    micro_batch_images: int = Field(
        32,
        ge=1,
        description="of one rank's forward pass; several add up to the global batch",
    )


class OptimizerSettings(Section):
    """AdamW (Loshchilov & Hutter 2019); norms, biases and embeddings are not decayed."""

    learning_rate: float = Field(3e-4, gt=0, description="after warm-up; see `schedule`")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's average")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of its square's average")
    eps: float = Field(1e-8, gt=0, description="added to the root of the square's average")
    weight_decay: float = Field(
        0.05, ge=0, description="of matrices; norms, biases and embeddings have none"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="global gradient norm; 0 = off")


class ScheduleSettings(Section):
    """Linear warm-up, then decay to `final_ratio` of the learning rate at `training.max_steps`."""

    warmup_steps: int = Field(
        1000, ge=0, description="in which the learning rate rises from 0, linearly"
    )
    decay: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how it falls after them"
    )
    final_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the learning rate that is left at the end"
    )


class TrainingSettings(Section):
    """The budget and its cadence; all intervals are optimizer steps, 0 = only at the end."""

    max_steps: int = Field(..., ge=1, description="optimizer steps")
    max_minutes: Optional[float] = Field(
        None,
        gt=0,
        description="training time after which the run ends even before max_steps; the learning "
        "rate decays towards whichever comes first, so the end depends on the machine's speed",
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="of weights and products; in bf16 the optimizer keeps float32 masters and sums",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="keep a moving average of the weights, of which a step leaves so much (less at "
        "first); validation, grids and `lgpt convert` use it; 0 = off",
    )
    log_every: int = Field(10, ge=1, description="a line of metrics, means since the last one")
    validate_every: int = Field(500, ge=0, description="the loss of pictures held out")
    validation_images: int = Field(512, ge=1, description="at most so many of them")
    early_stopping: int = Field(
        0,
        ge=0,
        description="end the run after so many validations in a row without a lower validation "
        "loss; `lgpt convert RUN OUT --tag best` takes the best checkpoint; 0 = off",
    )
    sample_every: int = Field(1000, ge=0, description="sample or reconstruction grids")


class CheckpointSettings(Section):
    """When DeepSpeed checkpoints are written (one more always at the end) and which ones stay."""

    every_steps: int = Field(500, ge=1, description="and one when a signal ends the run")
    keep_last: int = Field(2, ge=2, description="never under 2: the newest may be the damaged one")
    keep_every: int = Field(
        0, ge=0, description="also those of every step that this divides, for ever; 0 = off"
    )
    keep_best: int = Field(
        1,
        ge=0,
        description="also so many with the lowest validation loss, among those saved at a step "
        "that was validated",
    )
    on_failed_save: Literal["stop", "continue"] = Field(
        "stop",
        description="what a full disk between two steps does: end the run (the old checkpoints are "
        "whole), or train on and try again at the next save; the last save must work",
    )
    asynchronous: bool = Field(
        False,
        description="train on while a checkpoint is written: takes CPU memory for one copy of this "
        "rank's states (on GPUs pinned), and a kill before it is written, some steps later, goes "
        "back to the one before; the last save, and the one after a signal, always wait",
    )
    resume: Literal["config", "checkpoint", "ask"] = Field(
        "config",
        description="whose optimizer, schedule and batch hold when a run goes on and the two "
        "differ; ask = on the terminal, and without one refuse",
    )


class TrackingSettings(Section):
    """Where MLflow listens. metrics.jsonl in the run folder is written whatever this says."""

    enabled: bool = Field(True, description="false: no MLflow")
    uri: Optional[Text] = Field(
        None,
        description="default: the MLFLOW_TRACKING_URI variable, else <runs_folder>/mlflow.db",
    )
    experiment: Optional[Text] = Field(None, description="default: the phase's own experiment")


class SamplingSettings(Section):
    """How pictures are drawn, in sample grids and as the model folder's default."""

    guidance: float = Field(4.0, ge=0, description="classifier-free guidance scale; 1 = off")
    guidance_schedule: GuidanceSchedule = Field(
        "constant", description="linear and cosine rise from 1 at the first token to `guidance`"
    )
    guidance_power: float = Field(
        1.0, gt=0, description="exponent on the rise; cosine with 2.5 is RAR's power-cosine"
    )
    temperature: float = Field(1.0, gt=0, description="below 1 prefers likely codes")
    top_k: int = Field(0, ge=0, description="only so many likeliest codes; 0 = all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="only the likeliest codes with this much probability; 1 = all"
    )
    prompts: tuple[str, ...] = Field(
        (), description="prompts of the sample grid; default: the first validation captions"
    )
    images: int = Field(16, ge=1, description="pictures in a sample grid")
