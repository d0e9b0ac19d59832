"""Models that run in this process, through transformers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dvla_fast.errors import DataError, LanguageModelError, MissingDependencyError
from dvla_fast.semantics.language_models.base import (
    MAX_TOKENS,
    Answer,
    Request,
    Usage,
    limit_record,
)

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
# Weights are not all: room for the activations and the cache of keys and values.
_HEADROOM = 1.1
# Files of a saved model that decide its answers.
_SAVED = (".json", ".jinja", ".safetensors", ".bin", ".txt", ".model")
_STRETCHES, _STRETCH = 64, 4096  # of a file, spread over it
# What reading one request raises: an image of a shape that the processor does not take, a text with
# one of its own marks.
_UNFIT = (DataError, ValueError, TypeError, IndexError)


class TransformersModel:
    """Back end ``transformers``: any image-text-to-text model, or a text-only one without images.

    Args:
        model: name on the Hugging Face hub, or folder of a saved model.
        device_map: ``cpu``, ``cuda``, ``cuda:1``; or what accelerate understands: ``auto`` spreads
            the model over all GPUs and, where they are too small, main memory.
        dtype: ``auto`` (as saved), ``bfloat16``, ``float16`` or ``float32``.
        batch_size: requests of one forward pass; halved by itself where the memory is too small.
        temperature: 0: the most likely answer; else sampled, with ``seed`` set before each batch.
        max_tokens: longest answer, thinking included, where a request does not say.

    Raises:
        MissingDependencyError: transformers (or accelerate, for ``auto``) is not installed.
        LanguageModelError: no such model, damaged, or too large for the memory.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        device_map: str = "auto",
        dtype: str = "auto",
        batch_size: int = 4,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if min(batch_size, max_tokens) < 1:
            raise ValueError(
                f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}"
            )
        self.name = model or DEFAULT_MODEL
        self.device_map, self.batch_size = device_map, batch_size
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self._dtype = None if dtype == "auto" else _dtype(dtype)  # None: as saved
        self._model: Any = None
        self._processor: Any = None
        self._sees = False
        self.identity: dict[str, Any] = {
            "backend": "transformers",
            "model": self.name,
            "dtype": dtype,
            "temperature": temperature,
            "seed": seed,
            **limit_record(max_tokens),
            **_saved_files(Path(self.name)),
        }
        self.usage = Usage()

    def check(self) -> None:
        """Load the model. Its size is compared with the memory before any weight is read."""
        if self._model is not None:
            return
        transformers = _transformers()
        path = Path(self.name)
        if (path.is_absolute() or self.name.startswith(".")) and not path.is_dir():
            raise LanguageModelError(
                f"{path}: no such folder; give --language_model.model the folder of a saved model, "
                "or a name on the Hugging Face hub"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(self.name)
        except (OSError, ValueError, KeyError) as error:
            raise LanguageModelError(self._cannot_load(error)) from error
        seeing = transformers.AutoModelForImageTextToText
        self._sees = type(config) in seeing._model_mapping
        kind = seeing if self._sees else transformers.AutoModelForCausalLM
        dtype = self._dtype or _saved_dtype(config)
        try:
            with torch.device("meta"):
                empty = kind.from_config(config, dtype=dtype)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LanguageModelError(
                f"{self.name}: this model ({getattr(config, 'model_type', '?')}) does not answer "
                f"in text ({_short(error)}); choose an image-text-to-text model, such as "
                f"{DEFAULT_MODEL}"
            ) from error
        needed = sum(p.numel() * p.element_size() for p in empty.parameters())
        if getattr(config, "quantization_config", None) is None:  # else it is much smaller
            self._check_memory(needed, dtype)
        self._load(kind, dtype, needed)

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        """Answer in batches, those with and those without images apart.

        Raises:
            LanguageModelError: the model cannot be loaded, or not even one request fits in memory.
        """
        self.check()
        todo: dict[bool, list[int]] = {True: [], False: []}
        for index, request in enumerate(requests):
            if request.images and not self._sees:
                yield (
                    index,
                    self._failed(
                        f"{self.name} is a text-only model and cannot be shown the images of "
                        f"{request.subject!r}; choose an image-text-to-text model, or build from "
                        "class names alone with --construct.images 0"
                    ),
                )
            else:
                todo[bool(request.images)].append(index)
        for indices in todo.values():
            while indices:
                batch, indices = indices[: self.batch_size], indices[self.batch_size :]
                try:
                    answers = self._generate([requests[index] for index in batch])
                except _UNFIT:  # e.g. an image that cannot be read: find its request
                    yield from self._one_by_one(requests, batch)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not _out_of_memory(error):
                        raise
                    indices = self._smaller(batch, error) + indices
                    continue
                for index, answer in zip(batch, answers):
                    self.usage.count(answer)
                    yield index, answer

    def _one_by_one(
        self, requests: Sequence[Request], batch: Sequence[int]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        for index in batch:
            try:
                (answer,) = self._generate([requests[index]])
            except _UNFIT as error:
                yield index, self._unfit(requests[index], error)
                continue
            except (RuntimeError, MemoryError) as error:
                if _out_of_memory(error):
                    self._smaller([index], error)  # which raises
                raise
            self.usage.count(answer)
            yield index, answer

    def _smaller(self, batch: list[int], error: BaseException) -> list[int]:
        if len(batch) == 1:
            raise LanguageModelError(
                f"{self.name}: one request does not fit into the memory left beside the model "
                f"({_short(error)}); show fewer or smaller images (--construct.images, "
                "--construct.max_side), choose a smaller model, or serve it with vLLM on several "
                "GPUs and use --language_model.backend openai"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_size = max(1, len(batch) // 2)
        self.usage.retries += 1
        return batch

    def _unfit(self, request: Request, error: Exception) -> LanguageModelError:
        if isinstance(error, DataError):
            return self._failed(str(error))
        shown = ", ".join(image.id for image in request.images)
        images = f"; images shown: {shown}" if shown else ""
        failed = self._failed(
            f"{request.stage or 'request'} of {request.subject!r}: {self.name} cannot read this "
            f"({_short(error)}){images}"
        )
        failed.__cause__ = error
        return failed

    def _failed(self, message: str) -> LanguageModelError:
        self.usage.failures += 1
        return LanguageModelError(message)

    def _check_memory(self, needed: int, dtype: torch.dtype) -> None:
        where = "main memory"
        available = free_memory()
        if self.device_map.startswith("cuda"):
            if not torch.cuda.is_available():
                raise LanguageModelError(
                    "--language_model.device_map cuda: no GPU here; use cpu, or a server with "
                    "--language_model.backend openai"
                )
            where, available = "the GPU", torch.cuda.mem_get_info(self.device_map)[0]
        elif self.device_map != "cpu" and torch.cuda.is_available():
            where = "the GPUs and main memory together"
            gpus = range(torch.cuda.device_count())
            available += sum(torch.cuda.mem_get_info(index)[0] for index in gpus)
        if needed * _HEADROOM > available:
            raise LanguageModelError(
                f"{self.name} does not fit: its weights take {needed / 1e9:.1f} GB as "
                f"{str(dtype).removeprefix('torch.')}, and {available / 1e9:.1f} GB of {where} are "
                "free; choose a smaller model or dtype (--language_model.dtype bfloat16), or serve "
                "it with vLLM on several GPUs and use --language_model.backend openai"
            )

    def _load(self, kind: Any, dtype: torch.dtype, needed: int) -> None:
        transformers = _transformers()
        plain = self.device_map == "cpu" or self.device_map.startswith("cuda")
        options: dict[str, Any] = {"dtype": dtype}
        if not plain:
            _accelerate()
            options["device_map"] = self.device_map
        try:
            processor = transformers.AutoProcessor if self._sees else transformers.AutoTokenizer
            self._processor = processor.from_pretrained(self.name)
            model = kind.from_pretrained(self.name, **options)
            self._model = (model.to(self.device_map) if plain else model).eval()
        except Exception as error:  # damaged files raise nearly anything
            if not _out_of_memory(error):
                raise LanguageModelError(self._cannot_load(error)) from error
            raise LanguageModelError(
                f"{self.name} does not fit: the memory ran out while its {needed / 1e9:.1f} GB of "
                "weights were loaded; choose a smaller model or dtype, or serve it with vLLM and "
                "use --language_model.backend openai"
            ) from error

    def _cannot_load(self, error: Exception) -> str:
        return (
            f"{self.name}: cannot load this model ({_short(error)}); give --language_model.model "
            "the folder of a saved model, or a name on the Hugging Face hub (which needs the "
            "network the first time)"
        )

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        tokenizer.padding_side = "left"  # answers begin where the prompts end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if requests[0].images:
            # one list of images per request; the texts have a place for each
            options["images"] = [[image.picture() for image in item.images] for item in requests]
        if self._template:  # which writes the tokens that begin a text itself
            options["add_special_tokens"] = False
        texts = [self._conversation(item) for item in requests]
        inputs = self._processor(text=texts, **options).to(self._model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        longest = max(item.max_tokens or self.max_tokens for item in requests)
        gpus = range(torch.cuda.device_count())
        with torch.random.fork_rng(gpus, enabled=self.temperature > 0):  # nobody else's draws move
            if self.temperature > 0:
                torch.manual_seed(self.seed)
            output = self._model.generate(
                **inputs,
                max_new_tokens=longest,
                pad_token_id=tokenizer.pad_token_id,
                **{"top_k": None, **sampling},
            )
        start = inputs["input_ids"].shape[1]
        ends = _end_tokens(self._model, tokenizer)
        answers = []
        rows = zip(requests, inputs["attention_mask"], output[:, start:].tolist())
        for request, prompt, written in rows:
            written = written[: request.max_tokens or self.max_tokens]
            stops = [place for place, token in enumerate(written) if token in ends]
            kept = written[: stops[0]] if stops else written
            answers.append(
                Answer(
                    tokenizer.decode(kept, skip_special_tokens=True).strip(),
                    "stop" if stops else "length",
                    int(prompt.sum()),
                    len(kept),
                    self.name,
                )
            )
        return answers

    @property
    def _template(self) -> bool:
        return getattr(self._processor, "chat_template", None) is not None

    def _conversation(self, request: Request) -> str:
        content: list[dict[str, str]] = [{"type": "image"} for _ in request.images]
        content.append({"type": "text", "text": request.prompt})
        message: dict[str, Any] = {"role": "user", "content": content}
        if not self._sees:
            message["content"] = request.prompt
        if not self._template:
            if request.images:
                raise LanguageModelError(
                    f"{self.name}: has no chat template, so it is not known how it is shown "
                    "images; choose an instruction-tuned model"
                )
            return request.prompt
        return str(
            self._processor.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
        )


def _saved_files(folder: Path) -> dict[str, str]:
    """Return what an identity says of a folder: other weights in it are another model.

    A hash of name, size and stretches of each file: reading all weights would take as long as
    loading.
    """
    if not folder.is_dir():
        return {}
    content = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix not in _SAVED or not path.is_file():
                continue
            size = path.stat().st_size
            content.update(f"{path.name!r} {size} ".encode())
            with path.open("rb") as file:
                for place in range(_STRETCHES + 1):  # the last ends with the file
                    file.seek(max(0, size - _STRETCH) * place // _STRETCHES)
                    content.update(file.read(_STRETCH))
    except OSError:
        return {}  # loading says what is wrong
    return {"files_sha256": content.hexdigest()}


def free_memory() -> int:
    """Return the main memory in bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "back end 'transformers' needs the transformers package, which is not installed; run "
            "pip install 'dvla-fast[semantics]'"
        ) from error
    return transformers


def _accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "--language_model.device_map auto needs accelerate, which is not installed; run "
            "pip install 'dvla-fast[semantics]', or use cpu or cuda"
        ) from error


def _dtype(name: str) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise LanguageModelError(
            f"--language_model.dtype {name!r} is unknown; choose auto, {', '.join(known)}"
        )
    return known[name]


def _saved_dtype(config: Any) -> torch.dtype:
    text = getattr(config, "text_config", None)
    for found in (getattr(config, "dtype", None), getattr(text, "dtype", None)):
        if isinstance(found, str):
            found = getattr(torch, found.removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    return torch.float32


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    found: set[int | None] = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    found.update(configured if isinstance(configured, list) else [configured])
    return {token for token in found if token is not None}


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _short(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
