"""The command in this process."""

from tests.cli.conftest import gptlab as gptlab
