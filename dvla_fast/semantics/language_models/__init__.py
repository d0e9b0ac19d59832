"""Language models behind one interface: transformers, OpenAI-compatible servers, files."""

from dvla_fast.semantics.language_models.base import (
    Answer,
    LanguageModel,
    Request,
    ShownImage,
    Usage,
    answer_all,
)
from dvla_fast.semantics.language_models.files import AnswerFile
from dvla_fast.semantics.language_models.local import TransformersModel
from dvla_fast.semantics.language_models.openai_server import OpenAIServer

__all__ = [
    "Answer",
    "AnswerFile",
    "LanguageModel",
    "OpenAIServer",
    "Request",
    "ShownImage",
    "TransformersModel",
    "Usage",
    "answer_all",
]
