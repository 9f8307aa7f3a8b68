"""Make tests/data/demo_tokens.json: what transformers' tokenizer of the demo model makes of texts.

Needs the model as a Hugging Face directory (the GGUF file's tokenizer is what is tested with it):
    python scripts/make_tokenizer_reference.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

FILE = Path(__file__).parents[1] / "tests" / "data" / "demo_tokens.json"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and\ttabs\t\t",
    "line\nbreaks\r\n\r\n\nend\n",
    "I'll say it isn't WE'RE'VE don't",
    "1234567890 12 3.14159 1e-9 1,000,000",
    "def f(x: int) -> str:\n    return f'{x!r}'  # 🎉\n",
    "日本語のテキスト、中文和한국어",
    "Zażółć gęślą jaźń Ελληνικά العربية עברית हिन्दी",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u00e9 \ufffd \u200b\ufeff",
    "a\x00b\x01\x7f",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><|unknown|>",
    "<|im_start |> <im_start> |im_end|>",
    "x" * 300,
    "\U0010ffff\ue000",
]


def main(directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=True).input_ids
        plain = tokenizer(text, add_special_tokens=False).input_ids
        rows.append(
            {
                "text": text,
                "ids": ids,
                "ids_without_special": plain,
                "decoded": tokenizer.decode(plain),
                "decoded_without_special": tokenizer.decode(plain, skip_special_tokens=True),
            }
        )
    FILE.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
