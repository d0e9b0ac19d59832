"""What a server says when it does not answer: in which words, and what of a request it refuses."""

from __future__ import annotations

import base64
import email.utils
import json
import math
import os
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
# What servers may refuse although the protocol has it.
OPTIONAL = ("response_format", "seed", "temperature", "max_tokens")
# 500: what llama.cpp answers to a schema that it cannot follow.
_REFUSING_STATUS = (400, 404, 415, 422, 500, 501)
_SCHEMA_WORDS = r"response_format|json[_ ]schema|structured(?:_\w+)?|guided(?:_\w+)?|grammar"
# A number that does not fit, of a parameter that the server knows.
_TOO_LONG = re.compile(r"too (?:large|long)|context (?:length|window)", re.IGNORECASE)
_MODERATED = re.compile(r"moderation|flagged|content[ _]policy", re.IGNORECASE)
# Where servers put their words, from OpenAI's {"error": {"message": ...}} to FastAPI's "detail".
_WORDS = ("error", "errors", "message", "detail", "msg", "metadata", "raw")


def words(value: Any) -> str:
    """Return the words of a decoded error body, whatever its form; "" if none are found."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "; ".join(filter(None, map(words, value)))
    if not isinstance(value, Mapping):
        return ""
    found = ": ".join(dict.fromkeys(filter(None, (words(value.get(key)) for key in _WORDS))))
    place = value.get("loc")  # FastAPI's place of what it refuses: ["body", "seed"]
    return f"{'.'.join(map(str, place))}: {found}" if found and isinstance(place, list) else found


def body_text(failed: Any) -> str:
    """Return the words of an error's body, or the body itself; "" where it cannot be read."""
    try:
        text = str(failed.response.text).strip()
    except (AttributeError, RuntimeError):  # no reply, or one that was closed before it was read
        return ""
    try:
        return words(json.loads(text)) or text
    except (ValueError, RecursionError):
        return text


def said(error: object) -> str:
    """Return an error in the server's words, which the client library shows only some of."""
    status, text = getattr(error, "status_code", None), body_text(error)
    return f"Error code: {status} - {text}" if text else str(error)


def refused_parameters(failed: Any, sent: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the first parameter that an error is about, and how to send it instead (None: not).

    Args:
        failed: the client library's error.
        sent: how each optional parameter was sent; None: it was not.
    """
    if getattr(failed, "status_code", None) not in _REFUSING_STATUS:
        return {}
    text = f"{failed.param or ''} {body_text(failed) or failed}".lower()
    if _TOO_LONG.search(text):
        return {}
    for name in OPTIONAL:
        key = sent[name]
        pattern = _SCHEMA_WORDS if name == "response_format" else key
        if key is None or not re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text):
            continue
        renamed = name == key == "max_tokens" and "max_completion_tokens" in text
        return {name: "max_completion_tokens" if renamed else None}
    return {}


def too_long(failed: Any) -> bool:
    """Whether a request did not fit into what the model reads and writes."""
    return failed.status_code in (400, 413, 422) and bool(_TOO_LONG.search(body_text(failed)))


def moderated(failed: Any) -> bool:
    """Whether a server refuses what was asked, not who asks."""
    return bool(_MODERATED.search(body_text(failed)))


def retry_after(failed: Any) -> float | None:
    """Return the seconds that a server asks to wait: ``Retry-After`` in seconds or as a date."""
    response = getattr(failed, "response", None)
    value = None if response is None else response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def no_client(url: str, failed: Exception, text: str) -> str:
    """Return what to say where no connection can even be prepared, and ``text`` says why."""
    # of httpx or httpx2, as the version of openai has it; a proxy's address may be meant
    no_address = type(failed).__name__ == "InvalidURL"
    found = _set_here(*_PROXIES, *(() if no_address else _CERTIFICATES))
    check = f"; check the environment: it sets {found}" if found else ""
    if no_address:
        return (
            f"{url}: is no address; give --language_model.base_url or OPENAI_BASE_URL one such as "
            f"http://localhost:8000/v1{check}"
        )
    return f"{url}: cannot be asked from here ({text}){check}"


def unreachable(url: str, text: str) -> str:
    """Return what to say of a server that cannot be reached; ``text`` says why."""
    proxies = _set_here(*_PROXIES)
    check = f" (also check the proxy: the environment sets {proxies})" if proxies else ""
    return (
        f"{url}: the server cannot be reached ({text}); start it, or set --language_model.base_url "
        f"or OPENAI_BASE_URL to its address (usually ending in /v1){check}; answers so far are kept"
    )


def _set_here(*names: str) -> str:
    both = (form for name in names for form in (name, name.lower()))
    return ", ".join(name for name in both if os.environ.get(name))


def userinfo_of(url: str) -> str:
    """Return "name:password" of an address, without a parser: it may not be a proper one."""
    found = re.match(r"(?:[a-zA-Z][\w+.-]*://)?(.*)@", url, re.DOTALL)
    return found[1] if found else ""


def secrets_of(key: str, userinfo: str) -> re.Pattern[str] | None:
    """Match what no message may show: the key, and name and password in any form they are sent."""
    password = userinfo.partition(":")[2]
    plain = urllib.parse.unquote(userinfo)
    basic = base64.b64encode(plain.encode(errors="replace")).decode()
    found = {key, userinfo, password, plain, plain.partition(":")[2], basic if userinfo else ""}
    # Placeholders such as "x" count as whole words only: the letter may be in every message.
    texts = [
        re.escape(item) if len(item) >= 8 else rf"(?<!\w){re.escape(item)}(?!\w)"
        for item in sorted(found - {""}, key=len, reverse=True)
    ]
    return re.compile("|".join(texts)) if texts else None
