"""A run config with typing errors of any kind is a config or a SettingsError, never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

from lgpt.core.errors import LgptError
from lgpt.settings.run import load_run_settings

CONFIG = Path(__file__).parents[2] / "lgpt" / "configs" / "demo" / "phase3_shapes.yaml"
SPLICES = (b"\xff", b"&a ", b"*a", b"!!", b"[{", b": ", b"\t", b"9" * 30, b"<<: ", b"\n- ", b"'")


def test_mutated_run_configs_give_settings_or_our_own_error(tmp_path: Path) -> None:
    random_, whole = random.Random(0), CONFIG.read_bytes()
    path, refused = tmp_path / "run.yaml", 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 3)):
            place = random_.randrange(len(data))
            data[place : place + random_.randint(0, 12)] = random_.choice(SPLICES)
        path.write_bytes(bytes(data))
        try:
            load_run_settings(path, [], {})
        except LgptError:
            refused += 1
    assert refused > 250
