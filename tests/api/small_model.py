"""A tokenizer small enough to read, and a server around a fake engine: what the API's tests run on.

The vocabulary: id b is the byte b, for all 256; then the special tokens and two words.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from quart import Quart
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.api.admission import Admission
from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.api.metrics import Metrics
from jaxserve.chat_template import ChatTemplate
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import CompiledConstraint, Constraint, ConstraintError
from jaxserve.constraints.vocabulary import Vocabulary
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.generation_config import GenerationDefaults
from jaxserve.messages import AddRequest, SequenceOutput, TopLogprobs
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.api.fake_engine import FakeEngineClient, generate

END, USER, HELLO, WORLD = 256, 257, 258, 259  # "<|end|>", "<|user|>", "hello", " world"
VOCAB_SIZE = 260
MODEL = "org/small"
CREATED = 1_795_000_000
FINGERPRINT = "jaxserve-test"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }};{% endfor %}"
    "{% if documents %}{{ documents | length }} documents;{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }};{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def ids(text: str) -> list[int]:
    """The bytes of the text, one token each."""
    return list(text.encode())


def byte_names() -> dict[int, str]:
    """The characters by which byte-level vocabularies name bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in names]
    return names | {byte: chr(256 + i) for i, byte in enumerate(others)}


def make_tokenizer(directory: Path) -> Tokenizer:
    """Write the small tokenizer as a Hugging Face directory and load it."""
    vocab = {name: byte for byte, name in byte_names().items()} | {"hello": HELLO, "Ġworld": WORLD}
    vocab |= {"<|end|>": END, "<|user|>": USER}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


class CompilerHere(ConstraintWorker):
    """Compiles in this process, which tests of small constraints can afford.

    Attributes:
        asked: every constraint, in order.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(Path(), VOCAB_SIZE, [END])
        self.asked: list[Constraint] = []
        self._tokenizer = tokenizer

    @cached_property
    def _compiler(self) -> Compiler:
        return Compiler(Vocabulary.of(self._tokenizer, VOCAB_SIZE, [END]))

    async def compile(self, constraint: Constraint, *, param: str | None) -> CompiledConstraint:
        self.asked.append(constraint)
        try:
            return self._compiler.compile(constraint)
        except ConstraintError as error:
            raise error.to_request_error(param) from error


def make_context(tokenizer: Tokenizer, engine: FakeEngineClient, **config: Any) -> ServerContext:
    """A server that is ready; `config` are fields of ServerConfig and EngineConfig."""
    config.setdefault("served_model_names", (MODEL, "alias"))
    names = EngineConfig.__dataclass_fields__.keys() & config.keys()
    engine_config = EngineConfig(model="/models/small", **{name: config.pop(name) for name in names})
    server_config = ServerConfig(engine=engine_config, **config)
    context = ServerContext(
        config=server_config,
        engine=engine,
        metrics=Metrics(),
        admission=Admission(engine, server_config),
        executor=ThreadPoolExecutor(1),
        created=CREATED,
        system_fingerprint=FINGERPRINT,
        constraints=CompilerHere(tokenizer),
    )
    template = ChatTemplate(CHAT_TEMPLATE, tokenizer.special_tokens)
    context.set_model(tokenizer, template, GenerationDefaults(eos_token_ids=(END,)))
    return context


def make_app(tokenizer: Tokenizer, engine: FakeEngineClient, **config: Any) -> Quart:
    return create_app(make_context(tokenizer, engine, **config))


def falling_logprobs(token_id: int, k: int) -> TopLogprobs:
    """Token ids 0, 1, 2, … are ever less likely: id i has the logprob −(i + 1) / 4. Id 200 is impossible."""
    logprob = -math.inf if token_id == 200 else -(token_id + 1) / 4
    return TopLogprobs(logprob, token_id + 1, list(range(k)), [-(i + 1) / 4 for i in range(k)])


def generate_a_little(request: AddRequest) -> list[list[SequenceOutput]]:
    """A script for any request: "hey!", or its beginning; of every sequence, beams whole."""
    params = request.params
    count = params.n if params.use_beam_search else params.num_sequences
    tokens = ids("hey!")[: params.max_tokens]
    return generate(
        request,
        [tokens] * count,
        finish_reason="length",
        tokens_per_step=4 if params.use_beam_search else 1,
        logprobs=falling_logprobs,
    )
