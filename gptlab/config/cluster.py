"""Hydra's launcher for a SLURM cluster, as a run of ours wants it."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

TARGET = "SlurmLauncher"  # how the launcher's _target_ ends
MOST_SESSIONS = 1000  # of one run


def store_cluster(store: ConfigStore) -> None:
    """`hydra/launcher=submitit_slurm`, where the plugin is installed: a run that is longer than its session goes back into the queue.

    The plugin's own default puts no job back whose time was up, since it cannot know that the program resumes from a checkpoint.
    """
    try:
        from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf  # type: ignore[import-untyped]
    except ImportError:
        return
    store.store(group="hydra/launcher", name="submitit_slurm", node=SlurmQueueConf(max_num_timeout=MOST_SESSIONS), provider="gptlab")
