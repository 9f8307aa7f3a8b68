"""What jaxserve may take of a device's memory."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.kv_cache import claim_device_memory, free_device_bytes

GIB = 1 << 30


class Device:
    """As JAX describes one."""

    device_kind = "a chip"

    def __init__(self, platform: str, **stats: int) -> None:
        self.platform = platform
        self._stats = stats

    def memory_stats(self) -> dict[str, int]:
        return self._stats


def free(*devices: Any, utilization: float = 0.9) -> float:
    return free_device_bytes(devices, utilization) / GIB


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")  # which is as good as unset, and is put back afterwards


def test_a_tpu_has_what_it_says() -> None:
    assert free(Device("tpu", bytes_limit=100 * GIB, bytes_in_use=10 * GIB)) == pytest.approx(80)


def test_a_gpu_has_what_jax_was_given_of_it() -> None:
    """JAX's limit is the share that it claims when it starts: three quarters, unless it is told."""
    claim_device_memory(0.9)
    assert free(Device("gpu", bytes_limit=90 * GIB, bytes_in_use=10 * GIB)) == pytest.approx(80)


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0.5")
    claim_device_memory(0.9)
    device = Device("gpu", bytes_limit=50 * GIB, bytes_in_use=0)  # of 100
    assert free(device) == pytest.approx(50)
    assert free(device, utilization=0.3) == pytest.approx(30)


def test_the_fullest_of_several_devices_counts() -> None:
    devices = [Device("tpu", bytes_limit=100 * GIB, bytes_in_use=used * GIB) for used in (0, 20)]
    assert free(*devices) == pytest.approx(70)


def test_a_device_that_does_not_tell_is_named() -> None:
    with pytest.raises(ConfigError, match="a chip does not tell its memory: give --kv-cache-memory-bytes"):
        free(Device("gpu"))
