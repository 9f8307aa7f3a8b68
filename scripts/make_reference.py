"""Make tests/data/: what Hugging Face transformers computes, for our tests to compare with.

Needs torch, transformers and gguf, which jaxserve itself does not; run it in an environment that has them:
    python scripts/make_reference.py              (tiny random models)
    python scripts/make_reference.py MODEL.gguf   (these and the demo model)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.tiny_llama import BASE, VARIANTS, write_tiny_model  # noqa: E402

DATA = ROOT / "tests" / "data"
NUM_GREEDY = 64
LONG_STRIDE = 32  # of the positions of long prompts whose logits are stored
STRIDE = 97  # of the vocabulary ids whose logits are stored at every position

LONG = "The history of computing is longer than that of the electronic computer. " * 40
LOGIT_PROMPTS = [
    "The capital of France is",
    "Hello",
    LONG,
    "Zażółć gęślą jaźń; 日本語のテキスト; emoji 🎉👩‍👩‍👧 and ünïcödé",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 1, 2, 3, 5, 8, 13,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by the sea, there lived",
]
GREEDY_PROMPTS = [
    *LOGIT_PROMPTS[:2],
    *LOGIT_PROMPTS[3:],
    "The three primary colours are",
    "SELECT name FROM users WHERE",
    "Water boils at",
    "To make a good cup of tea,",
    "The largest planet in our solar system",
    "import numpy as np\n\ndef mean(values):",
    "Dear Sir or Madam,",
    "In 1969, the first human",
    "A list of fruits: apple, banana,",
    "The opposite of hot is",
    "Q: What is two plus two?\nA:",
    "She opened the door and",
    "Photosynthesis is the process by which",
]
QUESTIONS = ("Hi", "What is the capital of France?", "日本の首都は?", "  spaces  ", "line\nbreaks\n\n")
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": text}] for text in (*QUESTIONS, "12345 6.78e9", "🎉" * 5)
] + [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {i}?"}] for i in range(7)
] + [
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi! How can I help?"},
        {"role": "user", "content": f"Tell me about {topic}."},
    ]
    for topic in ("ships", "C++ templates", "naïve Bayes", "<|im_end|> tokens", "Ελλάδα", "a\tb")
]  # fmt: skip


def greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy continuation without stopping, and by how much each token won."""
    tokens, margins = [], []
    past, inputs = None, torch.tensor([ids])
    for _ in range(count):
        with torch.no_grad():
            out = model(inputs, past_key_values=past, use_cache=True)
        logits = out.logits[0, -1].float()
        best = torch.topk(logits, 2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        past, inputs = out.past_key_values, torch.tensor([[tokens[-1]]])
    return tokens, margins


def demo_model(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    arrays: dict[str, np.ndarray] = {}
    for i, prompt in enumerate(LOGIT_PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float().numpy()
        arrays[f"ids_{i}"] = np.array(ids, np.int32)
        arrays[f"last_{i}"] = logits[-1]
        arrays[f"strided_{i}"] = logits[:: max(1, len(ids) // 40), ::STRIDE]
    np.savez_compressed(DATA / "demo_logits.npz", **arrays)
    rows = []
    for prompt in GREEDY_PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        tokens, margins = greedy(model, ids, NUM_GREEDY)
        rows.append(
            {"prompt": prompt, "ids": ids, "tokens": tokens, "margins": [round(m, 6) for m in margins]}
        )
    (DATA / "demo_greedy.json").write_text(json.dumps(rows, ensure_ascii=False))
    chats = []
    for messages in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        chats.append({"messages": messages, "text": text, "ids": ids})
    (DATA / "demo_chats.json").write_text(json.dumps(chats, ensure_ascii=False))


def tiny_models() -> None:
    arrays: dict[str, np.ndarray] = {}
    rng = np.random.RandomState(7)
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as directory:
            path = write_tiny_model(Path(directory), variant)
            model = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        prompt = rng.randint(3, 320, 40)
        with torch.no_grad():
            logits = model(torch.tensor(prompt[None])).logits[0].float().numpy()
        arrays[f"{variant}/prompt"], arrays[f"{variant}/logits"] = prompt.astype(np.int32), logits
        for i, length in enumerate((3, 17, 40)):
            ids = rng.randint(3, 320, length)
            tokens, margins = greedy(model, ids.tolist(), 24)
            arrays[f"{variant}/greedy_{i}"] = np.array([*ids, *tokens], np.int32)
            assert min(margins) > 1e-4, f"{variant}: a tie; choose another seed"
    np.savez_compressed(DATA / "tiny_llama.npz", **arrays)


def stretched_model() -> None:
    """A prompt of twice the trained length, which dynamic scaling by a factor of 2 allows."""
    prompt = np.random.RandomState(11).randint(3, 320, 2 * BASE["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_model(Path(directory), "rope dynamic")
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    with torch.no_grad():
        logits = model(torch.tensor(prompt[None])).logits[0].float().numpy()
    logits = logits[LONG_STRIDE - 1 :: LONG_STRIDE]
    np.savez_compressed(DATA / "long_rope.npz", prompt=prompt.astype(np.int32), logits=logits)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    tiny_models()
    stretched_model()
    if len(sys.argv) > 1:
        demo_model(Path(sys.argv[1]).resolve())
