"""Reading attributes and descriptions out of what models write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.language_models.base import Answer
from dvla_fast.semantics.parsing import (
    DESCRIPTION_WORDS,
    clean_attribute,
    parse_attributes,
    parse_description,
)

GOOD = ("long hooked bill", "dark brown wings", "white face")


def kept(text: str, **options: Any) -> tuple[str, ...]:
    return parse_attributes(Answer(text), options.pop("name", "Albatross"), **options).kept


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        json.dumps({"attributes": GOOD}),
        json.dumps({"class": "Albatross", "key features": GOOD}),
        json.dumps([{"attribute": item, "confidence": 0.5} for item in GOOD]),
        json.dumps([GOOD[:1], GOOD[1:]]),
        f"```json\n{json.dumps(list(GOOD), indent=2)}\n```",
        f"Here is the list:\n```\n{json.dumps({'attributes': GOOD})}\n```\nI hope it helps!",
        f"The {{answer}} is {json.dumps(GOOD)}.",
        f"<think>[\"no\", \"not this\"] hmm</think>\n{json.dumps(GOOD)}",
        f"The first is [\"no\", \"not this\"] hmm\n</think>\n{json.dumps(GOOD)}",
        f"<THINK>a</THINK> b </thinking>{json.dumps(GOOD)}",
        "1. long hooked bill\n2. dark brown wings\n3. white face",
        "Attributes:\n\n- **long hooked bill**\n- dark brown wings.\n* white face;\n",
        "• long hooked bill\n• dark brown wings\n• white face\n\nLet me know!",
        "a) long hooked bill\nb) dark brown wings\nc) white face",
        "+ long hooked bill\n+ dark brown wings\n+ white face",
        "Attributes:\n\nlong hooked bill\ndark brown wings\nwhite face",
        "| Attribute |\n|:---|\n| long hooked bill |\n| dark brown wings |\n| white face |",
        "long hooked bill, dark brown wings, white face",
        "The key attributes of the bird are long hooked bill, dark brown wings, and white face.",
        json.dumps([" Long   hooked bill. ", "\"dark brown wings\"", "white\tface"]),
    ],
)  # fmt: skip
def test_forms_of_a_list(text: str) -> None:
    assert tuple(item.lower() for item in kept(text)) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        str(list(GOOD)),
        str({"attributes": list(GOOD), "confidence": None}),
        f"```python\n{list(GOOD)}\n```",
        '["long hooked bill", "dark brown wings", "white face",]',
        '["long hooked\n bill", "dark brown wings", "white face"]',
    ],
)
def test_lists_that_are_nearly_json(text: str) -> None:
    assert kept(text) == GOOD
    assert not parse_attributes(Answer(text), "Albatross").cut


def test_quotes_of_python() -> None:
    assert kept("""["the bird's bill", 'a "hooked" tip']""") == (
        "the bird's bill",
        'a "hooked" tip',
    )


@pytest.mark.parametrize(
    "text",
    [
        "['long hooked bill', 'dark brown wings', 'white fa",
        "{'attributes': ['long hooked bill', 'dark brown wings', 'white face'",
        "{'long hooked bill', 'dark brown wings', 'white face'}",
        "[long hooked bill, dark brown wings, white face]",
        "['a b': 'c d', 'e f']",
        "[" * 50 + "'long bill', 'dark wings', 'white face'" + "]" * 50,
    ],
)
def test_pieces_of_lists_are_no_attributes(text: str) -> None:
    with pytest.raises(LanguageModelError, match="holds no list"):
        kept(text)


@pytest.mark.parametrize("depth", [500, 5_000, 50_000])
def test_deep_lists_are_no_crash(depth: int) -> None:
    with pytest.raises(LanguageModelError, match=r"holds no list|list is empty"):
        kept("[" * depth + "]" * depth + ' {"a": 1}')


@pytest.mark.parametrize(
    "thinking",
    [
        '◁think▷ hm ["no", "not this"] ◁/think▷',
        '[THINK]hm ["no", "not this"][/THINK]',
        '<reasoning>["no", "not this"]</reasoning>',
        '<thought>["no", "not this"]</thought>\n',
        '<reflection>["no", "not this"]</reflection>',
        '["no", "not this"]◁/think▷',
        '<|channel|>analysis<|message|>["no", "not this"]<|end|><|start|>assistant'
        "<|channel|>final<|message|>",
        '<|channel|>final<|message|>["no", "not this"]<|end|><|start|>assistant'
        "<|channel|>final <|constrain|>json<|message|>",
    ],
)
def test_thinking_is_no_answer(thinking: str) -> None:
    assert kept(thinking + json.dumps(GOOD)) == GOOD
    assert kept(thinking + json.dumps(GOOD) + "<|return|>") == GOOD
    assert parse_description(Answer(thinking + TEXT)) == TEXT


@pytest.mark.parametrize("open_", ["◁think▷", "[THINK]", "<|channel|>analysis<|message|>"])
def test_thinking_without_an_end(open_: str) -> None:
    with pytest.raises(LanguageModelError, match="went into thinking"):
        kept(f"{open_}{json.dumps(GOOD)}")


@pytest.mark.parametrize(
    "text",
    [
        "Based on sources [1] and [2]: {}",
        'I answer in the form {{"attributes": ["...", "..."]}}:\n{}',
        '["uno con el pico", "dos con las alas"]\n{}',
    ],
)
def test_the_first_list_that_can_be_used_counts(text: str) -> None:
    assert kept(text.replace("{{", "{").replace("}}", "}").replace("{}", json.dumps(GOOD))) == GOOD


def test_bullets_after_lists_without_words() -> None:
    bulleted = "\n".join(f"- {item}" for item in GOOD)
    assert kept(f"From [1]:\n{bulleted}") == GOOD
    with pytest.raises(LanguageModelError, match="1 usable"):
        kept(f'["red bill"]\n{bulleted}')  # what follows a list with words is about it


def test_an_apology_before_a_list_is_no_refusal() -> None:
    bulleted = "\n".join(f"- {item}" for item in GOOD)
    assert kept(f"Here's the list you wanted, sorry, I was slow:\n{bulleted}") == GOOD
    for text in (f"Sorry, I cannot see it. In general:\n{bulleted}", "Sorry, I do not see it."):
        with pytest.raises(LanguageModelError, match="the model refused"):
            kept(text)


def test_sure_footed() -> None:
    found = parse_attributes(Answer('["sure-footed stance", "red bill", "sure, a bill"]'), "x")
    assert found.kept == ("sure-footed stance", "red bill")
    assert found.dropped == (("sure, a bill", "not about an attribute"),)


def test_letters_of_other_scripts_are_few() -> None:
    found = parse_attributes(Answer('["β-carotene in the bill", "40-50 mm 长嘴", "red legs"]'), "x")
    assert found.kept == ("β-carotene in the bill", "red legs")
    assert found.dropped == (("40-50 mm 长嘴", "not in English"),)


@pytest.mark.parametrize(
    "text",
    [
        "**Plumage**\nblack\n\n**Bill**\nthick",
        "Bill\nred\nWings\nblack",
        "A large black bird\nwith a thick bill\nand a long tail",
        "A large black bird\nflying over the sea\nin the evening sun",
        "It is a bird\nThey fly well\nThis is big",
        "black plumage\nthick bill",
        "Bill shape\nlong and hooked\n\nWing colour\ndark brown",
        "| Part | Look |\n|---|---|\n| bill | red |\n| wings | black |",
    ],
)
def test_lines_that_may_be_something_else(text: str) -> None:
    with pytest.raises(LanguageModelError, match="holds no list"):
        kept(text)


def test_key_and_text_of_an_object() -> None:
    assert kept('{"bill": "long and hooked", "face": "white"}') == (
        "bill: long and hooked",
        "face: white",
    )


def test_cut_off_json_keeps_what_is_complete() -> None:
    text = '{"attributes": ["long \\"hooked\\" bill", "dark brown wings", "white fa'
    found = parse_attributes(Answer(text, "length"), "Albatross")
    assert found.kept == ('long "hooked" bill', "dark brown wings")
    assert found.cut
    with pytest.raises(LanguageModelError, match="1 usable attribute"):
        kept('["long bill", "dark bro')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"attribute": "red bill", "reason": "clear"}, {"attribute": "black wi', ("red bill",)),
        (
            '{"attributes": [{"name": "bill", "text": "red bill"}, {"name": "wing", "text": "bla',
            ("red bill",),
        ),
        ('{"head": ["yellow crown", "red eye"], "tail": ["fork', ("yellow crown", "red eye")),
        ('{"bill": "red", "wing": "black", "tail": "fo', ("bill: red", "wing: black")),
        ('{"class": "crow", "attributes": ["red bill", "a [or {a", "whi', ("red bill", "a [or {a")),
        ('[{"text": "red bill", "reason": "x, y"}, {"text": "eye }"},]', ("red bill", "eye }")),
    ],
)  # fmt: skip
def test_broken_json_keeps_whole_members(text: str, expected: tuple[str, ...]) -> None:
    found = parse_attributes(Answer(text, "length"), "Albatross", minimum=1)
    assert (found.kept, found.cut) == (expected, True)


def test_an_incomplete_member_is_no_attribute() -> None:
    with pytest.raises(LanguageModelError, match="holds no list"):
        kept('[{"name": "wing", "part": "wing", "text": "black wi', minimum=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[{"name": "bill", "value": "red"}, {"name": "eye", "value": "black"}]',
            ("bill: red", "eye: black"),
        ),
        ('[{"bill": "red"}, {"eye": "black", "confidence": 1}]', ("bill: red", "eye: black")),
        (
            '{"head": ["yellow crown", "black mask"], "wings": ["white bars", "long primaries"],'
            ' "tail": ["forked tail"], "sources": ["a photograph"]}',
            ("yellow crown", "black mask", "white bars", "long primaries", "forked tail"),
        ),
        ('{"class": "crow", "color": "black"}', ("color: black",)),
        (
            '[{"name": "Plumage", "description": "dark brown overall"},'
            ' {"attribute": "Bill", "details": "long and hooked"},'
            ' {"attribute": "Face", "description": "a white face"},'
            ' {"category": "Legs", "value": "pink"}, {"feature": "tail", "text": "short"}]',
            ("Plumage: dark brown overall", "Bill: long and hooked", "a white face", "Legs: pink",
             "tail: short"),
        ),
        (
            json.dumps([{"name": "red bill", "description": "word " * 20}, {"name": "wing"}]),
            ("red bill", "wing"),
        ),
        ('{"attributes": {"bill": "red", "wings": "dark"}}', ("bill: red", "wings: dark")),
        ('{"attributes": {"bill": "red"}}', ("bill: red",)),
        ('{"crow": {"attributes": {"bill": "red", "class": "x"}}}', ("bill: red",)),
        (
            '{"bill": "red", "wings": {"tip": "black", "shape": "long"}}',
            ("bill: red", "wings tip: black", "wings shape: long"),
        ),
        ('{"answer": {"class": "crow", "features": ["red bill"]}}', ("red bill",)),
        ('[{"name": "Bill", "features": ["red tip", "long hook"]}]', ("red tip", "long hook")),
        ('{"Class name": "crow", "color": "black", "confidence": 0.5}', ("color: black",)),
    ],
)  # fmt: skip
def test_keys_of_objects(text: str, expected: tuple[str, ...]) -> None:
    assert kept(text, minimum=1) == expected


def test_numbers_and_initials_are_no_bullets() -> None:
    items = (
        "3.5 cm long hooked bill", "16:9 screen", "4.6 litre V8 badge", "C. elegans-like body",
        "a) wide tail", ".5 cm dots", "2.5 m wingspan",
    )  # fmt: skip
    assert kept(json.dumps(items)) == items
    assert kept("\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))) == items
    assert clean_attribute("1. 2.5 m wingspan") == "2.5 m wingspan"
    assert clean_attribute("1.long bill") == "long bill"
    assert kept("a) long bill, b) dark wings, c) white face") == (
        "long bill", "dark wings", "white face",
    )  # fmt: skip


def test_repeated_and_useless_attributes_are_dropped_with_a_reason() -> None:
    items = [
        "long bill", "Long  Bill.", "the long bill", "", "  ", "albatross", "The Albatross", "N/A",
        "the image shows a bird", "I cannot tell", "x" * 10_000, "word " * 17, "长长的嘴", "12",
        "...", 7, None, "has white face",
    ]  # fmt: skip
    found = parse_attributes(Answer(json.dumps(items)), "003.Albatross")
    assert found.kept == ("long bill", "white face")
    reasons = [reason for _, reason in found.dropped]
    assert reasons == [
        "repeated", "repeated", "empty", "empty", "the name of the class", "the name of the class",
        "no words", "not about an attribute", "not about an attribute",
        "too long (10000 characters, 1 words)", "too long (84 characters, 17 words)",
        "not in English", "no words", "empty", "no words", "not about an attribute",
    ]  # fmt: skip
    assert max(len(text) for text, _ in found.dropped) < 100


def test_endless_lists_end() -> None:
    found = parse_attributes(Answer(json.dumps([f"mark number {i}" for i in range(500)])), "x")
    assert len(found.kept) == 64
    assert found.dropped[0][1] == "more than 64"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(""), r"the answer is empty \(no text\)"),
        (
            Answer("", "length"),
            r"empty \(no text; the model stopped at its length limit: raise --language_model.max_t",
        ),
        (Answer("<think>so much to think about"), "went into thinking"),
        (Answer("", "refusal"), "the model refused: 'no reason given'"),
        (Answer("No.", "refusal"), "the model refused: 'No.'"),
        (Answer("I'm sorry, but I can't identify this."), "the model refused: \"I'm sorry"),
        (Answer("As an AI, I do not see images."), "the model refused"),
        (Answer("It is a bird. It flies well. It is big."), "holds no list .* 'It is a bird"),
        (Answer("42"), "holds no list of attributes but '42'"),
        (Answer('{"attributes": "none"}'), "holds no list"),
        (Answer("[]"), r"0 usable attribute.* at least 2 needed \(its list is empty\)"),
        (Answer('["red cap", "lo', "length"), "1 usable .* 2 needed; the model stopped at its le"),
        (Answer('["red cap", "lo'), "1 usable .* 2 needed; it is cut off$"),
        (Answer('["red cap"]'), "1 usable .* 2 needed$"),
        (Answer("The bird has", "length"), "no list .*'; the model stopped at its length limit$"),
        (Answer('["", "albatross", "fine bill"]'), r"1 usable .*'' is empty; 'albatross' is the"),
        (Answer('["长嘴", "白脸"]'), "'长嘴' is not in English"),
        (Answer('["pico largo y curvo", "alas con manchas", "cara muy blanca"]'), "not in English"),
        (Answer('["langer Schnabel mit Haken", "Flügel und Schwanz"]'), "not in English"),
        (Answer(f'["{"x" * 10_000}"]'), r"too long \(10000 characters"),
    ],
)  # fmt: skip
def test_unusable_answers_say_what_came(answer: Answer, message: str) -> None:
    with pytest.raises(LanguageModelError, match=message) as caught:
        parse_attributes(answer, "Albatross")
    assert len(str(caught.value)) < 400


def test_deeply_nested_json_is_no_crash() -> None:
    with pytest.raises(LanguageModelError, match="holds no list"):
        kept("[" * 100_000)


def test_english_with_words_of_other_languages() -> None:
    items = ("y-shaped tail", "y-shaped crest plus spots", "plus-shaped marks")
    assert kept(json.dumps(items)) == items


def test_clean_attribute() -> None:
    assert clean_attribute("3) **Bill**: long\u200b\nand  curved.") == "Bill: long and curved"
    assert clean_attribute("It has a red cap") == "a red cap"
    assert clean_attribute("café-brown wings") == "café-brown wings"


TEXT = "A large seabird with a long hooked bill, dark wings and a white face."


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"Description: {TEXT}",
        f'"{TEXT}"',
        f"So I write [one] text.</think>{TEXT}",
        TEXT.replace(" with", "\x1b\u202e with"),
        json.dumps({"description": TEXT.replace(" with", "\x1b\ud83d with")}),
        json.dumps({"description": TEXT}),
        json.dumps({"text": TEXT}),
        json.dumps([TEXT]),
        f"```json\n{json.dumps({'description': TEXT})}\n```",
        f"Sure!\n{json.dumps({'description': TEXT})}",
        TEXT.replace(" with", "\n  with"),
        str({"description": TEXT}),
        f"Here is the description:\n\n{TEXT}",
        f"**Here is the description:**\n{TEXT}",
        f"Sure! Here is a description: {TEXT}",
        f"Certainly, here's the text: {TEXT}",
        f"# Albatross\n\n## Looks\n{TEXT}",
        f"**Albatross**\n \n{TEXT}",
        f'In the form {{"description": "..."}}:\n{json.dumps({"description": TEXT})}',
        json.dumps({"description": f"Here is the description: {TEXT}"}),
        f'{{"attributes": ["a", "b"]}}\n{json.dumps({"description": TEXT})}',
    ],
)
def test_forms_of_a_description(text: str) -> None:
    assert parse_description(Answer(text)) == TEXT


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("Of course, this bird is black: it has long legs.", "this bird is black: it has"),
        ("Here is a crow with black wings: glossy, with a stout bill.", "Here is a crow with"),
        ("**A large black bird with a stout bill**\nand a fan-shaped tail.", "A large black bird"),
        ("# A large black bird with a stout bill and a tail.\nIt croaks.", "A large black bird"),
    ],
)
def test_no_text_of_a_description_is_taken_for_words_around_it(text: str, start: str) -> None:
    found = parse_description(Answer(text))
    assert found.startswith(start)
    assert found.endswith(text[-8:])


def test_a_json_description_is_refused_for_what_is_wrong_with_it() -> None:
    with pytest.raises(LanguageModelError, match="not in English"):
        parse_description(Answer('{"description": "一只黑色的鸟，翅膀很长。"}'))
    with pytest.raises(LanguageModelError, match="the answer is no description"):
        parse_description(Answer('{"description": "Black bird."}'))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer("I cannot help with that."), "refused"),
        (Answer("A bird."), "no description: 'A bird.'"),
        (Answer('["a", "b"]'), "holds no description but"),
        (Answer('{"attributes": ["a"]}'), "holds no description but"),
        (Answer("{broken"), "broken JSON"),
        (Answer("1. a long bill\n2. dark wings"), "a list, not a description"),
        (Answer("Un ave con el pico muy largo y las alas grandes."), "not in English"),
        (Answer("一种大型海鸟，长着钩状的喙"), "not in English"),
        (Answer("A large seabird with a long", "length"), "is cut off: .* stopped at its length"),
        (Answer('{"description": "A large seabird with'), "is cut off"),
        (Answer("word " * 100), "is 100 words long, at most 60"),
    ],
)
def test_unusable_descriptions(answer: Answer, message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        parse_description(answer)
    with pytest.raises(LanguageModelError, match=message):
        parse_description(answer, trim=True)


def test_marks_and_colons_in_a_description_stay() -> None:
    for text in (
        "A large seabird [1] with a long hooked bill [2, 3].",
        "Sure-footed goat: two curved horns and a shaggy beard.",
        "Two forms: one has dark wings, the other a white face.",
    ):
        assert parse_description(Answer(text)) == text


def test_a_description_may_be_too_long_for_its_reader() -> None:
    def too_long(text: str) -> str:
        return "is long" if len(text) > 2 * len(TEXT) + 1 else ""

    text = " ".join([TEXT] * 3)
    with pytest.raises(LanguageModelError, match="the description is long: 'A large"):
        parse_description(Answer(text), too_long=too_long)
    assert parse_description(Answer(text), trim=True, too_long=too_long) == f"{TEXT} {TEXT}"
    with pytest.raises(LanguageModelError, match="the description is long"):
        parse_description(Answer(TEXT), trim=True, too_long=lambda text: "is long")


def test_long_descriptions_are_trimmed_to_whole_sentences_when_asked() -> None:
    text = " ".join([TEXT] * 6)
    with pytest.raises(LanguageModelError, match="words long"):
        parse_description(Answer(text))
    shorter = parse_description(Answer(text), trim=True)
    assert shorter == " ".join([TEXT] * 4)
    assert len(shorter.split()) <= DESCRIPTION_WORDS
    cut = Answer(f'{{"description": "{TEXT} It also', "length")
    assert parse_description(cut, trim=True) == TEXT
