"""Make tests/data/tiny_beams.json and demo_beams.json: what Hugging Face transformers generates under beam search
and under the processors of scores, for our tests to compare with.

Needs torch, transformers and gguf, which jaxserve itself does not; run it in an environment that has them:
    python scripts/make_beam_reference.py                       (tiny random model)
    python scripts/make_beam_reference.py MODEL.gguf [FIRST LAST]   (demo model; prompts FIRST…LAST−1 only)

What to know about transformers' side:
- A search is repeated with noise in the scores, of the size by which two float32 implementations differ. A case
  whose beams the noise changes is a tie ("tie": true): either answer may be right. These searches, and those that
  differ in the length penalty alone, read the logits that an earlier search has left (`Remembered`).
- With k ≥ 2 ids that end a sequence transformers takes (1 + k) · width continuations a step instead of 2 · width,
  so that `width` of them can live on.
- Where fewer than `width` continuations are possible, transformers fills up with copies of score −1e9; no case here
  does that.
- A bad word that is only an end-of-sequence id is dropped by transformers; no case here has one. Its bad words
  also match across the border of prompt and output.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.tiny_beams import CHARACTERS, EOS, FIRST_CHARACTER, VOCAB_SIZE, write_beam_model  # noqa: E402

DATA = ROOT / "tests" / "data"
TINY_NOISE, DEMO_NOISE = 3e-5, 3e-4
DEMO_TOKENS = 32
Case = dict[str, Any]  # prompt, params (of SamplingParams), sequences, scores, ends, tie

TEXTS = [
    "Hello",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "🎉 Joyeux anniversaire à toi, ça fait déjà 10 ans que",
    "SELECT name FROM users WHERE",
    "1, 1, 2, 3, 5, 8, 13,",
]
QUESTIONS = [
    "What is 2+2? Answer with the number only.",
    "Is the sky blue? Answer yes or no.",
    "Say hello in French.",
    "Name one colour.",
]


# --- one search -----------------------------------------------------------------------------------------------


class Noise(LogitsProcessor):
    """Two implementations differ by about this much."""

    def __init__(self, size: float, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __call__(self, _: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores + self.size * torch.randn(scores.shape, generator=self.generator)


class AdditivePenalties(LogitsProcessor):
    """OpenAI's frequency and presence penalties; transformers has none."""

    def __init__(self, frequency: float, presence: float, num_prompt_tokens: int) -> None:
        self.frequency, self.presence, self.num_prompt_tokens = frequency, presence, num_prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        output = input_ids[:, self.num_prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class StopStrings(StoppingCriteria):
    """A stop string lies in the text of output token number `min_tokens` (from 1) and those after it."""

    def __init__(self, stop: tuple[str, ...], num_skipped: int) -> None:
        self.stop, self.num_skipped = stop, num_skipped

    def __call__(self, input_ids: torch.LongTensor, _: Any) -> torch.BoolTensor:
        texts = [tiny_text(row[self.num_skipped :]) for row in input_ids.tolist()]
        return torch.tensor([any(s in text for s in self.stop) for text in texts])


class Prefixes(LogitsProcessor):
    """Notes which tokens each step's rows have."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, ...]]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.steps.append([tuple(row) for row in input_ids.tolist()])
        return scores


class Remembered:
    """A model that answers from the logits of earlier searches and knows nothing else (`LookupError`)."""

    def __init__(self, model: Any) -> None:
        self.model, self.logits = model, dict[tuple[int, ...], torch.Tensor]()

    def remember(self, prefixes: Prefixes, logits: tuple[torch.Tensor, ...]) -> None:
        for rows, step in zip(prefixes.steps, logits, strict=True):
            self.logits |= zip(rows, step, strict=True)

    def __enter__(self) -> None:
        @functools.wraps(self.model.forward)  # transformers looks at the signature
        def forward(input_ids: torch.LongTensor, **_: Any) -> CausalLMOutputWithPast:
            rows = [self.logits[tuple(row)] for row in input_ids.tolist()]
            return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])

        self.model.forward = forward

    def __exit__(self, *_: object) -> None:
        del self.model.forward  # the class has its own


def tiny_text(ids: list[int]) -> str:
    return "".join(CHARACTERS[i - FIRST_CHARACTER] for i in ids if i >= FIRST_CHARACTER)


def search(
    memory: Remembered, prompt: list[int], params: dict[str, Any]
) -> tuple[list[list[int]], list[float]]:
    """Outputs (ids without the prompt) and scores, best first. Without `best_of`: greedy, no score."""
    try:
        with memory:
            return run(memory.model, prompt, params, use_cache=False)[:2]
    except LookupError:
        prefixes = Prefixes()
        outputs, scores, logits = run(memory.model, prompt, params, prefixes)
        memory.remember(prefixes, logits)
        return outputs, scores


def is_tie(memory: Remembered, prompt: list[int], params: dict[str, Any], noise: float) -> bool:
    """Whether noise leads the search elsewhere."""
    expected, _ = search(memory, prompt, params)
    with memory:
        for seed in range(3):
            try:
                found = run(memory.model, prompt, params, Noise(noise, seed), use_cache=False)
            except LookupError:
                return True
            if found[0] != expected:
                return True
    return False


def run(
    model: Any, prompt: list[int], params: dict[str, Any], *more: LogitsProcessor, use_cache: bool = True
) -> tuple[list[list[int]], list[float], tuple[torch.Tensor, ...]]:
    """transformers' `generate`: outputs, scores, and each step's logits."""
    width = params.get("best_of", 1)
    ends = [*([] if params.get("ignore_eos") else [EOS]), *params.get("stop_token_ids", ())]
    allowed = params.get("allowed_token_ids")
    processors = [
        AdditivePenalties(
            params.get("frequency_penalty", 0.0), params.get("presence_penalty", 0.0), len(prompt)
        ),
        *more,
    ]
    stop, min_tokens = params.get("stop"), params.get("min_tokens", 0)
    criteria = [StopStrings(stop, len(prompt) + max(min_tokens - 1, 0))] if stop else []
    bias = {(token_id,): float(value) for token_id, value in params.get("logit_bias", ())}
    config = GenerationConfig(
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=params["max_tokens"],
        min_new_tokens=min_tokens or None,
        eos_token_id=ends or None,
        pad_token_id=0,
        length_penalty=params.get("length_penalty", 1.0),
        early_stopping=params.get("early_stopping", False),
        repetition_penalty=params.get("repetition_penalty", 1.0),
        bad_words_ids=[list(word) for word in params.get("bad_words_token_ids", ())] or None,
        sequence_bias=bias or None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        use_cache=use_cache,
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria),
            prefix_allowed_tokens_fn=(lambda _, __: list(allowed)) if allowed else None,
        )
    outputs = [row[len(prompt) :] for row in out.sequences.tolist()]
    if width == 1:
        return outputs, [], out.logits
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    outputs = [row[:n] for row, n in zip(outputs, lengths, strict=True)]
    return outputs, out.sequences_scores.tolist(), out.logits


def make_case(memory: Remembered, prompt: list[int], params: dict[str, Any], noise: float) -> Case:
    """The search, and whether noise changes it."""
    sequences, scores = search(memory, prompt, params)
    tie = is_tie(memory, prompt, params, noise)
    case: Case = {
        "prompt": prompt,
        "params": params,
        "sequences": sequences,
        "scores": [round(score, 5) for score in scores],
        "ends": [end_of(row, params) for row in sequences],
    }
    return case | ({"tie": True} if tie else {})


def end_of(row: list[int], params: dict[str, Any]) -> tuple[str, int | str | None]:
    """finish_reason and stop_reason: end of sequence, stop ids, stop strings, length, in this order."""
    if row[-1] == EOS and not params.get("ignore_eos"):
        return "stop", None
    if row[-1] in params.get("stop_token_ids", ()):
        return "stop", row[-1]
    text = tiny_text(row[max(params.get("min_tokens", 0) - 1, 0) :]) if params.get("stop") else ""
    found = [s for s in params.get("stop", ()) if text.endswith(s)]
    return ("stop", found[0]) if found else ("length", None)


# --- tiny model -----------------------------------------------------------------------------------------------


def tiny_cases(rng: random.Random, likely: list[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Prompts and parameters: every width, penalty and rule of stopping, then each with something more.

    `likely` tokens are those that it makes a difference to forbid or to stop at.
    """

    def prompt() -> list[int]:
        return [rng.randrange(FIRST_CHARACTER, VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]

    def tokens(count: int) -> list[int]:
        return rng.sample(likely, count)

    def beams() -> dict[str, Any]:
        return {
            "use_beam_search": True,
            "temperature": 0.0,
            "best_of": rng.choice([2, 3, 4, 8]),
            "length_penalty": rng.choice([-0.5, 0.0, 0.6, 1.0, 1.5, 2.5]),
            "early_stopping": rng.choice([False, True, "never"]),
            "max_tokens": rng.choice([1, 2, 8, 16]),
        }

    for width, length_penalty, max_tokens in itertools.product(
        (2, 3, 4, 8), (-0.5, 0.0, 0.6, 1.0, 1.5), (5, 16)
    ):
        same = prompt()
        for early_stopping in (False, True, "never"):
            yield (
                same,
                beams()
                | {
                    "best_of": width,
                    "length_penalty": length_penalty,
                    "early_stopping": early_stopping,
                    "max_tokens": max_tokens,
                },
            )
    for length_penalty in (-0.5, -0.3, -0.1) * 8:  # here a longer hypothesis never scores better
        yield (
            prompt(),
            beams()
            | {
                "best_of": rng.choice([2, 3]),
                "length_penalty": length_penalty,
                "early_stopping": "never",
                "max_tokens": 60,
            },
        )
    more: dict[str, Any] = {
        "min_tokens": lambda: {"min_tokens": rng.randrange(1, 9), "max_tokens": rng.randrange(9, 16)},
        "repetition": lambda: {"repetition_penalty": rng.choice([0.8, 1.2, 1.5])},
        "additive": lambda: {
            "presence_penalty": rng.choice([-0.5, 1.0]),
            "frequency_penalty": rng.choice([0.0, 0.7]),
        },
        "bias": lambda: {"logit_bias": [[t, round(rng.uniform(-3, 3), 1)] for t in [EOS, *tokens(4)]]},
        "allowed": lambda: {"allowed_token_ids": sorted({EOS, *range(4, VOCAB_SIZE, 2), *tokens(6)})},
        "bad words": lambda: {"bad_words_token_ids": [[t] for t in tokens(4)] + [[t, t] for t in tokens(6)]},
        "stop ids": lambda: {"stop_token_ids": tokens(1), "ignore_eos": True},
        "two ends": lambda: {"stop_token_ids": tokens(1)},
        "ignore_eos": lambda: {"ignore_eos": True},
        "stop strings": lambda: {
            "stop": [tiny_text(tokens(1)), tiny_text(tokens(2))],
            "min_tokens": rng.choice([0, 0, 3]),
            "max_tokens": 12,
        },
    }
    for make in more.values():
        for _ in range(12):
            yield prompt(), beams() | make()
    for _ in range(24):  # several at once
        merged = beams()
        for name in rng.sample(sorted(set(more) - {"ignore_eos", "stop ids"}), 3):
            merged |= more[name]()
        if "bad_words_token_ids" in merged:
            ends = [[t] for t in merged.get("stop_token_ids", ())]
            merged["bad_words_token_ids"] = [w for w in merged["bad_words_token_ids"] if w not in ends]
        yield prompt(), merged


def greedy_cases(rng: random.Random, likely: list[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Greedy search through the processors: on logits, where beam search has them on log-probabilities."""
    beam_only = {"use_beam_search", "best_of", "length_penalty", "early_stopping"}
    for prompt, params in list(tiny_cases(rng, likely))[144:]:
        yield prompt, {key: value for key, value in params.items() if key not in beam_only}


def likely_tokens(memory: Remembered, count: int) -> list[int]:
    """What the model says most."""
    prompts = [[token, (7 * token) % VOCAB_SIZE, token] for token in range(FIRST_CHARACTER, VOCAB_SIZE)]
    params = {"best_of": 2, "max_tokens": 12, "ignore_eos": True}
    said = Counter(t for prompt in prompts for row in search(memory, prompt, params)[0] for t in row)
    return sorted(t for t, _ in said.most_common(count) if t >= FIRST_CHARACTER)


def repetition_values() -> list[dict[str, Any]]:
    """What transformers' processor makes of a few scores: the formula itself."""
    rng = random.Random(3)
    rows = []
    for penalty in (0.5, 1.0, 1.2, 2.0):
        scores = [0.0, 1.0, -1.0, *(round(rng.uniform(-4, 4), 2) for _ in range(5))]
        ids = [0, 1, 1, 2, 4, 6]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.tensor([scores]))
        row = {"scores": scores, "ids": ids, "penalty": penalty}
        rows.append(row | {"expected": [round(x, 6) for x in expected[0].tolist()]})
    return rows


def make_tiny() -> None:
    with tempfile.TemporaryDirectory() as directory:
        memory = Remembered(load(str(write_beam_model(Path(directory)))))
    likely = likely_tokens(memory, 16)
    beams = [make_case(memory, *case, TINY_NOISE) for case in tiny_cases(random.Random(1), likely)]
    greedy = [make_case(memory, *case, TINY_NOISE) for case in greedy_cases(random.Random(2), likely)]
    report("tiny beams", beams)
    report("tiny greedy", greedy)
    write("tiny_beams.json", {"beams": beams, "greedy": greedy, "repetition_penalty": repetition_values()})


# --- demo model -----------------------------------------------------------------------------------------------


def demo_cases(index: int, bad_words: list[list[int]]) -> Iterator[dict[str, Any]]:
    """What is asked for prompt number `index`."""
    base = {"use_beam_search": True, "temperature": 0.0, "max_tokens": DEMO_TOKENS}
    for width in (2, 4, 8):
        for length_penalty in (0.6, 1.0, 1.5):
            yield base | {"best_of": width, "length_penalty": length_penalty}
    base |= {"best_of": 4}
    if index % 3 == 0:
        yield base | {"length_penalty": -0.5}
        yield base | {"early_stopping": True}
        yield base | {"early_stopping": "never"}
    if index % 3 == 1:
        yield base | {"repetition_penalty": 1.3}
        yield base | {"bad_words_token_ids": bad_words}
    if index >= len(TEXTS):
        yield base | {"min_tokens": 12}


def make_demo(path: Path, first: int, last: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = load(str(path.parent), gguf_file=path.name)
    texts = [*TEXTS]
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        texts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    stored = DATA / "demo_beams.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text("utf-8")) if stored.exists() else []
    by_text = {row["text"]: row for row in rows}
    for index, text in list(enumerate(texts))[first:last]:
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        memory = Remembered(model)
        (best, *_), _ = search(memory, prompt, {"best_of": 4, "max_tokens": DEMO_TOKENS})
        bad_words = [best[1:2], best[2:5]] if best[1:2] != [EOS] else [best[:1]]
        cases = [make_case(memory, prompt, params, DEMO_NOISE) for params in demo_cases(index, bad_words)]
        report(repr(text[:40]), cases)
        for case in cases:
            del case["prompt"]
        by_text[text] = {"text": text, "prompt": prompt, "cases": cases}
        write("demo_beams.json", [by_text[t] for t in texts if t in by_text])


def load(path: str, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    )
    model.generation_config = (
        GenerationConfig()
    )  # else the checkpoint's own values fill what a case leaves out
    return model.eval()


def write(name: str, value: object) -> None:
    (DATA / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def report(name: str, cases: list[Case]) -> None:
    ends = [reason for case in cases for reason, _ in case["ends"]]
    ties = sum("tie" in case for case in cases)
    print(
        f"{name}: {len(cases)} cases, {ties} ties, {ends.count('stop')}/{len(ends)} sequences stopped",
        flush=True,
    )


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        bounds = [int(x) for x in sys.argv[2:4]] or [0, len(TEXTS) + len(QUESTIONS)]
        make_demo(Path(sys.argv[1]).resolve(), *bounds)
    else:
        make_tiny()
