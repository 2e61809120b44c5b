"""A GPU's meter without a GPU: its events are wall time, its memory is the processor's, its allocator counts what the
test says."""

import gc
import time
from types import SimpleNamespace

import pytest
import torch

from vlmfast.bench import machine, meter

MIB = 2**20


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes half a second a time in a process as full as this one


@pytest.fixture
def fake_cuda(monkeypatch):
    """`device="cuda"` runs here; its attributes say what the allocator counts and whether the GPU still answers."""
    state = SimpleNamespace(before=100 * MIB, highest=130 * MIB, free=2**40, broken=False, emptied=0)

    def synchronize():
        if state.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")

    def empty_cache():
        state.emptied += 1

    facts = SimpleNamespace(name="GPU of the test", major=9, minor=0, multi_processor_count=132, total_memory=2**37)
    fakes = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: facts,
        "Event": Event,
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: state.before,
        "max_memory_allocated": lambda: state.highest,
        "memory_reserved": lambda: state.before,
        "mem_get_info": lambda: (state.free, 2**40),
    }
    machine.gpu.cache_clear()
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(meter.Cuda, "where", "cpu")
    monkeypatch.setattr(meter, "FLUSH_BYTES", MIB)
    monkeypatch.setattr(meter, "PRODUCT", 32)
    monkeypatch.setattr(meter, "COPY_BYTES", 4096)
    yield state
    machine.gpu.cache_clear()
