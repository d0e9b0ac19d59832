"""Build backend: setuptools, plus a torch for the build where the target environment has none.

The extension must be compiled against the very torch it will run with. pip builds in an isolated
environment, so the target environment is looked up by its site-packages folder.
"""

from __future__ import annotations

from importlib.machinery import PathFinder

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks not overridden below)
from target import site_packages

# Without build isolation nothing compares this with pyproject.toml, and older releases call its
# license invalid.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old to build dvla-fast: "
        "pip install --upgrade 'setuptools>=77'"
    )


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    """The requirement of pyproject.toml, so that build and run time resolve to one release."""
    return [] if PathFinder.find_spec("torch", site_packages()) else ["torch>=2.11", "numpy"]
