"""A hub on this machine, and the real clients turned to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from gptlab.data import hub as module
from tests.stand_ins.hub_server import Server, hub_server


@pytest.fixture
def hub(tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub, and the real clients of this process turned to it: they read their environment only when they are imported."""
    with hub_server() as made:
        constants, config = huggingface_hub.constants, datasets.config
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for target, values in (
            (constants, {"ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}"}),
            (constants, {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_TOKEN_PATH": str(tmp_path / "token")}),
            (config, {"HF_ENDPOINT": made.url, "HUB_DATASETS_URL": made.url + "/datasets/{repo_id}/resolve/{revision}/{path}"}),
            (config, {"HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": tmp_path / "datasets", "STREAMING_READ_RETRY_INTERVAL": 0}),
            (module, {"ASK_WAITS": (0.0, 0.0), "READ_WAITS": (0.0, 0.0, 0.0)}),
        ):
            for name, value in values.items():
                monkeypatch.setattr(target, name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time", _Hurried())
        forget_hub()
        yield made
    forget_hub()


class _Hurried:
    """The module `time`, whose sleep takes none: the client's waits between tries are long."""

    def __getattr__(self, name: str) -> Any:
        return (lambda seconds: None) if name == "sleep" else getattr(time, name)


def forget_hub() -> None:
    """Let the clients keep nothing of an earlier test."""
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
