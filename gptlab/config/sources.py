"""Where recipes and experiments lie, and the small Hydra plugins that make experiment files the group `experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

_PACKAGE = Path(__file__).resolve().parent.parent


def config_dir() -> Path:
    """The folder of recipes: beside the modules in a wheel, beside the package in a checkout."""
    return _shipped("conf")


def experiment_dirs() -> list[Path]:
    """Folders searched for `experiment=NAME`: the shipped one, then ./experiments."""
    found = [_shipped("experiments"), Path.cwd() / "experiments"]
    return list(dict.fromkeys(p.resolve() for p in found if p.is_dir()))


def _shipped(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


class ExperimentSource(FileConfigSource):  # type: ignore[misc]
    """Makes a folder of YAML files the group `experiment`, each file composed at the root of the config."""

    @staticmethod
    def scheme() -> str:
        return "experiments"

    def _inside(self, config_path: str) -> str | None:
        head, _, rest = config_path.partition("/")
        return rest if head == "experiment" else None

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(self._inside(config_path) or config_path)
        result.header["package"] = "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "experiment")

    def is_config(self, config_path: str) -> bool:
        name = self._inside(config_path)
        return bool(name) and super().is_config(cast(str, name))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return ["experiment"] if results_filter in (None, ObjectType.GROUP) else []
        if config_path != "experiment":
            return []
        names = [] if results_filter == ObjectType.GROUP else [p.stem for p in Path(self.path).glob("*.yaml")]
        return sorted(names)


class ExperimentSearchPath(SearchPathPlugin):  # type: ignore[misc]
    """Adds the experiment folders to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in experiment_dirs():
            search_path.append("gptlab", f"experiments://{folder}")
