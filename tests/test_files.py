"""What files hold, whatever is written into them."""

from __future__ import annotations

import json
import math

from dvla_fast.files import json_text


def test_json_has_no_infinity() -> None:
    value = {"a": math.inf, "b": [1.5, -math.inf, (math.nan, 2)], "c": None, "d": "Infinity"}
    expected = {"a": None, "b": [1.5, None, [None, 2]], "c": None, "d": "Infinity"}
    assert json.loads(json_text(value)) == expected
    assert json_text({"a": [0.1, 1]}, indent=2) == json.dumps({"a": [0.1, 1]}, indent=2)
