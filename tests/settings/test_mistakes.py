"""Every mistake is named with its place, value and way out, and all of them at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lgpt.core.errors import SettingsError
from lgpt.settings.run import load_run_settings

TRANSFORMER = """
phase: 1
name: tiny
training: {max_steps: 5000}
latent_cache: cache
"""
VQVAE = """
phase: 2
name: tiny
training: {max_steps: 5000}
"""


def problems_of(text: str, folder: Path, *overrides: str, **environ: str) -> tuple[str, ...]:
    path = folder / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_run_settings(path, overrides, environ)
    return tuple(problem.replace(f"{folder}/", "") for problem in caught.value.problems)


TEN_MISTAKES = """
phase: 3
name: "two words"
trainning:
  max_steps: 100
training:
  max_steps: 100
  precision: fp16
  max_stepps: 3
data:
  resolution: 250
batch:
  global_batch_images: 100
  micro_batch_images: 32
transformer:
  hidden: 1000
  heads: 16
  postions: rope2d
schedule:
  warmup_steps: 100
vqvae:
  source: custom
  checkpoint: runs/v
  downsample_factor: 16
deepspeed: zero2_fp16
"""
TEN_TEXTS = (
    'name = "two words" (run.yaml:3) must match',
    "trainning (run.yaml:5) is not a setting of a run: did you mean training?",
    'training.precision = "fp16" (run.yaml:8) must be one of bf16, fp32.',
    "training.max_stepps (run.yaml:9) is not a setting of section training: did you mean "
    "training.max_steps?",
    "data.resolution = 250 (run.yaml:11) must be a multiple of vqvae.downsample_factor = 16 "
    "(run.yaml:24); use 240 or 256.",
    "batch.global_batch_images (100, run.yaml:13) must be a multiple of micro_batch_images x "
    "world_size (32 x 1 = 32); set it to 96 or 128, or keep it with "
    "batch.micro_batch_images=25.",
    "transformer.hidden = 1000 (run.yaml:16) must be a multiple of transformer.heads = 16 "
    "(run.yaml:17); use 992 or 1008.",
    "transformer.postions (run.yaml:18) is not a setting of section transformer: did you mean "
    "transformer.positions?",
    "schedule.warmup_steps = 100 (run.yaml:20) must be less than training.max_steps = 100 "
    "(run.yaml:7): the learning rate would never reach its value; set it to 10 or so.",
    "deepspeed = \"zero2_fp16\" (run.yaml:25): no DeepSpeed config 'zero2_fp16': did you mean "
    "zero2_bf16?",
)


def test_ten_mistakes_are_all_printed_before_torch_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text(TEN_MISTAKES)
    program = (
        "import sys\n"
        "from lgpt.core.errors import SettingsError\n"
        "from lgpt.settings.run import load_run_settings\n"
        "try:\n    load_run_settings('run.yaml', environ={})\n"
        "except SettingsError as error:\n    print(error)\n"
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)\n"
    )
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for text in TEN_TEXTS:
        assert text in done.stdout
    assert "run.yaml: 10 problems" in done.stdout
    assert done.stdout.endswith("False False\n")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed=x", 'seed = "x" (command line) must be a whole number.'),
        ("seed=1.5", "seed = 1.5 (command line) must be a whole number."),
        ("seed=-1", "seed = -1 (command line) must be at least 0."),
        ("seed=9" + "9" * 5000, "seed = 9999"),
        ("seed=0x" + "f" * 9000, "seed = a number of thousands of digits (command line) must be"),
        ("seed=99999999999999999999999", "must be at most 4611686018427387904."),
        ("data.seed=-1", "must be at least 0."),
        ("name=" + "x" * 201, "must have at most 200 characters."),
        ("runs_folder=''", 'runs_folder = "" (command line) must not be empty.'),
        ("data.source=''", "must not be empty."),
        ("deepspeed=''", "must not be empty."),
        ("tracking.experiment=''", "must not be empty."),
        ("tracking.uri=''", "must not be empty."),
        ("runs_folder=[a]", 'runs_folder = ["a"] (command line) must be a path.'),
        ("training.max_steps=" + "9" * 5000, "99... (command line) is not a plain value: Exceeds"),
        ("seed=!!bool maybe", "seed = maybe (command line) is not a plain value: 'maybe'."),
        ("vqvae.ch_mult=[true,2]", "vqvae.ch_mult[0] = true (command line) must be a number, not"),
        ("data.dataset=yes", "data.dataset = true (command line) must be one of flickr30k"),
        ("seed=yes", "seed = true (command line) must be a number, not true or false."),
        ("optimizer.learning_rate=0", "(command line) must be greater than 0.0."),
        ("optimizer.learning_rate=.nan", "must be a finite number."),
        ("optimizer.beta1=1", "must be less than 1.0."),
        ("tracking.enabled=3", "tracking.enabled = 3 (command line) must be true or false."),
        ("data.crop_scale_min=2", "must be at most 1.0."),
        ("data=3", "data = 3 (command line) must be a section with keys under it."),
        ("name=[a]", 'name = ["a"] (command line) must be text; put it in quotes'),
        ("vqvae.ch=40", "vqvae.ch = 40 (command line) must be a multiple of 32."),
        ("vqvae.ch_mult=[]", "must have at least 1 entries."),
        ("vqvae.ch_mult=[1,x]", 'vqvae.ch_mult[1] = "x" (command line) must be a whole number.'),
        ("vqvae.ch_mult=3", "must be a list, for example [a, b]."),
        ("vqvae.codebook_update=emma", "must be one of gradient, ema. Did you mean ema?"),
        ("a..b=3", "'a..b=3' (command line): an override is written section.key=value"),
        ("training.max_steps", "an override is written section.key=value"),
        ("seed=[", "seed = '[' (command line): not YAML: expected the node content, but found"),
        ("phase=4", "phase = 4 (command line) must be 1, 2 or 3."),
        ("phase=null", "phase is missing: set 1"),
        ("phase=[1]", "phase = [1] (command line) must be 1, 2 or 3."),
        ("training=5", "training = 5 (command line) must be a section with keys under it."),
        ("training=[1]", "training = [1] (command line) must be a section with keys under it."),
        ("training=null", "training = null (command line) must be a section"),
        ("data.shapes=3", "data.shapes = 3 (command line) must be a section"),
        ("data={}", "data = {} (command line) must be a section"),
        ("seed.a=1", 'seed = {"a": 1} (command line) must be a whole number.'),
        ("data.max_step=3", "did you mean"),
        ("data.max_steps=3", "it belongs to another section: training.max_steps."),
        ("transformer.layers=3", "is not a setting of a run: it belongs to phase 1 and phase 3;"),
        ("vqvae.checkpoint=a", "it belongs to phase 1 and phase 3; remove it, or change `phase`."),
        ("loss.input_range=a", "in phase 1 and phase 3 it is vqvae.input_range; remove it, or"),
    ],
)
def test_one_mistake_is_told_with_value_place_and_way_out(override, text, tmp_path):
    problems = problems_of(VQVAE, tmp_path, override)
    assert len(problems) == 1, problems
    assert text in problems[0]


@pytest.mark.parametrize(
    "name", ["latent_cache", "vqvae.checkpoint", "vqvae.ddconfig", "text.encoder"]
)
def test_paths_of_a_transformer_run_are_not_empty(name, tmp_path):
    (problem,) = problems_of(TRANSFORMER, tmp_path, f"{name}=''")
    assert problem == f'{name} = "" (command line) must not be empty.'


def test_variables_with_one_underscore_are_refused(tmp_path):
    (problem,) = problems_of(VQVAE, tmp_path, LGPT_TRAINING_MAX_STEPS="3")
    assert "environment variable LGPT_TRAINING_MAX_STEPS" in problem
    assert "did you mean training.max_steps?" in problem
    assert "two underscores" in problem


def test_a_key_of_another_phase_is_no_misspelling(tmp_path):
    for key in ("vqvae.resolution=64", "vqvae.ch=32", "vqvae.codebook_update=ema", "loss={}"):
        (problem,) = problems_of(TRANSFORMER, tmp_path, key)
        assert problem.endswith(": it belongs to phase 2; remove it, or change `phase`."), problem
    (problem,) = problems_of(VQVAE, tmp_path, "text.encoder=random")
    assert "it belongs to phase 1 and phase 3; remove it" in problem


def test_what_is_missing_is_told_with_the_section_that_lacks_it(tmp_path):
    text = "extends: base\nphase: 2\nname: a\ntraining:\n  log_every: 5\n"
    (problem,) = problems_of(text, tmp_path)
    assert problem.startswith("training.max_steps is missing (section at run.yaml:5): ")


@pytest.mark.parametrize("text", ["training: 5", "training: [5]", "training: on"])
def test_a_value_where_a_section_belongs_is_one_problem(text, tmp_path):
    (problem,) = problems_of(f"phase: 2\nname: a\n{text}\n", tmp_path)
    assert "(run.yaml:3) must be a section with keys under it." in problem


@pytest.mark.parametrize("word", ["data=", "data=null", "data={}", "data=5"])
def test_a_section_cannot_be_emptied_on_the_command_line(word, tmp_path):
    text = VQVAE + "data: {resolution: 64}\n"
    (problem,) = problems_of(text, tmp_path, word)
    assert problem.endswith("must be a section with keys under it. Write data.key=value.")
    (problem,) = problems_of(text, tmp_path, "data.workers=1", LGPT_DATA=word.partition("=")[2])
    assert "(environment variable LGPT_DATA) must be a section" in problem


def test_a_value_under_which_a_later_file_writes_keys_is_refused(tmp_path):
    (tmp_path / "parent.yaml").write_text("data: 5\n")
    (problem,) = problems_of(f"extends: parent\n{VQVAE}data: {{workers: 1}}\n", tmp_path)
    assert problem.startswith("data = 5 (parent.yaml:1) must be a section")


def test_a_phase_that_is_wrong_or_missing_is_no_contradiction_too(tmp_path):
    source = "vqvae: {source: custom, checkpoint: v}\ntransformer: {layers: 2}\n"
    for phase in ("phase: 4", "phase: [1]", "phase: true", "seed: 1"):
        text = f"{phase}\nname: a\ntraining: {{max_steps: 5000}}\n{source}"
        (problem,) = problems_of(text, tmp_path)
        assert "1, 2 or 3" in problem or "phase is missing" in problem


def test_a_mapping_where_a_value_belongs_is_told_with_its_place(tmp_path):
    (problem,) = problems_of(VQVAE + "seed:\n  a: 1\n", tmp_path)
    assert problem == 'seed = {"a": 1} (run.yaml:6) must be a whole number.'


@pytest.mark.parametrize(
    ("base", "overrides", "texts"),
    [
        (VQVAE, ["data.dataset=folder"], ["needs data.source"]),
        (VQVAE, ["data.flip=true"], ["data.flip = true", "data.crops = 1 (default)"]),
        (VQVAE, ["data.dataset=shapes", "data.crops=2"], ["data.crops = 2", "set data.crops to 1"]),
        (VQVAE, ["data.resolution=100"], ["data.resolution = 100", "16", "use 96 or 112"]),
        (VQVAE, ["vqvae.attn_resolutions=[20]"], ["names 20", "256, 128, 64, 32, 16"]),
        (VQVAE, ["vqvae.ch_mult=[1,0,2]", "vqvae.attn_resolutions=[]"], ["at least 1"]),
        (
            VQVAE,
            ["vqvae.num_res_blocks=0"],
            ["num_res_blocks = 0", "ch_mult = [1, 1, 2, 2, 4]", "or ch_mult to [1, 1, 1, 1, 1]"],
        ),
        (TRANSFORMER, ["transformer.hidden=72"], ["72", "16", "use 64 or 80"]),
        (TRANSFORMER, ["transformer.hidden=96"], ["gives 6", "multiple of 64", "learned"]),
        (TRANSFORMER, ["transformer.attention=flash", "transformer.heads=256"], ["gives 4"]),
        (
            TRANSFORMER,
            ["transformer.attention=flash", "training.precision=fp32"],
            ["no float32 kernel"],
        ),
        (
            TRANSFORMER,
            ["blocks.checkpointing=selective", "blocks.checkpointed_by=deepspeed"],
            [
                'checkpointed_by = "deepspeed"',
                'checkpointing = "selective"',
                "set checkpointed_by to",
            ],
        ),
        (
            TRANSFORMER,
            ["blocks.checkpointing=selective", "blocks.compile=true"],
            ["compile = true", 'checkpointing = "selective"', "set compile to false"],
        ),
        (TRANSFORMER, ["sampling.prompts=[a,b]", "sampling.images=1"], ["has 2 entries"]),
        (TRANSFORMER, ["sampling.top_k=300", "vqvae.codebook_size=256"], ["at most", "256"]),
        (TRANSFORMER, ["vqvae.source=custom", "vqvae.checkpoint=a"], ["does not fit phase = 1"]),
        (TRANSFORMER, ["vqvae.source=pretrained_taming"], ["vqvae.checkpoint", "Flax"]),
        (TRANSFORMER, ["data.resolution=250", "vqvae.downsample_factor=16"], ["use 240 or 256"]),
        (
            TRANSFORMER,
            ["data.dataset=shapes", "data.flip=true", "data.crops=2"],
            ["captions", "left"],
        ),
        (TRANSFORMER, ["data.dataset=shapes", "data.crop_scale_min=0.5"], ["size and place"]),
        (
            VQVAE,
            ["training.early_stopping=3", "training.validate_every=0", "checkpoint.keep_best=1"],
            ["validations on the way", "training.early_stopping = 3"],
        ),
        (
            VQVAE,
            ["training.early_stopping=3", "training.validate_every=750", "checkpoint.keep_best=1"],
            ["checkpoint.every_steps = 500", "use 500 or 1000"],
        ),
        (
            VQVAE,
            ["training.early_stopping=3", "checkpoint.keep_best=0"],
            ["set checkpoint.keep_best to 1"],
        ),
        (VQVAE, ["data.streaming=true"], ["data.streaming = true", "phase = 2", "at random"]),
        (
            TRANSFORMER,
            ["data.streaming=true", "latent_cache=null"],
            ["without latent_cache", "lgpt prepare"],
        ),
    ],
)
def test_contradictions_name_both_settings(base, overrides, texts, tmp_path):
    problems = problems_of(base, tmp_path, *overrides)
    assert len(problems) == 1, problems
    for text in texts:
        assert text in problems[0]


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (VQVAE, ["data.shapes.train_images=3"]),
        (VQVAE, ["data.dataset=shapes", "data.source=a"]),
        (VQVAE, ["schedule.decay=constant", "schedule.final_ratio=0.5"]),
        (VQVAE, ["tracking.enabled=false", "tracking.uri=a"]),
        (VQVAE, ["vqvae.codebook_update=gradient", "vqvae.ema_decay=0.9"]),
        (VQVAE, ["vqvae.codebook_update=gradient", "vqvae.revive_dead_codes=false"]),
        (VQVAE, ["loss.codebook_weight=2"]),
        (VQVAE, ["loss.adversarial=none", "discriminator.layers=2"]),
        (VQVAE, ["loss.perceptual=none", "loss.perceptual_weight=2"]),
        (VQVAE, ["loss.perceptual=none", "metrics.lpips=none", "loss.vgg16_weights=a"]),
        (VQVAE, ["metrics.rfid=none", "metrics.inception_weights=a"]),
        (TRANSFORMER, ["conditioning=unconditional", "text.encoder=a"]),
        (TRANSFORMER, ["conditioning=unconditional", "transformer.cond_drop=0.2"]),
        (TRANSFORMER, ["conditioning=unconditional", "sampling.guidance=2"]),
        (TRANSFORMER, ["conditioning=unconditional", "sampling.guidance_schedule=linear"]),
        (TRANSFORMER, ["sampling.guidance_power=2.5"]),
        (TRANSFORMER, ["latent_cache=null", "text.cache_dtype=bfloat16"]),
        (TRANSFORMER, ["vqvae.ddconfig=model.yaml"]),
        (TRANSFORMER, ["data.dataset=shapes", "data.streaming=true"]),
        (VQVAE, ["data.dataset=shapes", "data.cache_folder=a"]),
        (TRANSFORMER, ["data.streaming=true", "data.cache_folder=a"]),
    ],
)
def test_a_setting_without_effect_is_an_error(base, overrides, tmp_path):
    (problem,) = problems_of(base, tmp_path, *overrides)
    assert problem.startswith(overrides[-1].split("=")[0] + " = ")
    assert "(command line) has no effect" in problem
    assert problem.endswith("remove it.")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["discriminator.start_step=5000"], r"start_step = 5000 .*less than .*max_steps.*1000"),
        (["discriminator.start_step=9"], r"warmup_steps = 1000 \(default\) must be at most .*= 9"),
        (["discriminator.start_step=2000", "data.resolution=16"], r"layers = 3 .*at least 24"),
    ],
)
def test_a_discriminator_that_cannot_work_is_refused(overrides, text, tmp_path):
    (problem,) = problems_of(VQVAE, tmp_path, "loss.adversarial=hinge", *overrides)
    assert re.search(text, problem), problem


def test_a_window_that_cannot_use_all_codes_is_refused(tmp_path):
    (problem,) = problems_of(VQVAE, tmp_path, "health.codebook_window_tokens=9999")
    wanted = r"window_tokens = 9999 .*at least vqvae.codebook_size = 16384 .*set it to 65536"
    assert re.search(wanted, problem), problem


def test_codes_that_nothing_would_move_are_refused(tmp_path):
    overrides = ["vqvae.codebook_update=gradient", "loss.codebook_weight=0"]
    (problem,) = problems_of(VQVAE, tmp_path, *overrides)
    wanted = r"codebook_weight = 0 .*where they began.*= \"gradient\" .*set it to 1.0, or"
    assert re.search(wanted, problem), problem


def test_health_is_of_phase_2_alone(tmp_path):
    (problem,) = problems_of(TRANSFORMER, tmp_path, "health.respond=false")
    assert "health" in problem
    assert "phase 2" in problem


def test_pictures_too_small_for_lpips_are_refused(tmp_path):
    small = ["data.resolution=8", "vqvae.resolution=8", "vqvae.ch_mult=[1]"]
    small += ["vqvae.attn_resolutions=[]", "loss.perceptual=lpips"]
    (problem,) = problems_of(VQVAE, tmp_path, *small)
    assert re.search(r"perceptual = .*lpips.*resolution = 8 .*16 or more", problem), problem


def test_problems_of_broken_values_do_not_repeat_as_contradictions(tmp_path):
    (problem,) = problems_of(TRANSFORMER, tmp_path, "transformer.heads=x", "transformer.hidden=72")
    assert "whole number" in problem


def test_values_that_nobody_wrote_contradict_no_deepspeed_config(tmp_path):
    owned = {"train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.5}
    ds_config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}, **owned}
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    words = ["batch.micro_batch_images=x", "optimizer.gradient_clipping=y", "training.precision=z"]
    problems = problems_of(VQVAE, tmp_path, *words, f"deepspeed={tmp_path}/ds.json")
    assert len(problems) == 3, problems


def test_problems_of_the_deepspeed_config_stand_beside_those_of_the_run(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_cliping": 1}')
    problems = problems_of(VQVAE, tmp_path, "seed=x", f"deepspeed={tmp_path}/ds.json")
    assert len(problems) == 2
    assert "gradient_cliping = 1 (ds.json)" in problems[1]
