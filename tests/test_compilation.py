"""What XLA is told, and what is counted."""

from __future__ import annotations

import os

import pytest

from jaxserve.compilation import set_compiler_flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"),
        ("--xla_a=1 --xla_b", "--xla_a=1 --xla_b --xla_backend_extra_options=xla_cpu_disable_loop_unrolling"),
        (
            "--xla_backend_extra_options=xla_c --xla_a=1",
            "--xla_a=1 --xla_backend_extra_options=xla_c,xla_cpu_disable_loop_unrolling",
        ),
        (
            "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling",
            "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling",
        ),
    ],
)
def test_compiler_flags_keep_what_the_user_set(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == expected
