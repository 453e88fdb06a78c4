"""No flag that is declared and never read."""

from __future__ import annotations

import re
from pathlib import Path

import lgpt
from lgpt.settings.explain import fields_of
from lgpt.settings.phases import Phase1, Phase2, Phase3

PACKAGE = Path(lgpt.__file__).parent
# Read by the resolver, which writes them into the DeepSpeed config, or by methods of settings.
READ_IN_SETTINGS = {
    ("batch", "global_batch_images"),
    ("batch", "micro_batch_images"),
    ("optimizer", "gradient_clipping"),
    ("runs_folder",),
    ("deepspeed",),
    ("conditioning",),
}
# Handed over whole, with model_dump: VQVAEConfig and LatentGPTConfig have fields of the same names.
HANDED_OVER_WHOLE = ("vqvae", "transformer")


def test_every_setting_is_read_outside_the_settings():
    code = "\n".join(
        file.read_text()
        for file in PACKAGE.rglob("*.py")
        if "settings" not in file.relative_to(PACKAGE).parts
    )
    unused = set()
    for model in (Phase1, Phase2, Phase3):
        for path, _ in fields_of(model):
            if path in READ_IN_SETTINGS:
                continue
            attribute = rf"\.{path[-1]}\b"
            if path[0] in HANDED_OVER_WHOLE:
                attribute = rf"(config|c|settings|vqvae|transformer)\.{path[-1]}\b"
            if not re.search(attribute, code):
                unused.add(".".join(path))
    assert not unused
