"""README.md's examples without a server run as they are written, but for the model. The one with a server is in
test_end_to_end.py, which has one."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import jaxserve

pytestmark = pytest.mark.model
EXAMPLES: list[str] = re.findall(
    r"^```python\n(.*?)^```$",
    (Path(__file__).parents[1] / "README.md").read_text("utf-8"),
    re.DOTALL | re.MULTILINE,
)[1:]
SMALL = {"max_model_len": 256, "max_num_seqs": 1, "max_num_batched_tokens": 8}


@pytest.mark.heavy
def test_the_examples_without_a_server(
    demo_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jaxserve, "LLM", functools.partial(jaxserve.LLM, **SMALL))
    namespace: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(example.replace("path/to/model", str(demo_model_path)), namespace)  # noqa: S102
    story, person = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert story.strip()
    assert re.fullmatch(r"name='.*' age=-?\d+", person)
