"""Evaluation with each image computed once, beside the loop that computes every episode afresh.

    python -m benchmarks.evaluation --backbone visformer_tiny --image-size 84 --images 2400

Both run the same model on the same episodes of random images, and their predictions are compared
first. The slow loop runs ``--slow`` episodes, and their median is multiplied up to ``--episodes``:
an episode costs it the same whichever it is. The fast path runs whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from dvla_fast.data import EpisodeSampler, FewShotData, ImageSet
from dvla_fast.engine.predict import LEARNED, VISUAL, EpisodePredictor, Predictions
from dvla_fast.nn import DVLA, build_backbone
from dvla_fast.semantics import EncodedTexts

CLASSES, WAY, QUERY, TEXT_DIM, PHRASES = 20, 5, 15, 512, 9
FIXED_ALPHA = 0.5
# (text scope, alpha scope): what decides how much of an image is independent of its episode
CASES = (("class", "image"), ("class", "episode"), ("episode", "episode"))


def make_data(images: int, image_size: int, channels: int = 3) -> tuple[FewShotData, EncodedTexts]:
    """Random images and texts of 20 classes: what is in them changes no running time."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, channels, image_size, image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    names = tuple(f"class {index}" for index in range(CLASSES))
    novel = ImageSet("random/novel", pixels, torch.arange(images) % CLASSES, names)
    few = novel.subset(torch.arange(2), "random/base")
    half = torch.full((channels,), 0.5)
    data = FewShotData("random", few, few, novel, "two images", half, half)
    tokens = torch.randn(CLASSES, PHRASES, TEXT_DIM, generator=generator)
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    levels = torch.tensor([0] * (PHRASES - 1) + [1])
    mask = torch.ones(CLASSES, PHRASES, dtype=torch.bool)
    return data, EncodedTexts(names, tokens, mask, levels, tokens.mean(1))


def make_model(backbone: str, image_size: int, text_scope: str, alpha_scope: str) -> DVLA:
    """A random model whose policy has left its starting point, so that its state matters."""
    torch.manual_seed(0)
    options = {} if backbone == "visformer_tiny" else {"in_channels": 3}
    network = build_backbone(backbone, image_size=image_size, **options)
    model = DVLA(network, text_scope=text_scope, alpha_scope=alpha_scope, text_dim=TEXT_DIM)
    for gate in model.gates:
        for parameter in gate.policy.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.inference_mode()
def predict_afresh(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    split: str,
    sampler: EpisodeSampler,
    episodes: int,
    alpha: float | None = None,
) -> Predictions:
    """The plain loop: one episode at a time, all of its images through the whole model."""
    images = data.split(split)
    names = {name: index for index, name in enumerate(data.class_names)}
    positions = torch.tensor([names[name] for name in images.class_names])
    logits, labels, alphas = [], [], []
    for number in range(episodes):
        batch = sampler.batch(number, 1)
        output = model(
            data.normalise(images.images[batch.support]),
            batch.support_labels,
            data.normalise(images.images[batch.query]),
            texts.episodes(positions[batch.classes]),
            way=sampler.way,
            alpha=alpha,
            sample=False,
        )
        logits.append(output.logits)
        labels.append(batch.query_labels)
        alphas.append(
            torch.stack([trace.alpha.reshape(1, -1).mean(1) for trace in output.layers], 1)
        )
    return Predictions(torch.cat(logits), torch.cat(labels), torch.cat(alphas))


def check(fast: Predictions, slow: Predictions) -> float:
    """Require equal predictions and accuracies; return the largest difference of logits."""
    count = len(slow.logits)
    difference = (fast.logits[:count] - slow.logits).abs().max().item()
    if not torch.equal(fast.predicted[:count], slow.predicted):
        raise AssertionError("predictions differ")
    if not torch.equal(fast.accuracies[:count], slow.accuracies):
        raise AssertionError("accuracies differ")
    torch.testing.assert_close(fast.logits[:count], slow.logits, rtol=1e-4, atol=1e-4)
    return difference


def measure(arguments: argparse.Namespace, text_scope: str, alpha_scope: str) -> dict[str, Any]:
    """Time the learned gate alone on a first and on a next list of episodes."""
    data, texts = make_data(arguments.images, arguments.image_size)
    model = make_model(arguments.backbone, arguments.image_size, text_scope, alpha_scope)
    samplers = [EpisodeSampler(data.novel, WAY, arguments.shot, QUERY, s) for s in (0, 1)]
    slow = predict_afresh(model, data, texts, "novel", samplers[0], arguments.slow)
    episode = slow_episode(model, data, texts, arguments, arguments.shot, None)
    predictor = EpisodePredictor(model, data, texts, "novel")
    seconds = []
    for sampler in samplers:
        start = time.perf_counter()
        fast = predictor.predict(sampler, arguments.episodes)[LEARNED]
        seconds.append(time.perf_counter() - start)
        if sampler is samplers[0]:
            difference = check(fast, slow)
    everything = episode * arguments.episodes
    return {
        "text_scope": text_scope,
        "alpha_scope": alpha_scope,
        "plan": predictor.plans[LEARNED],
        "largest_logit_difference": difference,
        "spread_of_logits": slow.logits.std().item(),
        "slow_episode_s": round(episode, 4),
        "slow_all_s": round(everything, 1),
        "fast_first_list_s": round(seconds[0], 2),
        "fast_next_list_s": round(seconds[1], 3),
        "ratio_first_list": round(everything / seconds[0], 1),
        "ratio_next_list": round(everything / seconds[1], 1),
    }


def measure_command(
    arguments: argparse.Namespace, text_scope: str, alpha_scope: str
) -> dict[str, Any]:
    """Time what `dvla-fast evaluate` does by default: three methods, 1-shot and 5-shot."""
    data, texts = make_data(arguments.images, arguments.image_size)
    model = make_model(arguments.backbone, arguments.image_size, text_scope, alpha_scope)
    everything = 0.0
    for shot in (1, 5):
        for alpha in (None, FIXED_ALPHA, VISUAL):
            everything += slow_episode(model, data, texts, arguments, shot, alpha)
    everything *= arguments.episodes
    start = time.perf_counter()
    predictor = EpisodePredictor(model, data, texts, "novel", fixed_alpha=FIXED_ALPHA, visual=True)
    for shot in (1, 5):
        sampler = EpisodeSampler(data.novel, WAY, shot, QUERY, 0)
        predictor.predict(sampler, arguments.episodes)
        predictor.visual(sampler, arguments.episodes)
    fast = time.perf_counter() - start
    return {
        "text_scope": text_scope,
        "alpha_scope": alpha_scope,
        "command": "three methods, 1-shot and 5-shot",
        "slow_all_s": round(everything, 1),
        "fast_s": round(fast, 2),
        "ratio": round(everything / fast, 1),
    }


def slow_episode(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    arguments: argparse.Namespace,
    shot: int,
    alpha: float | str | None,
) -> float:
    """Median seconds of one episode of the plain loop, over as many lists."""
    seconds = []
    for seed in range(arguments.slow):
        sampler = EpisodeSampler(data.novel, WAY, shot, QUERY, seed)
        sampler.batch(0, 1)  # draws its whole block of episodes: not the loop's cost
        start = time.perf_counter()
        if isinstance(alpha, str):
            visual_afresh(model, data, sampler)
        else:
            predict_afresh(model, data, texts, "novel", sampler, 1, alpha)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.inference_mode()
def visual_afresh(model: DVLA, data: FewShotData, sampler: EpisodeSampler) -> None:
    """One episode of the visual classifier, all of its images through the backbone."""
    batch = sampler.batch(0, 1)
    support, query = (
        data.normalise(data.novel.images[index]) for index in (batch.support, batch.query)
    )
    model(support, batch.support_labels, query, way=sampler.way)


def main() -> None:
    """Print one JSON line of settings and one per case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="visformer_tiny", choices=("small", "visformer_tiny"))
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--images", type=int, default=12000, help="images of the 20 classes")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--slow", type=int, default=5, help="episodes that the slow loop runs")
    parser.add_argument("--case", type=int, action="append", help="0, 1 or 2; default: all")
    parser.add_argument(
        "--command", action="store_true", help="all that `dvla-fast evaluate` does by default"
    )
    arguments = parser.parse_args()
    print(json.dumps({**vars(arguments), "threads": torch.get_num_threads()}))
    for index in arguments.case or range(len(CASES)):
        timed = measure_command if arguments.command else measure
        print(json.dumps(timed(arguments, *CASES[index])), flush=True)


if __name__ == "__main__":
    main()
