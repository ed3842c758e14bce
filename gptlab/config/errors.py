"""Errors a user can cause: each is one sentence, and each class carries its process exit code."""

from __future__ import annotations


class GptlabError(Exception):
    """A failure with a sentence for the user. Exit code 1 unless a subclass says otherwise."""

    code: int = 1
    everywhere: bool = False  # of several ranks each comes to it, and the first tells it


class ConfigError(GptlabError):
    """A setting, option or argument is wrong."""

    code = 2
    everywhere = True


class DataError(GptlabError):
    """A corpus, shard or manifest is missing, damaged or does not match."""

    code = 3


class DivergedError(GptlabError):
    """The loss or the gradient is no longer finite."""

    code = 4
    everywhere = True


class CheckpointError(GptlabError):
    """No usable checkpoint."""

    code = 5


class IOFailure(GptlabError):
    """The disk or the network failed."""

    code = 74


class Stopped(GptlabError):
    """A signal ended the run after it had saved a checkpoint."""

    code = 75
    everywhere = True


class Pruned(Stopped):
    """A search gave the run up before its end; its checkpoint is kept, and the search goes on."""

    code = 0


class OutOfMemory(GptlabError):
    """The device's, or this process's, memory is used up."""
