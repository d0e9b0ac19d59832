"""Training by this library and by a plain PyTorch loop, step by step, over the same JPEG files.

The plain loop is what the field's scripts do: Pillow decodes every image anew, timm's transforms
augment it (in ``workers`` processes), a CLIP text tower encodes the episode's texts in every
episode, attention and policy are plain PyTorch (``backend="reference"``: attention in float32, the
policy in float64), and ``.item()`` reads every figure of every step.
Both train the same network by the same recipe. ``benchmarks.training`` times them on CPUs,
``test_training_gpu.py`` on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.test_image_cache import photograph
from dvla_fast.data import EpisodeSampler, FewShotData, prepare_cache
from dvla_fast.engine import metatune, pretrain
from dvla_fast.engine.build import build_data
from dvla_fast.engine.config import (
    AugmentConfig,
    DataConfig,
    ExecutionConfig,
    MetatuneConfig,
    PretrainConfig,
)
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.gating import GateTraining
from dvla_fast.engine.metatune_steps import Step
from dvla_fast.engine.models import build_pretrain_model
from dvla_fast.engine.state import TrainingState
from dvla_fast.nn import DVLA, TextTokens, build_backbone
from dvla_fast.rl import EMABaseline, ReinforceLoss, total_loss
from dvla_fast.semantics import EncodedTexts

CLASSES, PHRASES, TEXT_DIM, WAY = 16, 6, 512, 5
PART = 32  # images that a worker prepares at a time
# Without the deviation of the magnitude: at 10, timm asks Pillow 12 for 0 bits, and it refuses.
RECIPE = PretrainConfig(
    epochs=1000, batch_size=32, views=2, lr=5e-4, mixup=0.3, cutmix=1.0, drop_path=0.5,
    quarter_turns=False,
    augment=AugmentConfig(
        crop=0.08, flip=True, rand_augment="rand-m9-inc1", random_erasing=0.25
    ),
)  # fmt: skip


def make_photographs(folder: Path, per_class: int) -> None:
    """Base, validation and novel classes of 500 x 375 JPEG files."""
    rng = np.random.default_rng(0)
    for split, classes in (("train", CLASSES), ("val", 2), ("test", 2)):
        for number in range(classes):
            place = folder / split / f"{split} {number}"
            place.mkdir(parents=True)
            for image in range(per_class if split == "train" else 2):
                photograph(rng).save(place / f"{image:03}.jpg", quality=90)


def files_of(data: FewShotData, folder: Path) -> list[Path]:
    """The JPEG files in the order of the data set's base images."""
    names = data.base.class_names
    files = [sorted((folder / "train" / name).glob("*.jpg")) for name in names]
    return [file for group in files for file in group]


class Photographs(torch.utils.data.Dataset):
    """JPEG files, decoded one by one: views (V, 3, S, S) of an image, and its label."""

    def __init__(
        self, files: list[Path], labels: list[int], transform: Callable, views: int
    ) -> None:
        self.files, self.labels, self.transform, self.views = files, labels, transform, views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        views = torch.stack([self.transform(image) for _ in range(self.views)])
        return views, self.labels[index]


class Setting:
    """Files, cache, texts and models that both sides share.

    Args:
        folder: an empty one.
        image_size: in pixels.
        per_class: images of each base class.
        device: to train on.
        recipe: of pre-training.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        per_class: int = 24,
        device: str = "cpu",
        recipe: PretrainConfig = RECIPE,
    ) -> None:
        make_photographs(folder / "photos", per_class)
        prepare_cache(folder / "photos", folder / "cache", image_size)
        self.device, self.recipe, self.image_size = torch.device(device), recipe, image_size
        torch.backends.cudnn.benchmark = True  # of both sides
        config = DataConfig(dataset=str(folder / "cache"), image_size=image_size)
        self.data = build_data(config, self.device, training=True)
        self.files = files_of(self.data, folder / "photos")
        self.labels = self.data.base.labels.tolist()
        self.spec = {"name": "visformer_tiny", "image_size": image_size}
        names = self.data.class_names
        tokens = torch.randn(len(names), PHRASES, TEXT_DIM, device=self.device)
        self.texts = EncodedTexts(
            names, F.normalize(tokens, dim=-1), tokens.new_ones(tokens.shape[:2], dtype=torch.bool),
            torch.tensor([0] * (PHRASES - 1) + [1], device=self.device),
            F.normalize(tokens.mean(1), dim=-1),
        )  # fmt: skip

    def photographs(self, augmented: bool) -> Photographs:
        """For the plain loop: views by timm's training transform, or one as the cache has it."""
        from timm.data import create_transform
        from torchvision import transforms

        mean, std = self.data.mean.tolist(), self.data.std.tolist()
        if augmented:
            augment = self.recipe.augment
            transform = create_transform(
                self.image_size, is_training=True, auto_augment=augment.rand_augment,
                re_prob=augment.random_erasing, re_mode="pixel", mean=mean, std=std,
                interpolation="bilinear",
            )  # fmt: skip
        else:
            transform = transforms.Compose(
                [
                    transforms.Resize(
                        round(self.image_size * 256 / 224), transforms.InterpolationMode.BICUBIC
                    ),
                    transforms.CenterCrop(self.image_size),
                    transforms.ToTensor(),
                    transforms.Normalize(mean, std),
                ]
            )
        views = self.recipe.views if augmented else 1
        return Photographs(self.files, self.labels, transform, views)

    def loader(self, photographs: Photographs, workers: int, **batches: object) -> Iterator:
        """Batches of the plain loop, without end."""
        return iter(
            torch.utils.data.DataLoader(
                photographs,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                **batches,  # type: ignore[arg-type]
            )
        )

    def pretrain_model(self, drop_path: float = 0.0) -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        return build_pretrain_model(self.spec, CLASSES, drop_path).to(self.device)

    def dvla(self) -> DVLA:
        torch.manual_seed(0)
        return DVLA(build_backbone(**self.spec), text_dim=TEXT_DIM).to(self.device)


def _memory_format(half: bool) -> torch.memory_format:
    return torch.channels_last if half else torch.contiguous_format


def plain_pretraining(setting: Setting, workers: int, half: bool = False) -> Iterator[int]:
    """Take steps; yields the images of each.

    Args:
        half: bfloat16 and channels last.
    """
    from timm.data import Mixup

    recipe, device = setting.recipe, setting.device
    model = setting.pretrain_model(recipe.drop_path).to(memory_format=_memory_format(half)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.05)
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.1, num_classes=CLASSES)
    photographs = setting.photographs(augmented=True)
    drawn = torch.utils.data.RandomSampler(photographs, replacement=True, num_samples=10**9)
    size = min(PART, recipe.batch_size)
    parts = setting.loader(photographs, workers, sampler=drawn, batch_size=size)
    while True:
        taken = zip(*itertools.islice(parts, recipe.batch_size // size))
        images, hard = (
            torch.cat([part.to(device, non_blocking=True) for part in column]) for column in taken
        )
        images, hard = images.flatten(0, 1), hard.repeat_interleave(recipe.views)
        images, labels = mixup(images, hard)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            inputs = images.contiguous(memory_format=_memory_format(half))
            logits = model["head"](model["backbone"](inputs))
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        (logits.argmax(1) == hard).float().mean().item()
        yield len(images)


def our_pretraining(
    setting: Setting, execution: ExecutionConfig, images: int | None = None
) -> Iterator[int]:
    """Take epochs of the engine; yields the images of each, views counted.

    Args:
        images: epochs of so many images, as long as real ones; None: of those there are.
    """
    run = Execution(execution, Processes(setting.device.type))
    recipe, data = setting.recipe, setting.data
    if images is not None:
        base = data.base.subset(torch.arange(images) % len(data.base), data.base.name)
        data = dataclasses.replace(data, base=base)
    model = setting.pretrain_model(recipe.drop_path)
    run.prepare(model["backbone"])
    optimizer = adamw(model.parameters(), lr=recipe.lr, weight_decay=0.05)
    epoch = pretrain.Epoch(recipe, model, data, optimizer, run, CLASSES)
    state = TrainingState(None, "pretrain", {}, {}, optimizer, np.random.default_rng(0))  # type: ignore[arg-type]
    while True:
        steps = state.step
        epoch(state)
        yield (state.step - steps) * recipe.batch_size * recipe.views


def text_tower(
    kind: str, device: torch.device, half: bool = False
) -> Callable[[int], Tensor] | None:
    """What encodes n phrases anew: a text tower as large as CLIP ViT-B/16's, or nothing.

    Args:
        half: in bfloat16.
    """
    if kind == "none":
        return None
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = {"hidden_size": 512, "intermediate_size": 2048, "projection_dim": TEXT_DIM}
    config = CLIPTextConfig(**size, num_hidden_layers=12, num_attention_heads=8)
    dtype = torch.bfloat16 if half else torch.float32
    model = CLIPTextModelWithProjection(config).eval().to(device, dtype)
    words = torch.randint(0, 40000, (1, 77), device=device)  # padded to CLIP's length, as CLIP does

    @torch.no_grad()
    def encode(count: int) -> Tensor:
        return F.normalize(model(words.expand(count, -1)).text_embeds.float(), dim=-1)

    return encode


def plain_metatuning(
    setting: Setting,
    encode: Callable[[int], Tensor] | None,
    workers: int = 0,
    half: bool = False,
) -> Iterator[int]:
    """One episode a step, everything from its files; yields 1.

    Args:
        encode: encodes the texts of every episode; None: they were encoded once.
        workers, half: as for ``plain_pretraining``.
    """
    data, texts, device = setting.data, setting.texts, setting.device
    model = setting.dvla().to(memory_format=_memory_format(half)).train()
    groups = metatune.parameter_groups(model, MetatuneConfig())
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    sampler = EpisodeSampler(data.base, WAY, 1, 15, 0)
    baseline, policy_loss = EMABaseline(len(model.gates)).to(device), ReinforceLoss()
    episodes = (sampler.batch(number, 1) for number in itertools.count())
    wanted, later = itertools.tee(episodes)
    index = (torch.cat([episode.support[0], episode.query[0]]).tolist() for episode in wanted)
    photographs = setting.photographs(augmented=False)
    options = {"prefetch_factor": 1} if workers else {}
    for episode, (views, _) in zip(
        later, setting.loader(photographs, workers, batch_sampler=index, **options)
    ):
        images = views[:, 0].to(device, non_blocking=True)
        images = images.contiguous(memory_format=_memory_format(half))
        support_labels, query_labels, classes = (
            part.to(device)
            for part in (episode.support_labels, episode.query_labels, episode.classes)
        )
        text: TextTokens = texts.episodes(classes)
        if encode is not None:
            text = text._replace(tokens=encode(WAY * PHRASES)[None])
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            support, query = images[None, :WAY], images[None, WAY:]
            output = model(support, support_labels, query, text, way=WAY)
            loss, figures = total_loss(output, query_labels, text, policy_loss, baseline)
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
    run = Execution(execution, Processes(setting.device.type))
    model = setting.dvla()
    run.prepare(model)
    model.train()
    gates = GateTraining(config, model)
    optimizer = adamw(metatune.parameter_groups(model, config, gates.baseline))
    step = Step(config, model, setting.data, setting.texts, optimizer, gates, run, 0)
    gates.begin_epoch()
    for number in itertools.count():
        step(number)
        yield episodes


def check(setting: Setting) -> float:
    """Both sides' loss of the same 16 images without augmentation; returns their difference.

    Raises:
        AssertionError: they see other images, or compute another loss of them.
    """
    data = setting.data
    photographs = setting.photographs(augmented=False)
    model = setting.pretrain_model()  # BatchNorm: statistics of the 16
    index = torch.arange(0, len(setting.files), len(setting.files) // 16)[:16]
    labels = data.base.labels[index.to(setting.device)]
    ours = data.normalise(data.base.gather(index))
    theirs = torch.cat([photographs[i][0] for i in index.tolist()]).to(setting.device)
    assert (ours - theirs).abs().mean() < 0.02, "the two sides see other images"
    with torch.inference_mode():
        losses = [
            F.cross_entropy(model["head"](model["backbone"](x)), labels).item()
            for x in (ours, theirs)
        ]
    difference = abs(losses[0] - losses[1])
    assert difference < 0.01, f"the two sides compute other losses: {losses}"
    return difference
