"""What prompt-lookup speculation gains and costs: python scripts/bench_speculation.py MODEL [--load copy chat random].

Two engines on one model and its programs, one with speculation and one without, serve the same requests in turn, as
many as run at once: with, without, without, with … In-process, no server. Three loads:

    copy    one request at a time: a story of about 600 tokens that the model is asked to repeat
    chat    questions as people ask them
    random  random token ids, ended by length alone

An engine begins each load with nothing learned and keeps what it learns over its turns. Reported are output tokens a
second of both (medians of the turns) and the ratio of each turn with its neighbour (median, smallest, largest). What
else runs on the machine disturbs a turn by more than speculation may cost, so there is a ratio of undisturbed speeds as
well: steps of each size count as their median. Then: how many drafts were right, and how many texts are the same to the
last token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.chat_template import load_chat_template, normalize_messages
from jaxserve.config import SpeculativeConfig
from jaxserve.engine import Engine
from jaxserve.messages import AddRequest

STORY = """
The lighthouse at the end of the harbour had been dark for eleven years when Marta came back to the island. She had left
as a girl of nineteen with one suitcase and a letter from the college on the mainland, and she returned with two
suitcases, a cat in a basket, and the keys that the council had posted to her in a brown envelope. Nobody met her at the
ferry. The road along the shore was narrower than she remembered, and the hedges were taller, but the smell of salt and
wet stone was the same, and she walked slowly so that the cat would not complain. At the door of the keeper's house she
found a bottle of milk, a loaf of bread, and a note that said only: Welcome home. The stove is lit. She recognised the
handwriting of her old teacher, Mr. Hallam, who must have been nearly eighty by then. Inside, the rooms were cold in the
corners and warm in the middle. The tall windows looked out over the bay, where three fishing boats were turning towards
the quay with their lamps already burning. Marta put the basket on the kitchen table and opened the lid. The cat stepped
out, looked at the stove, looked at the window, and chose the stove. In the morning the engineer arrived with a box of
new bulbs and a ladder. He explained that the old lens was still good, that the glass had been made in France a hundred
and twenty years ago, and that nothing in the whole country could throw a light so far. They climbed the stairs
together, one hundred and forty steps, and cleaned the brass until noon. When the sun went down that evening, Marta
turned the switch herself. The beam went out across the water, over the boats and the rocks and the long dark line of
the reef, and came back, and went out again. On the quay people stopped and looked up. An old man took off his hat.
Somewhere a church bell began to ring, although it was not Sunday and nobody had asked for it. Later, when the visitors
had gone down the hill, she sat in the kitchen with a cup of tea and wrote a letter to the college, in which she thanked
them for everything and told them that she would not come back in the autumn. Then she wrote another one to her brother,
who lived in the north and had never liked the sea, and asked him whether he would visit her in the spring, when the
birds returned and the path along the cliffs was dry enough to walk on. The cat slept beside the stove until midnight.
"""
SUBJECTS = (
    "the tides of the sea",
    "how bread rises",
    "a dog who learned to read",
    "the French Revolution",
    "recursion in programming",
    "growing tomatoes on a balcony",
    "why the sky is blue",
    "the rules of chess",
    "a train that is always late",
    "saving money as a student",
    "the water cycle",
    "black holes",
    "a letter to an old friend",
    "the history of paper",
    "healthy breakfasts",
    "learning a language",
)
QUESTIONS = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "Give me a list of ten facts about {}.",
    "What would you tell a child of eight about {}?",
)


@dataclass
class Turn:
    """What an engine did with a load once."""

    tokens_per_s: float
    texts: list[list[int]]


@dataclass
class Contender:
    """An engine under one setting, and its turns.

    Attributes:
        steps: seconds of all its steps, by their number of tokens.
    """

    engine: Engine
    turns: list[Turn] = field(default_factory=list)
    steps: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def undisturbed(self) -> float:
        """Tokens a second if each step had taken as long as the median of its size."""
        seconds = sum(len(taken) * statistics.median(taken) for taken in self.steps.values())
        return sum(len(text) for turn in self.turns for text in turn.texts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--load", nargs="+", choices=("copy", "chat", "random"), default=["copy", "chat", "random"]
    )
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="of chat and random"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument(
        "--speculative-config",
        type=json.loads,
        action="append",
        help="as for the server; repeatable: each is measured in turn with the others",
    )
    parser.add_argument("--show", action="store_true", help="print the first text of each load")
    args = parser.parse_args()
    given = args.speculative_config or [{"method": "ngram"}]
    llm = LLM(args.model, max_model_len=2048)
    settings = [SpeculativeConfig.of(fields) for fields in given]
    prompts = Prompts(llm)
    for load, concurrency, temperature in itertools.product(args.load, args.concurrency, args.temperature):
        if load == "copy" and concurrency != args.concurrency[0]:
            continue
        concurrency = 1 if load == "copy" else concurrency
        limits = replace(llm.engine.limits, max_num_seqs=concurrency, enable_prefix_caching=False)
        contenders = [
            Contender(
                Engine(llm.engine.model_runner, replace(limits, speculation=s), tokenizer=llm.tokenizer)
            )
            for s in (None, *settings)
        ]
        for turn in range(args.turns):
            requests = list(itertools.islice(prompts.of(load), concurrency))
            for contender in contenders if turn % 2 else reversed(contenders):
                _take_turn(contender, requests, temperature, args, llm.eos_token_ids)
        if args.show:
            print(repr(llm.tokenizer.decode(contenders[0].turns[0].texts[0], skip_special_tokens=False)))
        for setting, contender in zip(given, contenders[1:], strict=True):
            _report(f"{load:6s} {concurrency:3d} at {temperature:.1f}", contenders[0], contender)
            if len(given) > 1:
                print(f"    {json.dumps(setting)}", flush=True)


class Prompts:
    """Endless prompts of each load, as token ids; the same in every run."""

    def __init__(self, llm: LLM) -> None:
        template = load_chat_template(None, llm.tokenizer)
        assert template is not None, "the model must have a chat template"

        def ask(question: str) -> list[int]:
            messages = normalize_messages([{"role": "user", "content": question}], template)
            return llm.tokenizer.encode(template.render(messages), add_special_tokens=False)

        rng = np.random.default_rng(0)
        story = " ".join(STORY.split())
        self._endless: dict[str, Iterator[list[int]]] = {
            "copy": itertools.cycle([ask(f"Repeat the following text word for word.\n\n{story}")]),
            "chat": itertools.cycle([ask(q.format(s)) for q, s in itertools.product(QUESTIONS, SUBJECTS)]),
            "random": (rng.integers(1000, 40_000, 128).tolist() for _ in itertools.count()),
        }

    def of(self, load: str) -> Iterator[list[int]]:
        return self._endless[load]


def _take_turn(
    contender: Contender,
    prompts: list[list[int]],
    temperature: float,
    args: argparse.Namespace,
    eos_token_ids: tuple[int, ...],
) -> None:
    """Serve all prompts at once."""
    engine = contender.engine
    texts: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens, ignore_eos=True, seed=i)
        engine.add_request(
            AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params, eos_token_ids=eos_token_ids)
        )
        texts[str(i)] = []
    started = time.perf_counter()
    while engine.has_work:
        begun = time.perf_counter()
        outputs = engine.step()
        contender.steps[outputs.stats.num_tokens].append(time.perf_counter() - begun)
        for output in outputs.outputs:
            texts[output.request_id] += output.token_ids
    seconds = time.perf_counter() - started
    contender.turns.append(Turn(sum(map(len, texts.values())) / seconds, list(texts.values())))


def _report(name: str, plain: Contender, drafting: Contender) -> None:
    speeds = [[turn.tokens_per_s for turn in c.turns] for c in (plain, drafting)]
    ratios = sorted(b / a for a, b in zip(*speeds, strict=True))
    pairs = [
        (a, b)
        for one, other in zip(plain.turns, drafting.turns, strict=True)
        for a, b in zip(one.texts, other.texts, strict=True)
    ]
    stats = drafting.engine.stats()
    print(
        f"{name}: {statistics.median(speeds[0]):6.1f} tok/s, with drafts {statistics.median(speeds[1]):6.1f}; "
        f"{statistics.median(ratios):.3f} x ({ratios[0]:.3f} - {ratios[-1]:.3f}), "
        f"undisturbed {drafting.undisturbed / plain.undisturbed:.3f} x; "
        f"{stats.spec_decode_accepted_tokens:,} of {stats.spec_decode_draft_tokens:,} drafts right; "
        f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts the same",
        flush=True,
    )


if __name__ == "__main__":
    main()
