"""The held-out text of a run's own, as long as it is what the run was trained beside."""

from __future__ import annotations

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import component_of
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.runner.load import Loaded


def own_text(loaded: Loaded) -> tuple[Prepared, str]:
    """The prepared data of a run, and the name of its held-out set (of a mix, its first source's). Raises DataError: why there is none."""
    data = loaded.config.data
    if loaded.run is None or component_of(data.corpus).name == "none":
        raise DataError("it was not trained here")
    try:
        prepared = prepare(data)
    except (ConfigError, DataError, IOFailure) as error:
        raise DataError(f"its text is not here: {error}") from error
    written = (loaded.run.read("data.json") or {}).get("hash")
    if written is not None and written != prepared.hash:
        raise DataError("its text has changed since it was trained")
    return prepared, next(n for n in prepared.validation_names if n != "val" or not prepared.parts)
