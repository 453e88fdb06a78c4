"""What `lgpt config show` prints: the run config and the DeepSpeed config as they will be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from lgpt.settings.phases import RunSettings
from lgpt.settings.run import dump_run_settings


def render(run: RunSettings, ds_config: Mapping[str, Any]) -> str:
    """Both configs, each under a comment line that names it; the first part is a config file."""
    tracked = run.tracking.experiment or run.experiment
    return "\n".join(
        [
            f"# {run.name}: phase {run.phase} trains the {run.trains}, MLflow experiment {tracked}",
            dump_run_settings(run).rstrip(),
            "",
            f"# DeepSpeed config from {run.deepspeed_config}",
            json.dumps(ds_config, indent=2),
        ]
    )


def as_json_object(run: RunSettings, ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as one JSON object: `run` holds what `dump_run_settings` writes."""
    return {
        "run": yaml.safe_load(dump_run_settings(run)),
        "deepspeed": dict(ds_config),
        "experiment": run.tracking.experiment or run.experiment,
        "run_folder": str(run.run_folder),
    }
