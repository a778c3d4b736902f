"""The command line of training, as the engine's tests drive it."""

from ..engine.conftest import config_file, data_root, door  # noqa: F401
