"""Pictures and captions -> records of latents and text features, once per data set."""

from __future__ import annotations

import pathlib

from scaling_ldm import config


def run(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Encodes the data set of an experiment; nothing happens when that is done.

    Raises:
      ConfigError: pictures or networks that are not there or do not fit.
    """
    raise config.ConfigError("nothing encodes yet")
