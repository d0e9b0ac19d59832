"""What training, evaluation and ablation are told: one dataclass per concern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dvla_fast.engine.settings import about, accepted_by, one_of, option, repeated
from dvla_fast.engine.text_options import TextOptions

# What data sets call their splits, and what they are called here: "monitor" selects checkpoints,
# and is a held-out share of the base classes' images where a data set has no val.
SPLIT_NAMES = {"test": "novel", "val": "monitor", "train": "base"}
LARGEST_SEED = 2**63 - 1  # torch takes twice as much: there is room for --seed + 1 and so on


def _unknown_split(name: str) -> str:
    """Say that a split does not exist."""
    if name in SPLIT_NAMES or name in SPLIT_NAMES.values():
        return ""
    known = ", ".join(f"{ours} (or {theirs})" for theirs, ours in SPLIT_NAMES.items())
    return f"{name!r} is unknown; choose one of {known}"


@dataclass
class DataConfig:
    """Which images."""

    dataset: str = option(
        "digits",
        "'digits', 'shapes', 'shapes-varied', the folder of a data set, or a cache made by "
        "'dvla-fast data prepare'",
    )
    splits: str = option(
        "", "published split list, or a JSON file; empty: as the folders say, or the one that fits"
    )
    image_size: int = option(
        0,
        "side of the square images in pixels; 0: a cache's own, 16 for digits, 32 for the shapes; "
        "a folder of images needs it",
        0,
    )
    holdout: float = option(
        0.25, "share of base images kept for monitoring (without val classes)", above=0, below=1
    )
    split_seed: int = option(0, "seed of that share", 0)
    images_per_class: int = option(60, "images drawn for each class (shapes and shapes-varied)", 2)
    resident: str = option(
        "auto",
        "keep a cache's images in GPU memory: yes, no, or auto: where they fit in half of it",
        check=one_of("auto", "yes", "no"),
    )


@dataclass
class SemanticsConfig(TextOptions):
    """Which texts."""

    bank: str = option(
        "digits",
        "bundled bank name; shapes or shapes-varied, with -true for no hallucinations; or a "
        "bank JSON file",
    )
    seen_images: str = option(
        "exclude",
        "images that the texts were written from: exclude them from an evaluation's queries, or "
        "report how many of them are queries",
        check=one_of("exclude", "report"),
    )


@dataclass
class ModelConfig:
    """Backbone, gates and classifier. The backbone part must match a checkpoint that is loaded."""

    backbone: str = option(
        "small",
        "backbone: small, resnet12, visformer_tiny or clip",
        check=one_of("dvla_fast.nn.backbones:BACKBONES"),
    )
    width: int = option(24, "width of the small backbone's first stage", 1)
    clip_model: str = option("ViT-B-16", "open_clip's name of the clip backbone's architecture")
    pretrained: str = option(
        "",
        "published weights that the backbone starts from: open_clip's tag or a file (clip), or a "
        "visformer-*.pth file (visformer_tiny)",
    )
    normalisation: str = option(
        "auto",
        "channel statistics of the images: data (of the base images), clip, imagenet, cifar, sp, "
        "or auto: what the backbone's weights expect, otherwise data",
        check=one_of("dvla_fast.engine.starting:NORMALISATIONS"),
    )
    backbone_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            "more arguments of the backbone, e.g. {small_stem: false} (visformer_tiny), "
            "{drop_block: false} (resnet12), {projection: false} (clip)"
        ),
    )
    gated_layers: list[list[int]] = field(
        default_factory=list,
        metadata=about("[stage, block] pairs to gate, e.g. [[2,1],[3,0]]; empty: the default"),
    )
    level_weights: list[list[float]] = field(
        default_factory=list,
        metadata=about(
            "[attributes, descriptions] weights of each gated layer's texts, e.g. "
            "[[0.5,0.5],[0.5,0.5]]; empty: [0.7,0.3] in shallow layers, [0.3,0.7] in deep ones"
        ),
    )
    num_heads: int = option(8, "attention heads of a gate", 1)
    concentration: float = option(10.0, "concentration of the Beta policy", above=0)
    hidden_dim: int = option(128, "hidden width of the policy network", 1)
    policy: str = option(
        "beta",
        "gate policy: beta, categorical, fixed, static or mlp",
        check=one_of("dvla_fast.nn.policy:POLICIES"),
    )
    fixed_alpha: float = option(0.5, "gate value of policy fixed", 0, 1)
    text_scope: str = option(
        "episode",
        "whose text an image sees: episode (all), class (supports) or candidate",
        check=one_of("dvla_fast.nn.dvla:TEXT_SCOPES"),
    )
    alpha_scope: str = option(
        "episode",
        "one gate value per episode or per image",
        check=one_of("dvla_fast.nn.gate:ALPHA_SCOPES"),
    )
    temperature: float = option(0.2, "temperature of the cosine prototype classifier", above=0)


@dataclass
class AugmentConfig:
    """Random changes of training images. What is off by default costs nothing."""

    shift: float = option(0.0, "largest random shift, as a share of the side", 0, 1)
    rotate: float = option(0.0, "largest random rotation in degrees", 0)
    scale: float = option(0.0, "largest random change of size", 0, below=1)
    crop: float = option(
        1.0,
        "smallest share of the area that a random crop keeps before it is resized; 1: no crop",
        0.01,
        1,
    )
    flip: bool = option(False, "mirror half of the images (not for digits)")
    rand_augment: str = option(
        "",
        "RandAugment as timm names it, e.g. rand-m9-mstd0.5-inc1; empty: none",
        check=accepted_by("dvla_fast.data.rand_augment:RandAugment.parse"),
    )
    color_jitter: float = option(
        0.0, "largest change of brightness, contrast and saturation, 0 to 1", 0, 1
    )
    random_erasing: float = option(0.0, "share of images that get a rectangle of noise", 0, 1)


@dataclass
class ExecutionConfig:
    """How the arithmetic is done. The same training, faster or in less memory."""

    precision: str = option(
        "float32",
        "float32, or bfloat16: mixed precision (autocast), float32 weights and losses",
        check=one_of("float32", "bfloat16", note="float16 would need its losses scaled"),
    )
    channels_last: bool = option(False, "keep images and feature maps with their channels last")
    compile: bool = option(False, "torch.compile the model; the first steps take a minute or two")
    cudnn_benchmark: bool = option(
        True, "on a GPU, let cuDNN time its convolutions at the first step; false: by its own guess"
    )


@dataclass
class PretrainConfig:
    """Pre-training of the backbone on the base classes."""

    epochs: int = option(40, "passes over the base images", 1)
    batch_size: int = option(128, "distinct images of a step, over all processes", 1)
    lr: float = option(2e-3, "peak learning rate (AdamW)", 0)
    weight_decay: float = option(5e-2, "weight decay", 0)
    warmup_epochs: int = option(5, "epochs of linear warm-up, fewer than epochs", 0)
    warmup_lr: float = option(1e-6, "learning rate at the start of warm-up", 0)
    label_smoothing: float = option(0.1, "label smoothing", 0, 1)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(shift=0.1, rotate=15.0, scale=0.1)
    )
    views: int = option(1, "differently augmented copies of each image in a step", 1)
    mixup: float = option(0.0, "parameter of mixup's Beta distribution; 0: none", 0)
    cutmix: float = option(
        0.0, "parameter of cutmix's Beta distribution; 0: none; with mixup: either, by a coin", 0
    )
    drop_path: float = option(0.0, "stochastic depth of the backbone, where it has one", 0, below=1)
    clip_norm: float = option(0.0, "largest gradient norm; 0: no limit", 0)
    quarter_turns: bool = option(True, "learn each class turned by 90 and 270 degrees as two more")
    validate_every: int = option(5, "epochs between validations", 1)
    validation_episodes: int = option(200, "monitor episodes of a validation", 1)


@dataclass
class MetatuneConfig:
    """Meta-tuning of gates and backbone on episodes of the base classes."""

    epochs: int = option(20, "epochs", 1)
    steps_per_epoch: int = option(12, "optimiser steps of an epoch", 1)
    episodes_per_step: int = option(4, "episodes of a step, over all processes", 1)
    way: int = option(5, "classes of an episode", 2)
    shots: list[int] = field(
        default_factory=lambda: [1],
        metadata=about("supports of a class; several values take turns by step", 1),
    )
    query: int = option(15, "queries of a class", 1)
    lr: float = option(5e-4, "learning rate of the new modules", 0)
    backbone_lr: float = option(1e-6, "learning rate of the backbone; 0 freezes it", 0)
    weight_decay: float = option(1e-4, "weight decay", 0)
    clip_norm: float = option(1.0, "largest gradient norm; 0: no limit", 0)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    freeze_norm: bool = option(True, "keep the backbone's BatchNorm statistics of pre-training")
    objective: str = option(
        "reinforce",
        "policy objective: reinforce, ppo, grpo, counterfactual, dpo or pathwise",
        check=one_of("dvla_fast.rl.objectives:OBJECTIVES"),
    )
    baseline: str = option(
        "auto",
        "what is subtracted from a reward: ema, leave-one-out, value, none, or auto: ema where "
        "the objective takes one",
        check=one_of("auto", "dvla_fast.rl.baselines:BASELINES"),
    )
    rewards: dict[str, float] = field(
        default_factory=dict,
        metadata=about(
            "weights of rewards by name, e.g. {accuracy: 1.0}: similarity, improvement, "
            "episode_improvement, accuracy, log_likelihood; empty: similarity and improvement, "
            "weighted lambda_sim and lambda_imp",
            check=accepted_by("dvla_fast.rl:check_reward_weights"),
        ),
    )
    samples: int = option(
        0, "gates drawn for each episode; 0: what objective and baseline need (1, 2 or 4)", 0
    )
    policy_epochs: int = option(
        0,
        "policy updates from the same draws; 0: the objective's usual (ppo and grpo 4, else 1)",
        0,
    )
    clip: float = option(0.2, "clip range of the probability ratio (ppo, grpo)", above=0, below=1)
    preference_beta: float = option(0.1, "strength of a preference (dpo)", above=0)
    reference: str = option(
        "fixed",
        "frozen gate to compare with (counterfactual, dpo, kl_weight): fixed, of mean "
        "reference_alpha, or epoch, the policy as it was when the epoch began",
        check=one_of("fixed", "epoch"),
    )
    reference_alpha: float = option(0.5, "mean of the fixed reference gate", above=0, below=1)
    kl_weight: float = option(0.0, "weight of the divergence from the reference policy", 0)
    normalise_advantage: bool = option(False, "give a layer's advantages mean 0 and deviation 1")
    discount: float = option(0.0, "share of later gates' rewards in a gate's own, 0 to 1", 0, 1)
    value_weight: float = option(0.5, "weight of the value network's squared error", 0)
    reinforce_weight: float = option(0.1, "weight of the policy loss", 0)
    entropy_weight: float = option(0.2, "weight of the policy's entropy bonus", 0)
    lambda_sim: float = option(0.5, "weight of the similarity reward", 0)
    lambda_imp: float = option(1.0, "weight of the accuracy-improvement reward", 0)
    baseline_momentum: float = option(0.9, "momentum of the reward baseline", 0, below=1)
    validate_every: int = option(5, "epochs between validations", 1)
    validation_episodes: int = option(200, "monitor episodes of a validation", 1)


@dataclass
class EvaluateConfig:
    """Evaluation on paired episodes."""

    split: str = option(
        "novel",
        "novel (or test), monitor (or val: the validation classes; held-out images of the base "
        "classes where there are none), or base (or train)",
        check=_unknown_split,
    )
    way: int = option(5, "classes of an episode", 2)
    shots: list[int] = field(
        default_factory=lambda: [1, 5],
        metadata=about("supports of a class; one result for each value", 1, check=repeated),
    )
    query: int = option(15, "queries of a class", 1)
    episodes: int = option(2000, "episodes of a result", 1)
    episode_list: str = option(
        "own",
        "own, or authors: the list of the method's authors (theirs is seed 0)",
        check=one_of("own", "authors"),
    )
    fixed_alpha: float = option(0.5, "gate value of the fixed comparison", 0, 1)
    batch_episodes: int = option(0, "episodes of a forward pass; 0: what suits the machine", 0)
    construct: str = option(
        "",
        "strictly inductive: YAML file of 'dvla-fast semantics build' settings, by which the texts "
        "of every episode are written from its own supports; empty: the bank's texts",
    )
    cache_mib: int = option(
        8192, "largest memory for feature maps that are kept for all episodes, in MiB", 0
    )

    def __post_init__(self) -> None:
        self.split = SPLIT_NAMES.get(self.split, self.split)


@dataclass
class AblateConfig:
    """Which variants, how often, and how they are compared."""

    groups: list[str] = field(
        default_factory=list,
        metadata=about(
            "groups of variants: semantics, alpha, objective, k, kappa, lambda, entropy, "
            "temperature, levels, layers, scope; empty: all"
        ),
    )
    variants: list[str] = field(
        default_factory=list,
        metadata=about("single variants by name, e.g. [visual, alpha=0.5]; empty: whole groups"),
    )
    seeds: int = option(5, "training seeds: --seed, --seed + 1, ...", 1)
    reference: str = option("full", "the variant that the others are compared with")
    processes: int = option(
        0, "worker processes, one thread each on a CPU; 0: one per core (one on a GPU)", 0
    )
    k: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8], metadata=about("sweep of semantics.top_k", 1)
    )
    kappa: list[float] = field(
        default_factory=lambda: [2.0, 5.0, 20.0, 50.0],
        metadata=about("sweep of model.concentration", above=0),
    )
    lambda_sim: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 1.0], metadata=about("sweep of metatune.lambda_sim", 0)
    )
    lambda_imp: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 2.0], metadata=about("sweep of metatune.lambda_imp", 0)
    )
    entropy_weight: list[float] = field(
        default_factory=lambda: [0.0, 0.02, 0.05, 0.5],
        metadata=about("sweep of metatune.entropy_weight, the paper's τ", 0),
    )
    temperature: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.4],
        metadata=about("sweep of model.temperature, the authors' τ", above=0),
    )
    layers: list[list[list[int]]] = field(
        default_factory=list,
        metadata=about(
            "sets of gated layers to try, e.g. [[[2,0]], [[2,1],[3,0]]]; empty: each of the base "
            "configuration's layers alone, and every block that can be gated"
        ),
    )
    draws: int = option(4000, "bootstrap draws of an interval", 100)


@dataclass
class RunConfig:
    """What all commands share."""

    # One file may describe a whole experiment: a run passes over the settings of other commands.
    passes_over: ClassVar[dict[str, Any]] = {
        "data": DataConfig,
        "semantics": SemanticsConfig,
        "model": ModelConfig,
        "pretrain": PretrainConfig,
        "metatune": MetatuneConfig,
        "evaluate": EvaluateConfig,
        "execution": ExecutionConfig,
        "ablate": AblateConfig,
        **{"quick": bool, "checkpoint": str, "checkpoints": list[str], "compare": str},
    }

    # Those whose work is done: what they named need not be there any more.
    past_sections: ClassVar[tuple[str, ...]] = ()

    output: str = option("", "run folder, new or empty; default: runs/<command>-<date>-<time>")
    resume: bool = option(False, "continue the run in --output after an interruption")
    seed: int = option(0, "seed of weights, batches, episodes and gates", 0, LARGEST_SEED)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    wandb: str = option("", "Weights & Biases project to log to as well (needs wandb); empty: none")


@dataclass
class PretrainRun(RunConfig):
    """Everything `dvla-fast pretrain` does."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


@dataclass
class MetatuneRun(RunConfig):
    """Everything `dvla-fast metatune` does."""

    checkpoint: str = option(
        "",
        "checkpoint to start from: of pre-training, of meta-tuning (its gates go on learning where "
        "they fit the model), or a visformer-*.pth file of the method's authors (required, unless "
        "--model.pretrained is given)",
    )
    data: DataConfig = field(default_factory=DataConfig)
    semantics: SemanticsConfig = field(default_factory=SemanticsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    metatune: MetatuneConfig = field(default_factory=MetatuneConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


@dataclass
class EvaluateRun(RunConfig):
    """Everything `dvla-fast evaluate` does."""

    past_sections: ClassVar[tuple[str, ...]] = ("pretrain", "metatune")

    checkpoint: str = option(
        "", "checkpoint to evaluate, or the backbone of an authors' visformer-*.pth file (required)"
    )
    checkpoints: list[str] = field(
        default_factory=list,
        metadata=about("more checkpoints of the same recipe (seeds); results are means over all"),
    )
    compare: str = option(
        "",
        "folder of another evaluation of the same episodes, to be compared with by a paired t test",
    )
    data: DataConfig = field(default_factory=DataConfig)
    semantics: SemanticsConfig = field(default_factory=SemanticsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class AblateRun(RunConfig):
    """Everything `dvla-fast ablate` does."""

    data: DataConfig = field(default_factory=DataConfig)
    semantics: SemanticsConfig = field(default_factory=SemanticsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    metatune: MetatuneConfig = field(default_factory=lambda: MetatuneConfig(backbone_lr=0.0))
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(episodes=1000))
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)


@dataclass
class DemoRun(RunConfig):
    """Everything `dvla-fast demo` does."""

    quick: bool = option(False, "a smaller demo, in under a minute")
    data: DataConfig = field(default_factory=DataConfig)
    semantics: SemanticsConfig = field(default_factory=SemanticsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    metatune: MetatuneConfig = field(default_factory=MetatuneConfig)
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(episodes=1000))
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


def demo_config(quick: bool = False) -> DemoRun:
    """Return the demo's settings; ``quick`` trains and evaluates less."""
    if quick:
        return DemoRun(
            quick=True,
            pretrain=PretrainConfig(epochs=16, warmup_epochs=2, validate_every=4),
            metatune=MetatuneConfig(
                epochs=6, steps_per_epoch=6, validate_every=3, validation_episodes=30
            ),
            evaluate=EvaluateConfig(episodes=100),
        )
    return DemoRun()
