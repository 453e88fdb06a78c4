"""Layers of settings: which one wins, what a config file may say, and that a dump loads again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lgpt.core.errors import SettingsError
from lgpt.settings.phases import Phase1, Phase2, Phase3
from lgpt.settings.run import dump_run_settings, load_run_settings
from lgpt.settings.sources import find_config

PHASE2 = "phase: 2\nname: tiny\ntraining:\n  max_steps: 5000\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path, *overrides: str, **environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load_run_settings(path, overrides, environ)
    return caught.value.problems


def test_later_layers_win(tmp_path):
    write(tmp_path, "parent.yaml", "seed: 1\ndata:\n  resolution: 64\n  workers: 3\n")
    child = write(tmp_path, "child.yaml", f"extends: parent\n{PHASE2}data:\n  resolution: 128\n")
    assert load_run_settings(child, environ={}).data.workers == 3
    assert load_run_settings(child, environ={}).data.resolution == 128
    environ = {"LGPT_DATA__RESOLUTION": "256", "LGPT_SEED": "7", "PATH": "/bin"}
    run = load_run_settings(child, ["seed=9"], environ)
    assert (run.data.resolution, run.seed) == (256, 9)


def test_the_phase_decides_what_is_trained_and_where_it_is_tracked():
    expected = {
        "phase1_pretrained": (Phase1, "transformer", "latent-gpt-pretrained-vqvae", "zero2_bf16"),
        "phase2_vqvae": (Phase2, "vqvae", "vqvae-training", "zero2_bf16"),
        "phase3_500m": (Phase3, "transformer", "latent-gpt-custom-vqvae", "zero3_bf16"),
    }
    for name, (model, trains, experiment, deepspeed) in expected.items():
        run = load_run_settings(name, environ={})
        assert isinstance(run, model)
        assert (run.trains, run.experiment, run.deepspeed_config) == (trains, experiment, deepspeed)


def test_numbers_in_every_notation_of_yaml(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2 + "optimizer:\n  learning_rate: 3e-4\n")
    run = load_run_settings(path, ["optimizer.eps=1E-9", "name=2024-01-01"], {"LGPT_SEED": "1_000"})
    assert (run.optimizer.learning_rate, run.optimizer.eps, run.seed) == (3e-4, 1e-9, 1000)
    assert run.name == "2024-01-01"


def test_text_on_the_command_line_needs_no_quotes(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2)
    assert load_run_settings(path, ["name=123"], {}).name == "123"
    assert load_run_settings(path, ["data.source=true", "data.dataset=folder"], {}).data.source


TYPED = ["1e5", "007", "yes", "12:30", "1.50", "1_000", "0x10", "2026", "null_", ".5", "off"]


@pytest.mark.parametrize("text", TYPED)
def test_text_and_paths_are_what_was_typed_wherever_it_was(text, tmp_path):
    path = write(tmp_path, "a.yaml", f"{PHASE2}runs_folder: {text}\ndata: {{source: {text}}}\n")
    environ = {"LGPT_TRACKING__EXPERIMENT": text}
    run = load_run_settings(path, ["data.dataset=folder"], environ)
    assert run.runs_folder == Path(text)
    assert (run.data.source, run.tracking.experiment) == (text, text)
    if text[0].isalnum() and ":" not in text:
        assert load_run_settings(path, [f"name={text}", "data.dataset=folder"], {}).name == text
    assert load_run_settings(write(tmp_path, "b.yaml", dump_run_settings(run)), environ={}) == run


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["latent_cache=~/lc", "vqvae.checkpoint=~/v", "runs_folder=~/runs", "text.encoder=~/c"]
    run = load_run_settings("phase3_500m", words, {})
    assert (run.latent_cache, run.runs_folder) == (Path("/home/me/lc"), Path("/home/me/runs"))
    assert (run.vqvae.checkpoint, run.text.encoder) == ("/home/me/v", "/home/me/c")


def test_prompts_are_what_was_typed():
    run = load_run_settings("phase3_500m", ["sampling.prompts=[007, yes, 1e5, a cat]"], {})
    assert run.sampling.prompts == ("007", "yes", "1e5", "a cat")


def test_whole_numbers_are_read_as_people_write_them(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2)
    assert load_run_settings(path, ["training.max_steps=010000"], {}).training.max_steps == 10_000
    (problem,) = problems_of(path, "training.max_steps=10:00:00")
    assert problem == 'training.max_steps = "10:00:00" (command line) must be a whole number.'
    (problem,) = problems_of(path, "training.max_minutes=1:30.5")
    assert 'training.max_minutes = "1:30.5" (command line) must be a number.' in problem


def test_an_empty_section_is_the_default_one(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2 + "data:\nbatch: {}\n")
    assert load_run_settings(path, environ={}).batch.global_batch_images == 256


def test_an_empty_section_keeps_what_is_inherited(tmp_path):
    text = "extends: phase3_500m\nname: x\ndata:\n  # resolution: 512\nbatch: {}\n"
    run = load_run_settings(write(tmp_path, "a.yaml", text), environ={})
    shipped = load_run_settings("phase3_500m", environ={})
    assert run.data == shipped.data
    assert run.data.crops == 10
    assert run.batch == shipped.batch
    path = write(tmp_path, "b.yaml", PHASE2 + "data:\n  dataset: shapes\n  shapes:\n")
    assert load_run_settings(path, environ={}).data.shapes.val_images == 512


@pytest.mark.parametrize(
    "name", ["phase3_500m", "phase3_500m.yaml", "lgpt/configs/phase3_500m", "./demo/phase3_shapes"]
)
def test_shipped_configs_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).is_file()


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "phase3_500m.yaml", PHASE2)
    assert load_run_settings("phase3_500m.yaml", environ={}).name == "tiny"


def test_a_run_folder_is_a_config(tmp_path):
    run = load_run_settings("demo/phase3_shapes", environ={})
    write(tmp_path, "config.yaml", dump_run_settings(run))
    assert load_run_settings(tmp_path, environ={}) == run


def test_a_missing_config_names_the_nearest(tmp_path):
    with pytest.raises(SettingsError, match=r"'phase3_50m'.*did you mean phase3_500m\?"):
        load_run_settings("phase3_50m", environ={})
    path = write(tmp_path, "a.yaml", "\nextends: bas\n" + PHASE2)
    with pytest.raises(SettingsError, match=r"a\.yaml:2.*did you mean base\?"):
        load_run_settings(path, environ={})


def test_base_is_no_run():
    with pytest.raises(SettingsError) as caught:
        load_run_settings("bas", environ={})
    assert "configs demo/" in str(caught.value)
    assert "base" not in str(caught.value)


def test_a_file_may_be_called_like_the_shipped_one_it_extends(tmp_path, monkeypatch):
    path = write(tmp_path, "phase3_500m.yaml", "extends: phase3_500m\nname: mine\n")
    assert load_run_settings(path, environ={}).data.crops == 10
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "phase3_500m.yaml", "extends: phase3_500m.yaml\nname: mine\n")
    assert load_run_settings("phase3_500m.yaml", environ={}).data.crops == 10
    write(tmp_path, "own.yaml", "extends: own.yaml\n")
    with pytest.raises(SettingsError, match=r"own\.yaml:1\): no config file 'own\.yaml'"):
        load_run_settings("own.yaml", environ={})


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x" * 300 + "/config.yaml"])
def test_names_that_no_file_can_have_are_refused(name, tmp_path):
    with pytest.raises(SettingsError, match="no config file"):
        load_run_settings(name, environ={})
    with pytest.raises(SettingsError, match="no config file"):
        load_run_settings(write(tmp_path, "a.yaml", f'extends: "{name}"\n'.replace("\0", "\\0")))


def test_yaml_without_end_is_refused(tmp_path):
    deep = "[" * 20_000
    with pytest.raises(SettingsError, match=r"a\.yaml is nested too deeply"):
        load_run_settings(write(tmp_path, "a.yaml", f"name: {deep}"), environ={})
    (problem,) = problems_of(write(tmp_path, "a.yaml", PHASE2), f"seed={deep}")
    assert problem.endswith("(command line): not YAML: nested too deeply.")
    assert len(problem) < 200


def test_extends_in_a_circle_is_refused(tmp_path):
    a = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(SettingsError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_run_settings(a, environ={})


def test_a_key_written_twice_is_refused(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2 + "data:\n  resolution: 64\n  resolution: 128\n")
    (problem,) = problems_of(path)
    assert f"data.resolution is written twice ({path}:6 and :7)" in problem


def test_merge_keys_are_refused(tmp_path):
    text = PHASE2 + "data: &a\n  workers: 1\nbatch:\n  <<: *a\n"
    (problem,) = problems_of(write(tmp_path, "a.yaml", text))
    assert "batch.<<" in problem
    assert "a.yaml:8): YAML's merge keys are not read; write the keys out" in problem


def test_keys_that_are_no_words_are_refused(tmp_path):
    (problem,) = problems_of(write(tmp_path, "a.yaml", PHASE2 + "data:\n  ? [a, b]\n  : 3\n"))
    assert problem.endswith("a.yaml:6): a key must be one word.")
    with pytest.raises(SettingsError, match=r"a\.yaml:2 is not YAML: expected a single document"):
        load_run_settings(write(tmp_path, "a.yaml", "---\n" * 2 + PHASE2), environ={})


def test_broken_yaml_names_the_line(tmp_path):
    path = write(tmp_path, "a.yaml", "phase: 2\nname: [a\n")
    with pytest.raises(SettingsError, match=r"a\.yaml:\d+ is not YAML"):
        load_run_settings(path, environ={})
    with pytest.raises(SettingsError, match="section"):
        load_run_settings(write(tmp_path, "b.yaml", "- 1\n"), environ={})


def test_extends_is_for_files_only(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2)
    (problem,) = problems_of(path, "extends=base")
    assert "only a config file can say `extends`" in problem


def test_variables_that_are_no_settings_are_ignored(tmp_path):
    path = write(tmp_path, "a.yaml", PHASE2)
    load_run_settings(path, environ={"LGPT_REQUIRE_SLURM": "1", "LGPT_ALLOW_CUDA_TORCH": "1"})


def test_a_dump_loads_to_an_equal_run(tmp_path):
    for name, overrides in [
        ("phase1_pretrained", ["sampling.prompts=[a dog, 'yes: a cat']", "tracking.enabled=false"]),
        ("phase2_vqvae", ["vqvae.codebook_update=ema", "data.source=/somewhere"]),
        ("phase3_500m", ["conditioning=unconditional", "schedule.decay=constant"]),
    ]:
        run = load_run_settings(name, overrides, {})
        path = write(tmp_path, "dump.yaml", dump_run_settings(run))
        assert load_run_settings(path, environ={}) == run


def test_an_inherited_value_gives_way_to_a_later_switch():
    run = load_run_settings("phase3_500m", ["conditioning=unconditional"], {})
    assert isinstance(run, Phase3)
    assert run.transformer.cond_drop == 0.1  # the default: nothing of the text settings is left
    assert "encoder" not in dump_run_settings(run)


def test_what_an_inherited_switch_voided_holds_again_when_the_switch_goes():
    scratch = load_run_settings("phase2_finetune", ["init_from=null"], {})
    assert isinstance(scratch, Phase2)
    assert scratch.finetuning.trains == "all"
    assert scratch.vqvae.codebook_update == "gradient"  # as phase2_vqvae has it, not the default
    chosen = ["init_from=null", "vqvae.codebook_update=ema"]  # no mistake: nothing is frozen
    assert load_run_settings("phase2_finetune", chosen, {}).vqvae.codebook_update == "ema"
