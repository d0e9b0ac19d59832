"""Training beside a plain PyTorch loop over the same JPEG files, images and episodes per second.

    python -m benchmarks.training --image-size 84

The plain loop is what the field's scripts do: Pillow decodes every image anew, timm's transforms
augment it (in ``--workers`` processes; the best of 0 and 2 is reported), a CLIP text tower encodes
the episode's texts in every episode (``--texts clip``; random weights cost the same), attention and
policy are plain PyTorch, and ``.item()`` reads every figure of every step. Both train the same
network by the same recipe. First, both compute the loss of one batch without augmentation, and the
two must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import dvla_fast
from benchmarks.test_image_cache import photograph
from dvla_fast.data import EpisodeSampler, FewShotData, load_data, prepare_cache
from dvla_fast.engine import metatune, pretrain
from dvla_fast.engine.config import AugmentConfig, ExecutionConfig, MetatuneConfig, PretrainConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.gating import GateTraining
from dvla_fast.engine.memory import keep_freed_memory
from dvla_fast.engine.metatune_steps import Step
from dvla_fast.engine.models import build_pretrain_model
from dvla_fast.engine.state import TrainingState
from dvla_fast.nn import DVLA, TextTokens, build_backbone
from dvla_fast.rl import EMABaseline, ReinforceLoss, total_loss
from dvla_fast.semantics import EncodedTexts

CLASSES, PER_CLASS, PHRASES, TEXT_DIM = 16, 24, 6, 512
FEWEST, EPISODES = 3, (1, 4)  # timed steps of a row, and episodes of a step
EXECUTIONS = {
    "dvla_fast float32": ExecutionConfig(channels_last=True),
    "dvla_fast bfloat16": ExecutionConfig(precision="bfloat16", channels_last=True),
}
# Without the deviation of the magnitude: at 10, timm asks Pillow 12 for 0 bits, and it refuses.
RECIPE = PretrainConfig(
    epochs=1000, batch_size=32, views=2, lr=5e-4, mixup=0.3, cutmix=1.0, drop_path=0.5,
    quarter_turns=False,
    augment=AugmentConfig(
        crop=0.08, flip=True, rand_augment="rand-m9-inc1", random_erasing=0.25
    ),
)  # fmt: skip
NO_AUGMENTATION = PretrainConfig(quarter_turns=False, augment=AugmentConfig(), label_smoothing=0.0)


def make_photographs(folder: Path) -> None:
    """Base, validation and novel classes of 500 x 375 JPEG files."""
    rng = np.random.default_rng(0)
    for split, classes in (("train", CLASSES), ("val", 2), ("test", 2)):
        for number in range(classes):
            place = folder / split / f"{split} {number}"
            place.mkdir(parents=True)
            for image in range(PER_CLASS if split == "train" else 2):
                photograph(rng).save(place / f"{image:03}.jpg", quality=90)


def files_of(data: FewShotData, folder: Path) -> list[Path]:
    """The JPEG files in the order of the data set's base images."""
    names = data.base.class_names
    files = [sorted((folder / "train" / name).glob("*.jpg")) for name in names]
    return [file for group in files for file in group]


class Photographs(torch.utils.data.Dataset):
    """JPEG files, decoded and transformed one by one."""

    def __init__(self, files: list[Path], labels: list[int], transform: Callable) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def plain_transform(data: FewShotData, augmented: bool) -> Callable:
    """timm's training transform of the recipe; or resize and centre crop."""
    from timm.data import create_transform
    from torchvision import transforms

    mean, std = data.mean.tolist(), data.std.tolist()
    if augmented:
        return create_transform(
            data.image_size, is_training=True, auto_augment=RECIPE.augment.rand_augment,
            re_prob=RECIPE.augment.random_erasing, re_mode="pixel", mean=mean, std=std,
            interpolation="bilinear",
        )  # fmt: skip
    return transforms.Compose(
        [
            transforms.Resize(data.image_size),
            transforms.CenterCrop(data.image_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


class Setting:
    """Files, cache, texts and models that both sides share."""

    def __init__(self, folder: Path, image_size: int) -> None:
        make_photographs(folder / "photos")
        prepare_cache(folder / "photos", folder / "cache", image_size)
        self.data = load_data(str(folder / "cache"), image_size)
        self.files = files_of(self.data, folder / "photos")
        self.labels = self.data.base.labels.tolist()
        self.image_size = image_size
        self.spec = {"name": "visformer_tiny", "image_size": image_size}
        names = self.data.class_names
        tokens = torch.randn(len(names), PHRASES, TEXT_DIM)
        self.texts = EncodedTexts(
            names, F.normalize(tokens, dim=-1), torch.ones(len(names), PHRASES, dtype=torch.bool),
            torch.tensor([0] * (PHRASES - 1) + [1]), F.normalize(tokens.mean(1), dim=-1),
        )  # fmt: skip

    def dvla(self) -> DVLA:
        torch.manual_seed(0)
        return DVLA(build_backbone(**self.spec), text_dim=TEXT_DIM)


def plain_pretraining(setting: Setting, workers: int) -> Iterator[int]:
    """Take steps; yields the images of each."""
    from timm.data import Mixup

    data = setting.data
    photographs = Photographs(setting.files, setting.labels, plain_transform(data, True))
    torch.manual_seed(0)
    model = build_pretrain_model(setting.spec, CLASSES, RECIPE.drop_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE.lr, weight_decay=0.05)
    mixup = Mixup(RECIPE.mixup, RECIPE.cutmix, label_smoothing=0.1, num_classes=CLASSES)
    while True:
        loader = torch.utils.data.DataLoader(
            torch.utils.data.ConcatDataset([photographs] * RECIPE.views),
            RECIPE.batch_size * RECIPE.views, shuffle=True, num_workers=workers, drop_last=True,
        )  # fmt: skip
        for images, hard in loader:
            images, labels = mixup(images, hard)
            logits = model["head"](model["backbone"](images))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            (logits.argmax(1) == hard).float().mean().item()
            yield len(images)


def our_pretraining(setting: Setting, execution: ExecutionConfig) -> Iterator[int]:
    """Take steps of the engine; yields the images of each."""
    run = Execution(execution, Processes("cpu"))
    torch.manual_seed(0)
    model = build_pretrain_model(setting.spec, CLASSES, RECIPE.drop_path)
    run.prepare(model["backbone"])
    optimizer = adamw(model.parameters(), lr=RECIPE.lr, weight_decay=0.05)
    epoch = pretrain.Epoch(RECIPE, model, setting.data, optimizer, run, CLASSES)
    state = TrainingState(None, "pretrain", {}, {}, optimizer, np.random.default_rng(0))  # type: ignore[arg-type]
    while True:
        steps = state.step
        epoch(state)
        yield (state.step - steps) * RECIPE.batch_size * RECIPE.views


def text_tower(kind: str) -> Callable[[int], Tensor] | None:
    """What encodes n phrases anew: a CLIP ViT-B/16 text tower of random weights, or nothing."""
    if kind == "none":
        return None
    import open_clip

    model = open_clip.create_model("ViT-B-16", pretrained=None).eval()
    words = open_clip.get_tokenizer("ViT-B-16")(["a bird with a long curved red bill"])

    @torch.no_grad()
    def encode(count: int) -> Tensor:
        return F.normalize(model.encode_text(words.repeat(count, 1)), dim=-1)

    return encode


def plain_metatuning(setting: Setting, encode: Callable[[int], Tensor] | None) -> Iterator[int]:
    """One episode a step, everything from its files; yields 1."""
    data, texts, way = setting.data, setting.texts, 5
    photographs = Photographs(setting.files, setting.labels, plain_transform(data, False))
    model = setting.dvla()
    model.train()
    groups = metatune.parameter_groups(model, MetatuneConfig())
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    sampler = EpisodeSampler(data.base, way, 1, 15, 0)
    baseline, policy_loss = EMABaseline(len(model.gates)), ReinforceLoss()
    number = 0
    while True:
        batch = sampler.batch(number, 1)
        number += 1
        support, query = (
            torch.stack([photographs[i][0] for i in index[0].tolist()])[None]
            for index in (batch.support, batch.query)
        )
        text: TextTokens = texts.episodes(batch.classes)
        if encode is not None:
            text = text._replace(tokens=encode(way * PHRASES)[None])
        output = model(support, batch.support_labels, query, text, way=way)
        loss, figures = total_loss(output, batch.query_labels, text, policy_loss, baseline)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        for figure in (loss, *figures.values()):
            figure.tolist()
        yield 1


def our_metatuning(setting: Setting, execution: ExecutionConfig, episodes: int) -> Iterator[int]:
    """Steps of the engine; yields the episodes of each."""
    config = MetatuneConfig(episodes_per_step=episodes, freeze_norm=False)
    run = Execution(execution, Processes("cpu"))
    model = setting.dvla()
    run.prepare(model)
    model.train()
    gates = GateTraining(config, model)
    optimizer = adamw(metatune.parameter_groups(model, config, gates.baseline))
    step = Step(config, model, setting.data, setting.texts, optimizer, gates, run, 0)
    gates.begin_epoch()
    number = 0
    while True:
        step(number)
        number += 1
        yield episodes


def check(setting: Setting) -> float:
    """Both sides' loss of the same 16 images without augmentation; returns their difference.

    Raises:
        AssertionError: they differ by more than two resamplings of the same photograph do.
    """
    data = setting.data
    photographs = Photographs(setting.files, setting.labels, plain_transform(data, False))
    torch.manual_seed(0)
    model = build_pretrain_model(setting.spec, CLASSES)  # BatchNorm: statistics of the 16
    index = torch.arange(0, len(setting.files), len(setting.files) // 16)[:16]
    labels = data.base.labels[index]
    ours = data.normalise(data.base.gather(index))
    theirs = torch.stack([photographs[i][0] for i in index.tolist()])
    with torch.inference_mode():
        losses = [
            F.cross_entropy(model["head"](model["backbone"](x)), labels).item()
            for x in (ours, theirs)
        ]
    difference = abs(losses[0] - losses[1])
    assert difference < 0.05, f"the two sides see other images: losses {losses}"
    return difference


def rate(steps: Iterator[int], seconds: float, warm_up: int = 1) -> float:
    """Median images or episodes per second over ``seconds`` of steps."""
    for _ in range(warm_up):
        next(steps)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < FEWEST:
        start = time.perf_counter()
        count = next(steps)
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def measure(setting: Setting, stage: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of one stage by provider."""
    rates: dict[str, float] = {}
    if stage == "pretrain":
        for workers in (0, 2):
            # One step takes what the workers prepared in advance: several warm-up steps empty that.
            steps = plain_pretraining(setting, workers)
            rates[f"plain loop, {workers} workers"] = rate(
                steps, arguments.seconds, 1 + 2 * workers
            )
        for name, execution in EXECUTIONS.items():
            rates[name] = rate(our_pretraining(setting, execution), arguments.seconds)
        return rates
    encode = text_tower(arguments.texts)
    dvla_fast.set_backend("reference")
    try:
        rates["plain loop"] = rate(plain_metatuning(setting, encode), arguments.seconds)
        if encode is not None:
            kept = plain_metatuning(setting, None)
            rates["plain loop, texts kept"] = rate(kept, arguments.seconds)
    finally:
        dvla_fast.set_backend(None)
    for name, execution in EXECUTIONS.items():
        for episodes in EPISODES:
            steps = our_metatuning(setting, execution, episodes)
            rates[f"{name}, {episodes} a step"] = rate(steps, arguments.seconds)
    return rates


def main(given: list[str] | None = None) -> None:
    """Print one JSON line of settings and one per stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--texts", default="clip", choices=("clip", "none"))
    parser.add_argument(
        "--malloc", default="keeps", choices=("keeps", "returns"), help="what malloc does"
    )
    parser.add_argument("--stage", action="append", choices=("pretrain", "metatune"))
    arguments = parser.parse_args(given)
    if arguments.malloc == "keeps":  # both sides, as the commands do
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), arguments.image_size)
        difference = check(setting)
        print(json.dumps({**vars(arguments), "threads": torch.get_num_threads(),
                          "loss_difference": difference}), flush=True)  # fmt: skip
        for stage in arguments.stage or ("pretrain", "metatune"):
            rates = measure(setting, stage, arguments)
            slowest = max(value for name, value in rates.items() if name.startswith("plain loop,"
                          if stage == "pretrain" else "plain loop"))  # fmt: skip
            row: dict[str, Any] = {"stage": stage}
            for name, value in rates.items():
                row[name] = {"per_second": round(value, 2), "ratio": round(value / slowest, 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
