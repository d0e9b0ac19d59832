"""Where the environment being installed into keeps its packages, seen from an isolated build."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path


def site_packages() -> list[str]:
    """site-packages of the target, best guess first; the running interpreter's own path last.

    pip runs the build with the target's interpreter, so ``purelib`` is the target's. uv runs it in
    an environment of its own, but leaves ``VIRTUAL_ENV`` naming the active one.
    """
    found = [sysconfig.get_paths()["purelib"]]
    if environment := os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found.append(str(Path(environment) / "lib" / version / "site-packages"))
    return [*found, *sys.path]
