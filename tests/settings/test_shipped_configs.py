"""Every config that is shipped parses, resolves for its ranks, and says at its head what it is."""

from __future__ import annotations

import functools
import json
import re

import pytest

from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.deepspeed_file import shipped_deepspeed_configs
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.run import dump_run_settings, load_run_settings
from lgpt.settings.show import as_json_object, render
from lgpt.settings.sources import CONFIGS_FOLDER, shipped_configs

RUNS = [name for name in shipped_configs() if name != "base"]


def ranks_of(name: str) -> tuple[int, ...]:
    return (1, 2) if name.startswith("demo/") else (1, 2, 8)


@functools.cache
def loaded(name: str) -> RunSettings:
    return load_run_settings(name, environ={})


@pytest.mark.parametrize("name", RUNS)
def test_config_resolves_for_its_ranks(name):
    for ranks in ranks_of(name):
        for deepspeed in shipped_deepspeed_configs():
            run = loaded(name).model_copy(update={"deepspeed": deepspeed})
            config = resolve_deepspeed_config(run, ranks)
            micro = config["train_micro_batch_size_per_gpu"]
            steps = config["gradient_accumulation_steps"]
            assert micro * steps * ranks == run.batch.global_batch_images


@pytest.mark.parametrize("name", RUNS)
def test_config_head_tells_purpose_numbers_cost_and_command(name):
    text = (CONFIGS_FOLDER / f"{name}.yaml").read_text()
    head = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]
    assert f"--module lgpt train {name}\n" in head
    assert "# Numbers" in head
    assert re.search(r"[Cc]ost", head)
    run = loaded(name)
    if not isinstance(run, Phase2):
        assert f"--module lgpt prepare {name}\n" in head


def test_no_two_configs_share_a_run_or_a_cache():
    runs = [loaded(name) for name in RUNS]
    folders = [run.run_folder for run in runs]
    folders += [run.latent_cache for run in runs if not isinstance(run, Phase2)]
    assert len(set(folders)) == len(folders)


def test_phase_3_finds_the_vqvae_that_phase_2_trains():
    runs = {name: loaded(name) for name in RUNS}
    vqvaes = {str(run.run_folder): run for run in runs.values() if isinstance(run, Phase2)}
    for name, run in runs.items():
        if run.phase == 3:
            vqvae = vqvaes[run.vqvae.checkpoint]
            assert run.vqvae.codebook_size == vqvae.vqvae.codebook_size, name
            assert run.vqvae.downsample_factor == vqvae.vqvae.downsample_factor, name
            assert run.data.resolution == vqvae.data.resolution, name


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("phase1_pretrained", 256),
        ("phase1_pretrained_512", 1024),
        ("phase1_pretrained_512_f8", 4096),
        ("phase3_500m", 256),
        ("phase3_500m_f8", 1024),
        ("phase3_500m_512", 1024),
        ("phase3_500m_512_f8", 4096),
    ],
)
def test_token_grids(name, tokens):
    run = loaded(name)
    assert (run.data.resolution // run.vqvae.downsample_factor) ** 2 == tokens


def test_show_prints_a_config_that_loads_and_the_deepspeed_json(tmp_path):
    run = load_run_settings("demo/phase3_shapes", environ={})
    config = resolve_deepspeed_config(run, 2)
    text = render(run, config)
    yaml_part, json_part = text.split("# DeepSpeed config from zero3_bf16\n")
    path = tmp_path / "shown.yaml"
    path.write_text(yaml_part)
    assert load_run_settings(path, environ={}) == run
    assert json.loads(json_part) == config
    shown = as_json_object(run, config)
    assert shown["experiment"] == "latent-gpt-custom-vqvae"
    assert shown["deepspeed"] == config
    assert shown["run"]["transformer"]["layers"] == run.transformer.layers
    path.write_text(dump_run_settings(run))
