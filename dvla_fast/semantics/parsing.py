"""From a language model's words to attributes and a description, or to what is wrong with them.

Models wrap JSON in prose and code fences, write numbered lists instead, stop in the middle, repeat
themselves, refuse, or answer in another language. What can be read without guessing is read; the
rest is an error that says what came, so that the model can be asked again and a person can see why.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dvla_fast.characters import whole_characters
from dvla_fast.errors import LanguageModelError
from dvla_fast.names import normalised_name
from dvla_fast.semantics.answer_json import json_values, unescape
from dvla_fast.semantics.answer_lists import (
    FENCE,
    MARK,
    MAX_CHARACTERS,
    MAX_WORDS,
    bullets,
    comparable,
    find_lists,
)
from dvla_fast.semantics.language_models.base import Answer

MAX_ATTRIBUTES = 64
DESCRIPTION_WORDS = 60  # mostly within the 77 tokens that CLIP reads
_FEWEST_DESCRIPTION_WORDS = 4

_TAG = r"(?:think(?:ing)?|reason(?:ing)?|thoughts?|reflection)"
_OPEN = rf"(?:<{_TAG}>|\[think\]|◁think▷)"
_CLOSE = rf"(?:</{_TAG}>|\[/think\]|◁/think▷)"
_THINKING = re.compile(rf"{_OPEN}.*?(?:{_CLOSE}|\Z)", re.DOTALL | re.IGNORECASE)
# Servers whose chat template holds the opening tag leave it out of the answer.
_OPEN_THINKING = re.compile(rf"\A.*?{_CLOSE}", re.DOTALL | re.IGNORECASE)
# gpt-oss: channels, of which the last one called "final" is the answer.
_UP_TO_FINAL = re.compile(
    r"\A.*<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>", re.DOTALL
)
_CHANNEL = re.compile(r"<\|channel\|>.*", re.DOTALL)
_END = re.compile(r"<\|(?:end|return|start)\|>.*", re.DOTALL)
_BULLET = re.compile(rf"^\s*(?:{MARK})(.+)$")
_AROUND = " \"'“”‘’*_•-–.,;:"
_REFUSAL = re.compile(
    r"\b(?:i['’]?m (?:very )?sorry|i am sorry|i apologi[sz]e|as an ai\b"
    r"|i (?:cannot|can['’]?t|can not|could not|am unable|['’]m unable|am not able|won['’]t)"
    r"|(?:unable|not able) to (?:help|assist|identify|provide|comply))",
    re.IGNORECASE,
)
# Also said before a list: "sorry, I was slow".
_PARDON = re.compile(r"\bsorry, (?:but|i)\b", re.IGNORECASE)
_NOT_AN_ATTRIBUTE = re.compile(
    r"^(?:none|unknown|n/?a|null|nil|other|others|etc|attributes?|candidates?|features?|text|\W*"
    r"|attribute ?\d+)$"
    r"|^(?:the|this|these|in the|given|provided) (?:given |provided )?(?:image|photo|picture)s?\b"
    r"|^(?:here (?:are|is)|sure(?!-)|certainly|of course|based on|let me)\b"
    r"|\bnot (?:visible|provided|applicable|available|possible)\b|https?://",
    re.IGNORECASE,
)
_LEADING = re.compile(r"^(?:it |they )?(?:has|have|having|with|its|their)\s+", re.IGNORECASE)
# What stands before a description: "# Crow", "**Crow**", "Here is the text:"; "Sure! Here is one:".
_HEADING = re.compile(r"\s*(?:#.*|\*\*[^*.!?]*\*\*|.*:[ *_]*)\n\s*(?=\S)")
_PREAMBLE = re.compile(
    r"^(?:(?:sure(?: thing)?|certainly|of course)[!.,]\s*"
    r"|here(?: is|['’]s)\b[^.:!]*\b(?:description|text|sentence|summary|one)\b[^.:!]*[:!]\s*)+",
    re.IGNORECASE,
)
_HEADING_WORDS = 6  # at most; without a colon, more of them may be the description
# Frequent words of languages in Latin letters that are no English words, and of English.
_FOREIGN = frozenset(
    (
        *("el", "los", "las", "una", "del", "con", "por", "muy", "sus", "le", "les", "des"),
        *("et", "avec", "dans", "une", "sur", "aux", "du", "der", "das", "und", "mit"),
        *("ein", "eine", "einen", "einem", "ist", "auf", "dem", "den", "von", "zu", "il", "lo"),
        *("della", "delle", "degli", "nel", "sono", "di", "che", "um", "uma", "com", "seu", "sua"),
        *("não", "em", "os", "het", "een", "op", "voor", "niet", "jest", "oraz", "och", "med"),
    )
)
_ENGLISH = frozenset(
    (
        *("the", "a", "an", "and", "of", "with", "in", "on", "its", "has", "have", "is", "are"),
        *("that", "which", "to", "from", "by", "at", "as", "or", "for", "it"),
    )
)


@dataclass(frozen=True)
class Attributes:
    """Attributes read from an answer.

    Attributes:
        kept: normalised, without repetition, in the order of the answer.
        dropped: (what came, why it was dropped).
        cut: the answer ended in the middle; what was complete is kept.
    """

    kept: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    cut: bool = False


def parse_attributes(answer: Answer, class_name: str, minimum: int = 2) -> Attributes:
    """Read the candidate attributes of an answer.

    Understood are a JSON list, an object that holds one, either inside prose or code fences, with
    the quotes of Python, or cut off (its complete members count), an object of parts and their
    texts, bulleted and numbered lists, a table of one column, lines of a short phrase each, and a
    sentence that enumerates after "are", "include" or a colon. The first list that can be used
    counts.

    Args:
        class_name: no attribute by itself.
        minimum: attributes that must remain.

    Raises:
        LanguageModelError: a refusal, no list, another language, or fewer than ``minimum`` left;
            says what came.
    """
    text = _plain(answer)
    best: tuple[Attributes, str] | None = None
    for items, cut in find_lists(text):
        found = _usable(items, class_name, cut or answer.finish == "length")
        problem = _too_few(found, items, minimum, answer)
        if _is_foreign(" ".join(found.kept)):  # maybe the first of two languages
            problem = f"the answer is not in English: {_quote(text)}"
        if not problem:
            return found
        if best is None or len(found.kept) > len(best[0].kept):
            best = found, problem
    if best is None:
        raise LanguageModelError(
            f"the answer holds no list of attributes but {_quote(text)}{_stopped(answer)}"
        )
    raise LanguageModelError(best[1])


def parse_description(
    answer: Answer, *, trim: bool = False, too_long: Callable[[str], str] = lambda text: ""
) -> str:
    """Read the description of an answer: an object that holds it, a JSON text, or plain prose.

    Args:
        trim: shorten a description that is too long or cut off to its whole sentences, where at
            least one fits; else it is an error.
        too_long: says of a text how long it is, where that is more than can be used; else "".

    Raises:
        LanguageModelError: a refusal, a list, too short, too long, cut off, or another language.
    """
    text = _plain(answer)
    found, cut = _description_text(text)
    found = _PREAMBLE.sub("", _one_line(found))
    found = re.sub(r"^\W*description\W*:\s*", "", found, flags=re.IGNORECASE)
    found = found.strip(" \"'“”*_`#")
    cut = cut or answer.finish == "length"

    def problem(part: str) -> str:
        words = len(part.split())
        if words > DESCRIPTION_WORDS:
            return f"is {words} words long, at most {DESCRIPTION_WORDS} can be used"
        return too_long(part)

    if _is_foreign(found):
        raise LanguageModelError(f"the description is not in English: {_quote(text)}")
    unusable = problem(found)
    if not unusable and cut and not re.search(r"[.!?]$", found):
        unusable = "is cut off"
    if unusable:
        shorter = _whole_sentences(found, problem)
        if not trim or not shorter:
            raise LanguageModelError(
                f"the description {unusable}: {_quote(text)}{_stopped(answer)}"
            )
        found = shorter
    if len(found.split()) < _FEWEST_DESCRIPTION_WORDS:
        raise LanguageModelError(f"the answer is no description: {_quote(text)}")
    return found


def clean_attribute(text: str) -> str:
    """Normalise an attribute: one line, no bullet, quotes, mark-up, leading "has", final stop."""
    text = re.sub(r"\*\*|__|`", "", _one_line(text))
    bullet = _BULLET.match(text)
    text = (bullet[1] if bullet else text).rstrip(_AROUND)
    text = re.sub(rf"^(?:(?!\.\d)[{re.escape(_AROUND)}])+", "", text)  # but ".5 cm"
    return _LEADING.sub("", text)


def _one_line(text: str) -> str:
    """Normalise a text to NFC without control characters and repeated spaces."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(char)[0] == "C" else char for char in text)
    return " ".join(text.split())


def _plain(answer: Answer) -> str:
    """Return the answer without its thinking; raises for a refusal or nothing."""
    text = _END.sub("", _CHANNEL.sub("", _UP_TO_FINAL.sub("", answer.text)))
    text = _OPEN_THINKING.sub("", _THINKING.sub("", text)).strip()
    if answer.finish == "refusal":
        raise LanguageModelError(f"the model refused: {_quote(text or 'no reason given')}")
    if not text:
        reason = "all its tokens went into thinking" if answer.text.strip() else "no text"
        if answer.finish == "length":
            reason += f"{_stopped(answer)}: raise --language_model.max_tokens"
        raise LanguageModelError(f"the answer is empty ({reason})")
    refusal = _REFUSAL.search(text[:300])
    if not refusal and len(bullets(text)) < 2:
        refusal = _PARDON.search(text[:300])
    if refusal and "[" not in text:
        raise LanguageModelError(f"the model refused: {_quote(text)}")
    return text


def _stopped(answer: Answer) -> str:
    """What ends a message about an answer that the model did not finish; else ""."""
    return "; the model stopped at its length limit" if answer.finish == "length" else ""


def _usable(items: Sequence[str], class_name: str, cut: bool) -> Attributes:
    """Tell the attributes of a list from what is dropped."""
    kept: dict[str, str] = {}
    dropped: list[tuple[str, str]] = []
    for item in items:
        attribute = clean_attribute(item)
        key = comparable(attribute)
        problem = _problem(attribute, class_name)
        if problem is None and key in kept:
            problem = "repeated"
        if problem is None and len(kept) == MAX_ATTRIBUTES:
            problem = f"more than {MAX_ATTRIBUTES}"
        if problem is None:
            kept[key] = attribute
        else:
            item = whole_characters(item)  # JSON in an answer may hold an escaped half
            dropped.append((item if len(item) <= 80 else f"{item[:80]}...", problem))
    return Attributes(tuple(kept.values()), tuple(dropped), cut)


def _too_few(found: Attributes, items: Sequence[str], minimum: int, answer: Answer) -> str:
    """Say why there are fewer attributes than needed; "": there are not."""
    if len(found.kept) >= minimum:
        return ""
    why = "; ".join(f"{_quote(item, 40)} is {problem}" for item, problem in found.dropped[:4])
    ended = _stopped(answer) or ("; it is cut off" if found.cut else "")
    if not items and not ended:
        why = "its list is empty"
    return (
        f"{len(found.kept)} usable attribute(s) in the answer, at least {minimum} needed"
        + (f" ({why})" if why else "")
        + ended
    )


def _description_text(text: str) -> tuple[str, bool]:
    """Find the description of an answer: (its words, whether it was cut off)."""
    first, other = "", False
    for value, _ in json_values(text):
        found = _described(value)
        if len(found.split()) >= _FEWEST_DESCRIPTION_WORDS:  # else maybe an echo of the form
            return found, False
        first = first or found
        # [1] is a mark in a text
        other = other or not _only_numbers(value)
    if first:
        return first, False
    if other:
        raise LanguageModelError(f"the answer holds no description but {_quote(text)}")
    match = re.search(r'"description"\s*:\s*"((?:[^"\\]|\\.)*)', text)
    if match:
        return unescape(match[1]), True
    plain = FENCE.sub("", text).strip()
    if plain.startswith(("{", "[")):
        raise LanguageModelError(f"the answer is broken JSON: {_quote(text)}")
    if len(bullets(plain)) >= 2:
        raise LanguageModelError(f"the answer is a list, not a description: {_quote(text)}")
    while (heading := _HEADING.match(plain)) and _is_heading(heading[0]):
        plain = plain[heading.end() :]
    return plain, False


def _is_heading(line: str) -> bool:
    return line.rstrip(" *_\n").endswith(":") or len(line.split()) <= _HEADING_WORDS


def _described(value: Any) -> str:
    """Return the description that a JSON value holds; "": it holds none."""
    if isinstance(value, dict):
        if isinstance(value.get("description"), str):
            return str(value["description"])
        value = list(value.values())
    return value[0] if len(value) == 1 and isinstance(value[0], str) else ""


def _only_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)


def _whole_sentences(text: str, problem: Callable[[str], str]) -> str:
    """Return the leading sentences that have no ``problem``; empty: not even the first."""
    kept = ""
    for match in re.finditer(r"[.!?](?=\s|$)", text):
        if problem(text[: match.end()]):
            break
        kept = text[: match.end()]
    return kept


def _problem(attribute: str, class_name: str) -> str | None:
    """Say why a text is no attribute; None: it is one."""
    if not attribute:
        return "empty"
    if len(attribute) > MAX_CHARACTERS or len(attribute.split()) > MAX_WORDS:
        return f"too long ({len(attribute)} characters, {len(attribute.split())} words)"
    if _other_script(attribute):
        return "not in English"
    if not re.search(r"[A-Za-z]{2}", attribute):
        return "no words"
    if comparable(attribute) == comparable(normalised_name(class_name)):
        return "the name of the class"
    if _NOT_AN_ATTRIBUTE.search(attribute) or _REFUSAL.search(attribute):
        return "not about an attribute"
    return None


def _other_script(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    other = sum(char > "ɏ" for char in letters)  # beyond Latin Extended-B
    return bool(letters) and other > 0.3 * len(letters)


def _is_foreign(text: str) -> bool:
    """Whether a text is in another language, as far as script and frequent words tell."""
    if _other_script(text):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    foreign = sum(word in _FOREIGN for word in words)
    return foreign >= 2 and foreign > sum(word in _ENGLISH for word in words)


def _quote(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= length else f"{text[:length]}...")
