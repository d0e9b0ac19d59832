"""A very small CLIP for tests: random weights, built by open_clip from a registered description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY = "dvla-fast-tiny-tower"

_TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
_VISION: dict[str, Any] = {
    "image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8,
}  # fmt: skip


def register_tiny_clip(folder: Path) -> str:
    """Tell open_clip of the small model (and of one with a ResNet tower); returns its name."""
    import open_clip

    if TINY not in open_clip.list_models():
        resnet = {**_VISION, "layers": [1, 1, 1, 1], "width": 8}
        for name, vision in ((TINY, _VISION), (f"{TINY}-resnet", resnet)):
            content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": _TEXT}
            (folder / f"{name}.json").write_text(json.dumps(content))
        open_clip.add_model_config(folder)
    return TINY
