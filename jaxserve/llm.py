"""The engine in-process: `LLM(model=…).generate(prompts, params)`, for scripts, tests and benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.chat_template import load_chat_template, normalize_messages
from jaxserve.config import EngineConfig
from jaxserve.constraints.constraint import CompiledConstraint, Constraint, ConstraintError
from jaxserve.constraints.outlines_terms import to_constraint
from jaxserve.detokenizer import Detokenizer
from jaxserve.engine import Engine
from jaxserve.errors import ContextLengthError, ModelLoadError, RequestFailedError
from jaxserve.generation_config import load_generation_defaults
from jaxserve.messages import AbortRequest, AddRequest, FinishReason, SequenceOutput, TopLogprobs
from jaxserve.models.loader import resolve_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer, load_tokenizer

Prompt = str | list[int]


@dataclass
class CompletionOutput:
    """One generated sequence; `logprobs` has one entry a token if they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """The n sequences of one prompt: by index, or best first where they were chosen among more.

    Attributes:
        prompt: None where ids were given.
        prompt_logprobs: of its tokens from the second on, if they were asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)


class LLM:
    """The engine that the server runs, without the server.

    Args:
        model: directory in Hugging Face form, .gguf file or hub id.
        skip_tokenizer: prompts are ids, outputs have no text, and nothing but `stop_token_ids` and length
            ends a sequence.
        options: any other field of `EngineConfig`.

    Raises:
        ConfigError, ModelLoadError: the model or an option is wrong.
    """

    def __init__(self, model: str, *, skip_tokenizer: bool = False, **options: Any) -> None:
        path = resolve_model(model)
        self._tokenizer: Tokenizer | None = None
        self.eos_token_ids: tuple[int, ...] = ()
        if not skip_tokenizer:
            source = options.get("tokenizer")
            self._tokenizer = load_tokenizer(resolve_model(source) if source else path)
            defaults = load_generation_defaults(path, "none", {}, self._tokenizer)
            self.eos_token_ids = defaults.eos_token_ids
        self._engine = Engine.load(EngineConfig(model=str(path), **options), tokenizer=self._tokenizer)
        self._request_ids = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine itself, to step by hand or to look into."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ModelLoadError("This LLM was made with skip_tokenizer: prompts must be token ids.")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        constraint: Any = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Generate for all prompts, batched as the engine sees fit; results in the order of the prompts.

        Args:
            prompts: one prompt or several, each text or token ids.
            params: for all prompts, or one each.
            constraint: what every text must be: a term of `outlines.types`, a type that Outlines takes (a pydantic
                model, an Enum, `Literal[…]` …) or a `Constraint`. A list has one for each prompt, None for those that
                are free.
            priority: for all prompts, or one each; the lower, the sooner. Needs `scheduling_policy="priority"`.

        Raises:
            RequestError: a prompt or parameter is refused; nothing has been generated then.
            RequestFailedError: masks leave a sequence no token.
        """
        batch = _as_prompts(prompts)
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts, but {len(each)} sampling parameters")
        priorities = [priority] * len(batch) if isinstance(priority, int) else list(priority)
        if len(priorities) != len(batch):
            raise ValueError(f"{len(batch)} prompts, but {len(priorities)} priorities")
        constraints = self._compiled(constraint, len(batch))
        running: dict[str, _Running] = {}
        for prompt, one in zip(batch, each, strict=True):
            request_id = f"llm-{next(self._request_ids)}"
            running[request_id] = _Running(self, request_id, prompt, one)
        requests = [
            r.request(self.eos_token_ids, compiled, urgency)
            for r, compiled, urgency in zip(running.values(), constraints, priorities, strict=True)
        ]
        for request in requests:
            self._check_length(request)
        try:
            for request in requests:
                self._engine.add_request(request)
            while self._engine.has_work:
                for output in self._engine.step().outputs:
                    running[output.request_id].take(output)
        finally:  # after an error, too, the engine is empty again
            for request_id in running:
                self._engine.abort_request(AbortRequest(request_id=request_id))
        return [r.end() for r in running.values()]

    def chat(
        self,
        conversations: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        constraint: Any = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation or of several.

        Args:
            template_kwargs: for the chat template.
            constraint: what every message must be, as in `generate`.

        Raises:
            RequestError: the template fails, or `generate` refuses.
        """
        several = [c for c in conversations if isinstance(c, list)] or [
            [m for m in conversations if isinstance(m, dict)]
        ]
        template = load_chat_template(None, self.tokenizer)
        if template is None:
            raise ModelLoadError("The model has no chat template.")
        kwargs = dict(template_kwargs or {})
        texts = [template.render(normalize_messages(messages, template), **kwargs) for messages in several]
        return self.generate(
            [self.tokenizer.encode(text, add_special_tokens=False) for text in texts], params, constraint
        )

    def _compiled(self, asked: Any, num_prompts: int) -> list[CompiledConstraint | None]:
        """One constraint a prompt."""
        each = asked if isinstance(asked, list) else [asked] * num_prompts
        if len(each) != num_prompts:
            raise ValueError(f"{num_prompts} prompts, but {len(each)} constraints")
        known: dict[Constraint, CompiledConstraint] = {}
        return [None if one is None else self._compile(one, known) for one in each]

    def _compile(self, asked: Any, known: dict[Constraint, CompiledConstraint]) -> CompiledConstraint:
        compiler = self._engine.text_constraints.compiler(self.eos_token_ids)
        try:
            constraint = to_constraint(asked)
            if constraint not in known:
                known[constraint] = compiler.compile(constraint)
        except ConstraintError as error:
            raise error.to_request_error("constraint") from error
        return known[constraint]

    def _check_length(self, request: AddRequest) -> None:
        asked, limit = request.params.max_tokens, self._engine.limits.max_model_len
        if len(request.prompt_token_ids) + asked > limit:
            raise ContextLengthError(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens {asked} are more than {limit}.",
                param="max_tokens",
            )


class _Running:
    """One prompt's sequences while they grow."""

    def __init__(self, llm: LLM, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        self._llm = llm
        self._request_id = request_id
        self._params = params
        text = prompt if isinstance(prompt, str) else None
        ids = (
            llm.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        )
        num_outputs = params.n if params.use_beam_search else params.num_sequences
        self.result = RequestOutput(text, ids, [CompletionOutput(i) for i in range(num_outputs)])
        tokenizer = llm._tokenizer
        self._detokenizers = (
            None
            if tokenizer is None
            else [
                Detokenizer(
                    tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    spaces_between_special_tokens=params.spaces_between_special_tokens,
                    stop=params.stop,
                    include_stop_str_in_output=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                )
                for _ in range(num_outputs)
            ]
        )

    def request(
        self, eos_token_ids: tuple[int, ...], constraint: CompiledConstraint | None, priority: int
    ) -> AddRequest:
        return AddRequest(
            request_id=self._request_id,
            prompt_token_ids=self.result.prompt_token_ids,
            params=self._params,
            eos_token_ids=eos_token_ids,
            constraint=constraint,
            priority=priority,
        )

    def end(self) -> RequestOutput:
        """The result, once all sequences have ended: of more candidates than n, those that are likeliest."""
        outputs, n = self.result.outputs, self._params.n
        if len(outputs) > n:
            best = sorted(outputs, key=lambda output: -sum(top.logprob for top in output.logprobs))[:n]
            self.result.outputs = best
            for index, output in enumerate(best):
                output.index = index
                output.logprobs = output.logprobs if self._params.logprobs is not None else []
        return self.result

    def take(self, step: SequenceOutput) -> None:
        """Add what one step gave; a stop string ends the sequence in the engine, too."""
        output = self.result.outputs[step.index]
        if step.finish_reason == "error":
            raise RequestFailedError(step.error or "the engine ended the request")
        self.result.prompt_logprobs += step.prompt_logprobs or []
        if output.finish_reason is not None:
            return
        self.result.num_cached_tokens = max(self.result.num_cached_tokens, step.num_cached_tokens)
        output.token_ids += step.token_ids
        output.logprobs += step.logprobs or []
        output.finish_reason, output.stop_reason = step.finish_reason, step.stop_reason
        if self._detokenizers is None:
            return
        detokenizer = self._detokenizers[step.index]
        silent = self._ends_with_silent_token(step)
        delta = detokenizer.push(step.token_ids[:-1] if silent else step.token_ids)
        output.text += delta.text
        stopped = delta.stopped
        if stopped is None and step.finish_reason is not None:
            rest = detokenizer.finish()
            output.text, stopped = output.text + rest.text, rest.stopped
        if stopped is not None:
            if step.finish_reason is None:
                self._llm.engine.abort_request(
                    AbortRequest(request_id=self._request_id, indices=[step.index])
                )
            output.finish_reason, output.stop_reason = "stop", stopped

    def _ends_with_silent_token(self, step: SequenceOutput) -> bool:
        """Whether the last token ended the sequence: where a constraint was complete, it is text like any other."""
        if step.finish_reason != "stop" or self._params.include_stop_str_in_output:
            return False
        ends = (*self._llm.eos_token_ids, *self._params.stop_token_ids)
        return bool(step.token_ids) and step.token_ids[-1] in ends


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Text, ids, or several of either → a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [[p for p in prompts if isinstance(p, int)]]
    return [p for p in prompts if isinstance(p, str | list)]
