"""A discriminator that comes or goes between a save and the start that finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from lgpt.checkpoint.manifest import Manifest
from lgpt.core.errors import SettingsError
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import dump_run_settings, load_run_settings
from lgpt.training.resume import decide_resume


def run_with(folder: Path, adversarial: str) -> RunSettings:
    player = {"start_step": 2, "warmup_steps": 1, "layers": 1}
    changes = {} if adversarial == "none" else {"discriminator": player}
    config = tiny.vqvae_run(folder, 8, loss={"adversarial": adversarial}, **changes)
    return load_run_settings(tiny.write(folder / f"{adversarial}.yaml", config), environ={})


@pytest.mark.parametrize(
    ("then", "now", "texts"),
    [
        ("none", "hinge", ["step_4 holds no discriminator", "whose discriminator begins anew"]),
        ("hinge", "none", ["was trained with hinge", "leaves the discriminator behind"]),
    ],
)
def test_it_is_refused_with_both_ways_out_before_anything_is_built(tmp_path, then, now, texts):
    folder = tmp_path / "step_4"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_run_settings(run_with(tmp_path, then)))
    Manifest(4, 1, {}, {}, {}, {}).write(folder)
    with pytest.raises(SettingsError) as caught:
        decide_resume(run_with(tmp_path, now), folder)
    told = str(caught.value)
    for text in [*texts, f"set it back to {then}", f"init_from={folder}"]:
        assert text in told
    assert decide_resume(run_with(tmp_path, then), folder).choice == "config"
