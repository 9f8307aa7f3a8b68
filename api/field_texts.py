"""What each request field does, in a sentence: for the API's own document and docs/api.md.

One mapping for each table of `protocol`, field name → text. Ranges and defaults are the tables' own.
"""

from __future__ import annotations

_TYPE = "What kind of object this is."
_HINT = "A hint without effect here."
_ADD_SPECIAL_TOKENS = (
    "Let the tokenizer add its own special tokens (such as BOS) to the text or the rendered template."
)

FUNCTION_CALL = {
    "name": "Of the function.",
    "arguments": "JSON text; reaches the template as an object if it is one.",
}
TOOL_CALL = {
    "id": "To which a tool message refers.",
    "type": _TYPE,
    "function": "The call itself.",
    "index": "As streams have it; without effect.",
}
TEXT_PART = {"type": _TYPE, "text": "The text.", "refusal": "The text."}
MESSAGE = {
    "role": "Who speaks: system, developer, user, assistant, tool, function or a role of the template's own.",
    "content": "Text, or parts, which are joined with line breaks. Only an assistant with tool_calls needs none.",
    "name": "Of the speaker, for the template.",
    "tool_calls": "Calls that the assistant has made.",
    "tool_call_id": "The call that this message answers.",
    "refusal": "As in answers; for the template.",
    "annotations": "Accepted if empty, as answers have it.",
    "audio": "Accepted if empty, as answers have it.",
    "function_call": "Accepted if empty, as answers have it.",
}

FUNCTION = {
    "name": "Of the function.",
    "description": "What it does, for the model.",
    "parameters": "JSON schema of its arguments; by default an empty object.",
    "strict": "Without effect: arguments are valid under the schema either way.",
}
TOOL = {"type": _TYPE, "function": "The function."}
NAMED_FUNCTION = {"name": "Of a function among tools."}
ALLOWED_TOOLS = {"mode": "Whether one of them must be called.", "tools": "A subset of tools."}
TOOL_CHOICE = {
    "type": _TYPE,
    "function": "The function to call.",
    "allowed_tools": "The functions that may be called.",
}

JSON_SCHEMA = {
    "name": "Of the schema; without effect.",
    "schema": "The schema.",
    "strict": "Without effect: the schema is enforced either way.",
    "description": "Of the schema; without effect.",
}
RESPONSE_FORMAT = {"type": _TYPE, "json_schema": "The schema and its name."}
STRUCTURED_OUTPUTS = {
    "json": "As guided_json.",
    "regex": "As guided_regex.",
    "choice": "As guided_choice.",
    "grammar": "As guided_grammar.",
    "json_object": "True: a JSON object of any content.",
    "whitespace_pattern": "As guided_whitespace_pattern.",
    "disable_any_whitespace": "No whitespace between JSON tokens.",
    "disable_additional_properties": "Objects have no properties but those that the schema names.",
    "disable_fallback": "Refuse the request if the chosen backend cannot serve it.",
}
PREDICTION = {"type": _TYPE, "content": "The expected text."}
STREAM_OPTIONS = {
    "include_usage": "Report the usage in a last chunk.",
    "continuous_usage_stats": "Report the usage so far in every chunk; needs include_usage.",
    "include_obfuscation": "Chunks are not padded here.",
}

_PROMPT = {
    "add_special_tokens": _ADD_SPECIAL_TOKENS,
    "truncate_prompt_tokens": "Keep only this many tokens of the prompt; -1: as many as fit beside max_tokens.",
    "truncation_side": "The end of the prompt that truncate_prompt_tokens cuts off.",
    "cache_salt": "Cached prefixes are shared only among requests of the same salt.",
    "request_id": "Becomes part of the response's id; by default the X-Request-Id header.",
}
_SAMPLING = {
    "temperature": "How random: below 0.00001 the likeliest token is taken (greedy).",
    "top_p": "Sample from the smallest set of most likely tokens with this much probability.",
    "top_k": "Sample from this many of the most likely tokens; 0 and -1: from all.",
    "min_p": "Sample from tokens that are at least this fraction as likely as the likeliest.",
    "presence_penalty": "Subtracted from the logit of every token that has been generated already.",
    "frequency_penalty": "Subtracted from a token's logit once for each time that it has been generated.",
    "repetition_penalty": "Logits of tokens in prompt and output are divided by it if positive, else multiplied.",
    "logit_bias": "Token id (in the vocabulary) → number that is added to its logit.",
    "allowed_token_ids": "Every other token is impossible.",
    "bad_words": "A token that would complete one of these texts is impossible.",
    "seed": "The same seed gives the same result for the same request; -1 is none.",
    "n": "Choices for each prompt.",
    "best_of": "Sequences to sample for each prompt (or beams), of which the n likeliest are returned; by default n.",
    "use_beam_search": "Search for the likeliest sequences instead of sampling.",
    "length_penalty": "Beam search divides scores by the length to the power of this.",
    "early_stopping": (
        "Beam search ends: true, with enough finished sequences; false, when none looks better; "
        '"never", when none can become better.'
    ),
}
_STOPPING = {
    "min_tokens": "Until this many tokens are generated nothing ends the sequence; at most max_tokens.",
    "stop": "Texts that end the sequence and are cut off; the one completed first wins.",
    "stop_token_ids": "Tokens that end the sequence.",
    "include_stop_str_in_output": "Keep the text of what ended the sequence.",
    "ignore_eos": "Go on behind end-of-sequence tokens.",
    "skip_special_tokens": "Special tokens contribute no text.",
    "spaces_between_special_tokens": "False: no space between special tokens where the tokenizer would put one.",
}
_OUTPUT = {
    "prompt_logprobs": "Log probabilities of each prompt token and of this many likeliest; not with stream.",
    "return_tokens_as_token_ids": 'Write tokens in logprobs as "token_id:<id>".',
    "return_token_ids": "Add token_ids to each choice, and prompt_token_ids.",
    "stream": "Answer with server-sent events, the last of which is [DONE].",
    "stream_options": "What a stream reports; needs stream.",
}
_STRUCTURE = {
    "response_format": "The form of the output: text, a JSON object, or JSON valid under a schema.",
    "structured_outputs": "Exactly one constraint on the output, and how it is applied.",
    "guided_json": "The output is valid under this JSON schema, an object or its text.",
    "guided_regex": "The whole output matches this regular expression.",
    "guided_choice": "The output is exactly one of these.",
    "guided_grammar": "The output is a sentence of this grammar, in Lark's or GBNF's notation.",
    "guided_whitespace_pattern": "Whitespace between JSON tokens matches this regex; by default a space or none.",
    "guided_decoding_backend": "What enforces a constraint; auto chooses.",
}
_NO_MEANING_HERE = {
    "user": _HINT,
    "safety_identifier": _HINT,
    "prompt_cache_key": _HINT,
    "metadata": "Without effect: nothing is stored here.",
    "store": "Nothing is stored here.",
    "service_tier": _HINT,
    "modalities": "What answers consist of: text alone.",
    "prediction": _HINT,
    "verbosity": _HINT,
    "reasoning_effort": "Handed to the chat template as a variable.",
    "prompt_cache_retention": _HINT,
    "prompt_cache_options": _HINT,
    "function_call": "The former name of tool_choice.",
    "priority": "The lower, the sooner the request is served; values other than 0 need `--scheduling-policy priority`.",
    "include_reasoning": "Answers are complete here.",
}
_COMMON = {"model": "One of the served names."}
_COMMON |= _PROMPT | _SAMPLING | _STOPPING | _OUTPUT | _STRUCTURE | _NO_MEANING_HERE

COMPLETION = _COMMON | {
    "prompt": "Text, texts, token ids, or lists of them. Choice i of prompt p has the index p · n + i.",
    "max_tokens": "Tokens to generate at most; null: as many as fit beside the prompt. 0 only with echo.",
    "logprobs": "Log probabilities of each token and of this many likeliest; 0: of the token alone.",
    "echo": "Put the prompt before the completion; with logprobs, its tokens, too.",
}

_TEMPLATE = {
    "messages": "The conversation so far.",
    "add_generation_prompt": (
        "End the prompt with the beginning of an answer; if false, the response's role is the last message's."
    ),
    "continue_final_message": "Let the model continue the last message; add_generation_prompt must be false.",
    "documents": "A variable of the chat template.",
    "tools": "Functions that the model may call; handed to the chat template.",
    "chat_template": "Jinja source of a chat template to use instead of the model's.",
    "chat_template_kwargs": "Further variables of the chat template.",
}
CHAT = (
    _COMMON
    | _TEMPLATE
    | {
        "max_tokens": "Tokens to generate at most; by default as many as fit beside the prompt.",
        "max_completion_tokens": "The newer name of max_tokens, over which it wins.",
        "logprobs": "Log probabilities of each generated token.",
        "top_logprobs": "Log probabilities of this many likeliest tokens, too; needs logprobs.",
        "echo": "Put the last message before the answer, if its role is the response's.",
        "tool_choice": "Whether and which functions are called; with tools auto by default.",
        "parallel_tool_calls": "Whether an answer may hold several calls; false: it holds one at most.",
    }
)

TOKENIZE_TEXT = {
    "model": _COMMON["model"],
    "prompt": "The text, which may be longer than the model's context.",
    "add_special_tokens": _ADD_SPECIAL_TOKENS,
    "return_token_strs": "Give each token's text, too.",
}
TOKENIZE_MESSAGES = _TEMPLATE | {name: text for name, text in TOKENIZE_TEXT.items() if name != "prompt"}
DETOKENIZE = {"model": _COMMON["model"], "tokens": "Token ids; special tokens keep their text."}
