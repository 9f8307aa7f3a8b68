"""Structured output: constraints on the generated text, honoured exactly or refused.

`constraint.py` what may be asked; `json_schema.py`, `regex.py`, `grammar.py` what is refused, and why; `vocabulary.py`
the tokens as bytes; `backends/` the libraries that turn a constraint into masks over the vocabulary; `compiler.py`
chooses one; `worker.py` compiles where it can be killed. No jax anywhere.
"""
