"""From a language model's words to attributes and a description, or to what is wrong with them.

Models wrap JSON in prose and code fences, write numbered lists instead, stop in the middle, repeat
themselves, refuse, or answer in another language. What can be read without guessing is read; the
rest is an error that says what came, so that the model can be asked again and a person can see why.
"""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.characters import whole_characters
from dvla_fast.semantics.language_models.base import Answer
from dvla_fast.semantics.names import normalised_name

MAX_WORDS, MAX_CHARACTERS = 16, 160  # of an attribute
MAX_ATTRIBUTES = 64
DESCRIPTION_WORDS = 60  # CLIP reads 77 tokens
_FEWEST_DESCRIPTION_WORDS = 4

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
# Servers whose chat template holds the opening tag leave it out of the answer.
_OPEN_THINKING = re.compile(r"\A.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*\n?|```")
# "3. bill" and "16: bill", but not "3.5 cm" and "16:9".
_MARK = r"[-*•–▪◦]\s+|\(?\d{1,3}[.):](?!\d)\s*"
_BULLET = re.compile(rf"^\s*(?:{_MARK})(.+)$")
_LINE_BULLET = re.compile(rf"^\s*(?:{_MARK}|[a-zA-Z][.)]\s+)(.+)$")  # "a) bill" too: lines only
# What a JSON text may end after, once it is cut off; a text that never ends runs to the end.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{},]', re.DOTALL)
_DEEPEST = 20
_AROUND = " \"'“”‘’*_•-–.,;:"
_COMPLETE_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?=[,\]])')
_REFUSAL = re.compile(
    r"\b(?:i['’]?m (?:very )?sorry|i am sorry|i apologi[sz]e|sorry, (?:but|i)|as an ai\b"
    r"|i (?:cannot|can['’]?t|can not|could not|am unable|['’]m unable|am not able|won['’]t)"
    r"|(?:unable|not able) to (?:help|assist|identify|provide|comply))",
    re.IGNORECASE,
)
_NOT_AN_ATTRIBUTE = re.compile(
    r"^(?:none|unknown|n/?a|null|nil|other|others|etc|attributes?|candidates?|features?|text|\W*"
    r"|attribute ?\d+)$"
    r"|^(?:the|this|these|in the|given|provided) (?:given |provided )?(?:image|photo|picture)s?\b"
    r"|^(?:here (?:are|is)|sure|certainly|of course|based on|let me)\b"
    r"|\bnot (?:visible|provided|applicable|available|possible)\b|https?://",
    re.IGNORECASE,
)
_LEADING = re.compile(r"^(?:it |they )?(?:has|have|having|with|its|their)\s+", re.IGNORECASE)
_LIST_KEYS = ("attributes", "candidates", "features", "characteristics", "answer", "items", "list")
_TEXT_KEYS = ("attribute", "text", "name", "feature", "value", "description")
_LABEL_KEYS = ("name", "attribute", "feature", "part", "key")  # of a "value"
# Keys that say something about the answer or the class instead of what it looks like.
_OTHER_KEYS = frozenset(
    (
        *("class", "class name", "name", "label", "species", "category", "object", "id"),
        *("description", "summary", "reason", "reasons", "reasoning", "explanation", "evidence"),
        *("confidence", "score", "note", "notes", "comment", "source", "sources", "references"),
    )
)
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

    Understood are a JSON list, an object that holds one, either inside prose or code fences, one
    that is cut off (its complete members count), an object of parts and their texts, bulleted and
    numbered lists, and a sentence that enumerates after "are", "include" or a colon.

    Args:
        class_name: no attribute by itself.
        minimum: attributes that must remain.

    Raises:
        LanguageModelError: a refusal, no list, another language, or fewer than ``minimum`` left;
            says what came.
    """
    text = _plain(answer)
    items, cut = _items(text)
    if items is None:
        raise LanguageModelError(
            f"the answer holds no list of attributes but {_quote(text)}{_stopped(answer)}"
        )
    kept: dict[str, str] = {}
    dropped: list[tuple[str, str]] = []
    for item in items:
        attribute = clean_attribute(item)
        key = _comparable(attribute)
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
    if _is_foreign(" ".join(kept.values())):
        raise LanguageModelError(f"the answer is not in English: {_quote(text)}")
    if len(kept) < minimum:
        why = "; ".join(f"{_quote(item, 40)} is {problem}" for item, problem in dropped[:4])
        ended = _stopped(answer) or ("; it is cut off" if cut else "")
        if not items and not ended:
            why = "its list is empty"
        raise LanguageModelError(
            f"{len(kept)} usable attribute(s) in the answer, at least {minimum} needed"
            + (f" ({why})" if why else "")
            + ended
        )
    return Attributes(tuple(kept.values()), tuple(dropped), cut or answer.finish == "length")


def parse_description(answer: Answer, *, trim: bool = False) -> str:
    """Read the description of an answer: an object that holds it, a JSON text, or plain prose.

    Args:
        trim: shorten a description that is too long or cut off to its whole sentences, where at
            least one fits; else it is an error.

    Raises:
        LanguageModelError: a refusal, a list, too short, too long, cut off, or another language.
    """
    text = _plain(answer)
    found, cut = _description_text(text)
    found = _one_line(found)
    found = re.sub(r"^\W*description\W*:\s*", "", found, flags=re.IGNORECASE)
    found = found.strip(" \"'“”*_`")
    cut = cut or answer.finish == "length"
    words = len(found.split())
    if _is_foreign(found):
        raise LanguageModelError(f"the description is not in English: {_quote(text)}")
    if words > DESCRIPTION_WORDS or (cut and not re.search(r"[.!?]$", found)):
        shorter = _whole_sentences(found)
        if not trim or not shorter:
            long = f"is {words} words long, at most {DESCRIPTION_WORDS} can be used"
            what = long if words > DESCRIPTION_WORDS else "is cut off"
            raise LanguageModelError(f"the description {what}: {_quote(text)}{_stopped(answer)}")
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
    text = _OPEN_THINKING.sub("", _THINKING.sub("", answer.text)).strip()
    if answer.finish == "refusal":
        raise LanguageModelError(f"the model refused: {_quote(text or 'no reason given')}")
    if not text:
        reason = "all its tokens went into thinking" if answer.text.strip() else "no text"
        if answer.finish == "length":
            reason += f"{_stopped(answer)}: raise --language_model.max_tokens"
        raise LanguageModelError(f"the answer is empty ({reason})")
    refusal = _REFUSAL.search(text[:300])
    if refusal and "[" not in text:
        raise LanguageModelError(f"the model refused: {_quote(text)}")
    return text


def _stopped(answer: Answer) -> str:
    """What ends a message about an answer that the model did not finish; else ""."""
    return "; the model stopped at its length limit" if answer.finish == "length" else ""


def _items(text: str) -> tuple[list[str] | None, bool]:
    """Find the list of an answer: (its texts, whether it was cut off)."""
    for value, cut in _json_values(text, mend=True):
        found = _texts(value)
        if found is not None:
            return found, cut
    if re.search(r'\[\s*"', text):
        complete = _COMPLETE_STRING.findall(text[text.index("[") :])
        if complete:
            return [_unescape(item) for item in complete], True
    lines = [line for line in _FENCE.sub("", text).splitlines() if line.strip()]
    bullets = [match[1] for line in lines if (match := _LINE_BULLET.match(line))]
    if len(bullets) >= 2:
        return bullets, False
    if re.search(r'\{\s*"', text):
        return None, True  # the commas are those of broken JSON
    return _enumeration(" ".join(lines)), False


def _json_values(text: str, *, mend: bool = False) -> Iterator[tuple[Any, bool]]:
    """Yield (value, whether it was cut off) of the JSON in a text, outermost first.

    Args:
        mend: yield the complete part of lists and objects that break off, too; else only whole
            ones, which may lie inside one that breaks off.
    """
    decoder = json.JSONDecoder()
    position, tries = 0, 0
    while tries < 50 and (match := re.compile(r"[\[{]").search(text, position)):
        tries += 1
        start = match.start()
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = match.end()
            if mend and re.match(r"[\[{]\s*[\"\[{]", text[start : start + 80]):
                value, closed = _mended(text, start)
                if value is not None:
                    yield value, True
                if value is not None or not closed:
                    return  # what lies inside belongs to something incomplete
            continue
        yield value, False


def _mended(text: str, start: int) -> tuple[Any, bool]:
    """Read the complete members of broken JSON: (value; None: there are none, its end came).

    Objects inside a list are members of it only when they are whole.
    """
    stack: list[str] = []
    ends: list[tuple[int, str]] = []
    for match in _JSON_TOKEN.finditer(text, start):
        token = match[0]
        if token in ("[", "{"):
            stack.append("]" if token == "[" else "}")
            if len(stack) > _DEEPEST:
                break
        elif token in ("]", "}"):
            stack.pop()
        if token in ("]", "}", ",") and "]}" not in "".join(stack):
            ends.append((match.start() + (token != ","), "".join(reversed(stack))))
        if not stack:
            break
    for end, closing in reversed(ends[-_DEEPEST:]):
        with contextlib.suppress(ValueError):
            return json.loads(text[start:end] + closing), not stack
    return None, not stack


def _texts(value: Any) -> list[str] | None:
    """Return the texts of a JSON value that is, or holds, a list; None: it does not."""
    if isinstance(value, dict):
        lists = [value[key] for key in _LIST_KEYS if isinstance(value.get(key), list)][:1]
        about = _about_looks(value)
        lists = lists or [item for item in about.values() if isinstance(item, list)]
        if lists:
            return [text for item in lists for text in _texts(item) or []]
        return _pairs(about) if len(value) >= 2 else None
    if not isinstance(value, list):
        return None
    found: list[str] = []
    for item in value:
        if isinstance(item, dict):
            found += _member_texts(item)
        elif isinstance(item, list):
            found += _texts(item) or []
        else:
            found.append(item if isinstance(item, str) else json.dumps(item))
    return found


def _member_texts(item: dict[str, Any]) -> list[str]:
    """Return the attributes in an object of a list: usually one."""
    labels = [item[key] for key in _LABEL_KEYS if isinstance(item.get(key), str)]
    if labels and isinstance(item.get("value"), str):
        return [f"{labels[0]}: {item['value']}"]
    texts = [item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)]
    found = texts[:1] or _texts(item) or _pairs(_about_looks(item))
    return found or [json.dumps(item, ensure_ascii=False)]


def _about_looks(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if _comparable(key) not in _OTHER_KEYS}


def _pairs(value: dict[str, Any]) -> list[str] | None:
    """Return {"bill": "red"} as "bill: red"; None: not all values are texts, or there are none."""
    if not value or not all(isinstance(item, str) for item in value.values()):
        return None
    return [f"{key}: {item}" for key, item in value.items()]


def _enumeration(text: str) -> list[str] | None:
    """Read "..., are a long bill, dark wings, and a white face": at least three short parts."""
    match = re.search(r"(?:\b(?:are|is|includes?|including|has|have)\b|:)\s+(.+)$", text)
    sentence = match[1] if match else text
    if re.search(r"[.!?]\s", sentence.strip()):
        return None  # several sentences: which of it is the list would be a guess
    parts = [re.sub(r"^and\s+", "", part.strip()) for part in re.split(r"[,;]", sentence)]
    if len(parts) < 3 or any(not 0 < len(part.split()) <= 8 for part in parts):
        return None
    bullets = [_LINE_BULLET.match(part) for part in parts]
    return [bullet[1] if all(bullets) and bullet else part for part, bullet in zip(parts, bullets)]


def _description_text(text: str) -> tuple[str, bool]:
    """Find the description of an answer: (its words, whether it was cut off)."""
    for value, _ in _json_values(text):
        if isinstance(value, dict):
            texts = [item for item in value.values() if isinstance(item, str)]
            if isinstance(value.get("description"), str):
                return value["description"], False
            if len(value) == 1 and texts:
                return texts[0], False
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return value[0], False
        raise LanguageModelError(f"the answer holds no description but {_quote(text)}")
    match = re.search(r'"description"\s*:\s*"((?:[^"\\]|\\.)*)', text)
    if match:
        return _unescape(match[1]), True
    plain = _FENCE.sub("", text).strip()
    if plain.startswith(("{", "[")):
        raise LanguageModelError(f"the answer is broken JSON: {_quote(text)}")
    if len([line for line in plain.splitlines() if _LINE_BULLET.match(line)]) >= 2:
        raise LanguageModelError(f"the answer is a list, not a description: {_quote(text)}")
    return plain, False


def _whole_sentences(text: str) -> str:
    """Return the leading sentences that fit into ``DESCRIPTION_WORDS``; empty: none does."""
    kept = ""
    for match in re.finditer(r".+?[.!?](?=\s|$)", text):
        if len(text[: match.end()].split()) > DESCRIPTION_WORDS:
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
    if _comparable(attribute) == _comparable(normalised_name(class_name)):
        return "the name of the class"
    if _NOT_AN_ATTRIBUTE.search(attribute) or _REFUSAL.search(attribute):
        return "not about an attribute"
    return None


def _comparable(text: str) -> str:
    text = re.sub(r"[\W_]+", " ", text).strip().casefold()
    return re.sub(r"^(?:an?|the) ", "", text)


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


def _unescape(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text.rstrip("\\")


def _quote(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= length else f"{text[:length]}...")
