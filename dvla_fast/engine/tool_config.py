"""What the commands around training are told: data, semantics, report and comparison."""

from __future__ import annotations

from dataclasses import dataclass, field

from dvla_fast.engine.config import LARGEST_SEED, DataConfig
from dvla_fast.engine.settings import about, one_of, option, positional
from dvla_fast.engine.text_options import EncoderOptions, SelectionOptions


@dataclass
class DataCheck:
    """Everything `dvla-fast data check` does."""

    path: str = positional("folder of a data set or of a cache")
    splits: str = option("", "published split list, or a JSON file; empty: the one that fits")
    shot: int = option(5, "supports that an episode takes of a class", 1)
    query: int = option(15, "queries that an episode takes of a class", 1)
    image_size: int = option(224, "side in pixels that training will use", 1)
    counts_only: bool = option(False, "count classes and images without reading them")
    workers: int = option(0, "threads; 0: one for each core", 0)


@dataclass
class DataPrepare:
    """Everything `dvla-fast data prepare` does."""

    path: str = positional("folder of a data set")
    output: str = option("", "folder of the cache, new (required)")
    splits: str = option("", "published split list, or a JSON file; empty: the one that fits")
    image_size: int = option(224, "side of the square images in pixels", 1)
    skip_unreadable: bool = option(False, "leave unreadable images out instead of failing")
    workers: int = option(0, "threads; 0: one for each core", 0)


@dataclass
class ReportRun:
    """Everything `dvla-fast report` does."""

    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "run folders, of any command", "positional": "+"},
    )
    output: str = option("report.html", "HTML file to write, new")
    overwrite: bool = option(False, "replace the file if it exists")
    table: str = option(
        "", "file for a table of the evaluations, new: .csv, .md or .tex; empty: none"
    )
    title: str = option("", "title of the page; empty: the data sets' names")
    shot: int = option(0, "which of an evaluation's shots to draw; 0: its first", 0)
    episodes: list[int] = field(
        default_factory=list,
        metadata=about(
            "episodes to draw, by number from 0; empty: the one with the lowest, median and "
            "highest accuracy"
        ),
    )
    text_only: bool = option(
        False, "leave out what needs checkpoint and images: features, attention, supports"
    )
    device: str = option("cpu", "cpu, cuda, or auto: cuda where there is one")


@dataclass
class PredictImages:
    """Everything `dvla-fast predict` does."""

    images: list[str] = field(
        default_factory=list,
        metadata={
            "help": "images to classify: files, or folders with images in them or below",
            "positional": "+",
        },
    )
    checkpoint: str = option("", "checkpoint of metatune, or of pretrain without --bank (required)")
    supports: str = option(
        "", "folder of the classes: a folder for each, a few images in it (required)"
    )
    bank: str = option(
        "",
        "texts of these classes: path of a bank JSON file, or name of a bundled or made bank; "
        "empty: images alone decide",
    )
    encoder: str = option(
        "",
        "where the text encoder's weights lie, if training read them from a file, e.g. "
        "open_clip:ViT-B-16/FILE; empty: as the checkpoint says",
    )
    output: str = option("predictions.csv", "file to write, .csv or .json, new")
    overwrite: bool = option(False, "replace the file if it exists")
    rows: int = option(10, "images to list on the terminal", 0)
    batch: int = option(
        32, "images of one forward pass (in text scope candidate each counts once a class)", 1
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")


@dataclass
class CompareRun:
    """Everything `dvla-fast compare` does."""

    run_a: str = positional("evaluation, or several of one recipe: RUN,RUN,...")
    run_b: str = positional("evaluation, or several, of the same episodes")
    method_a: str = option("", "recorded method of A, e.g. 'fixed gate'; empty: its main one")
    method_b: str = option("", "recorded method of B; empty: its main one")
    classes: int = option(10, "classes to list; 0: all", 0)
    output: str = option("", "JSON file for the whole comparison, new; empty: none")
    overwrite: bool = option(False, "replace the file if it exists")


@dataclass
class SemanticsShow(SelectionOptions):
    """Everything `dvla-fast semantics show` does."""

    bank: str = positional("name of a bundled or made bank, or path of a bank JSON file")
    class_name: str = positional("class; all of them in short if left out", optional=True)


@dataclass
class SemanticsDiff:
    """Everything `dvla-fast semantics diff` does."""

    first: str = positional("name of a bundled or made bank, or path of a bank JSON file")
    second: str = positional("another one")


@dataclass
class SemanticsEdit:
    """Everything `dvla-fast semantics edit` does."""

    bank: str = positional("path of a bank JSON file")
    class_name: str = positional("class")


@dataclass
class SemanticsEncode(SelectionOptions):
    """Everything `dvla-fast semantics encode` does."""

    bank: str = positional("name of a bundled or made bank, or path of a bank JSON file")
    prune: bool = option(
        False,
        "take away this encoder's vectors of texts that the bank, with this top_k and template, "
        "does not need",
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")


@dataclass
class SemanticsCheck(EncoderOptions):
    """Everything `dvla-fast semantics check` does."""

    bank: str = positional("name of a bundled or made bank, or path of a bank JSON file")
    data: DataConfig = field(default_factory=lambda: DataConfig(dataset=""))


@dataclass
class SemanticsImport:
    """Everything `dvla-fast semantics import` does."""

    path: str = positional("file of published vectors (.pth)")
    attributes: str = option("", "second file, with attribute vectors of the same classes")
    output: str = option("", "JSON file of the bank, new (required); its vectors go beside it")
    splits: str = option(
        "", "split list that the classes belong to; empty: the one that fits best, if any"
    )
    encoder: str = option("", "what encoder made the vectors; empty: as the file says")


@dataclass
class LanguageModelConfig:
    """Who writes the texts."""

    backend: str = option(
        "openai",
        "openai (any server that speaks its protocol), transformers, or files",
        check=one_of("openai", "transformers", "files"),
    )
    model: str = option(
        "",
        "name of the model; empty: the only one that the server has, or Qwen2.5-VL-7B-Instruct "
        "(transformers)",
    )
    temperature: float = option(0.0, "0: the most likely answer; higher: more varied", 0)
    seed: int = option(0, "seed of answers, for back ends that have one", 0, LARGEST_SEED)
    max_tokens: int = option(
        1024, "longest answer, the thinking of a model included (openai, transformers)", 1
    )
    answers: str = option("", "the .json or .jsonl file of answers (files)")
    base_url: str = option("", "address of the server; empty: OPENAI_BASE_URL (openai)")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the key (openai)")
    concurrency: int = option(16, "requests under way at one time (openai)", 1)
    timeout: float = option(120.0, "seconds to wait for one answer (openai)", 0.001)
    retries: int = option(6, "times that a failed request is sent again (openai)", 0)
    structured: bool = option(True, "ask for JSON by schema, until a server refuses (openai)")
    input_price: float = option(0.0, "price of a million tokens read, for the cost (openai)", 0)
    output_price: float = option(0.0, "price of a million tokens written (openai)", 0)
    device_map: str = option("auto", "auto, cpu, cuda or cuda:N (transformers)")
    dtype: str = option("auto", "auto, bfloat16, float16 or float32 (transformers)")
    batch_size: int = option(4, "requests of one forward pass (transformers)", 1)


@dataclass
class ConstructConfig:
    """Which classes, which of their images are shown, and how attributes are chosen."""

    split: list[str] = field(
        default_factory=list,
        metadata=about("splits to write for, e.g. [test]; empty: all of the data set"),
    )
    images: int = option(
        5, "support images shown of each class, chosen by --seed; 0: class names alone", 0
    )
    max_side: int = option(512, "longer side in pixels of an image that is shown", 1)
    classes: str = option(
        "", "text file with one class name a line, instead of a data set; nothing is shown"
    )
    candidates: int = option(16, "attributes asked for", 2)
    top_k: int = option(8, "attributes chosen of them by progressive selection", 1)
    template: str = option(
        "all",
        "chosen attributes that the selection's template names: all, last",
        check=one_of("dvla_fast.semantics.topk:TEMPLATES"),
    )
    attempts: int = option(2, "answers asked for before a class fails", 1)
    candidates_prompt: str = option("", "file of the first question; empty: the package's own")
    description_prompt: str = option("", "file of the second question; empty: the package's own")
    encoder: str = option(
        "hashed-ngram", "text encoder of the selection, as in --semantics.encoder"
    )
    dim: int = option(0, "length of its vectors; 0: its own", 0)
    truncate: bool = option(False, "cut texts longer than it reads instead of failing")
    device: str = option("auto", "where it runs: cpu, cuda, or auto")


@dataclass
class SemanticsBuild:
    """Everything `dvla-fast semantics build` does."""

    output: str = option("", "JSON file of the bank (required)")
    seed: int = option(0, "seed of the choice of images", 0, LARGEST_SEED)
    data: DataConfig = field(default_factory=DataConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    construct: ConstructConfig = field(default_factory=ConstructConfig)
