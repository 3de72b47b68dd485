"""`torch.cuda` of the simulated GPU.

from tests.simulated_gpu.torch_cuda import simulated_cuda
with simulated_cuda(roots) as waits:
    model.to("cuda")(x.to("cuda")).sum().backward()
print(waits.table())
"""

from __future__ import annotations

import contextlib
import threading
import types

from tests.simulated_gpu import device
from tests.simulated_gpu.device import CUDA, Mode  # before torch
from tests.simulated_gpu.waits import Waits

import torch  # isort: skip


class _Context:
    def __init__(self, *a, **k): ...
    def __enter__(self):
        return self

    def __exit__(self, *a):
        return False


class _Event:
    def __init__(self, *a, **k): ...
    def record(self, *a): ...
    def wait(self, *a): ...
    def query(self):
        return True

    def synchronize(self):
        if device.current:
            device.current.note("sync: event", "Event.synchronize")

    def elapsed_time(self, other):
        return 1.0


class _Stream(_Context):
    device, stream_id, cuda_stream = CUDA, 0, 0

    def wait_stream(self, *a): ...
    def wait_event(self, *a): ...
    def record_event(self, *a):
        return _Event()

    def query(self):
        return True

    def synchronize(self):
        if device.current:
            device.current.note("sync: stream", "Stream.synchronize")


def _patches(sim):
    def set_state(state, *a):
        sim.generator_state = state.clone()

    def seed(n, *a):
        sim.generator_state = torch.Generator().manual_seed(int(n)).get_state()

    properties = types.SimpleNamespace(
        name="Simulated",
        major=9,
        minor=0,
        total_memory=80 * 2**30,
        multi_processor_count=132,
        gcnArchName="",
        warp_size=32,
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda d: None,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a, **k: (9, 0),
        "get_device_name": lambda *a, **k: "Simulated",
        "get_device_properties": lambda *a, **k: properties,
        "synchronize": lambda *a, **k: sim.note("sync: synchronize", "synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda *a, **k: 0,
        "max_memory_allocated": lambda *a, **k: 0,
        "memory_reserved": lambda *a, **k: 0,
        "max_memory_reserved": lambda *a, **k: 0,
        "reset_peak_memory_stats": lambda *a, **k: None,
        "mem_get_info": lambda *a, **k: (70 * 2**30, 80 * 2**30),
        "memory_stats": lambda *a, **k: {},
        "get_rng_state": lambda *a, **k: sim.generator_state.clone(),
        "get_rng_state_all": lambda: [sim.generator_state.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": lambda states: set_state(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "device": _Context,
        "device_of": _Context,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *a, **k: _Stream(),
        "default_stream": lambda *a, **k: _Stream(),
        "stream": _Context,
        "_is_compiled": lambda: True,
        "_is_in_bad_fork": lambda: False,
    }


@contextlib.contextmanager
def simulated_cuda(roots):
    """Within this context there is one GPU. `roots`: folders whose lines the notes name."""
    sim = Waits(roots)
    with contextlib.ExitStack() as stack:
        for name, value in _patches(sim).items():
            for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
                if hasattr(module, name):
                    old = getattr(module, name)
                    setattr(module, name, value)
                    stack.callback(lambda module=module, name=name, old=old: setattr(module, name, old))
        for name, value in {
            "empty_cache": lambda: None,
            "synchronize": lambda *a, **k: sim.note("sync: synchronize", "synchronize"),
        }.items():
            old = getattr(torch.accelerator, name)
            setattr(torch.accelerator, name, value)
            stack.callback(lambda name=name, old=old: setattr(torch.accelerator, name, old))
        # Parameters stay the same objects, so that tied weights stay tied: as on a GPU.
        run = threading.Thread.run

        def run_with_mode(thread):
            with Mode():
                run(thread)

        threading.Thread.run = run_with_mode  # modes belong to a thread; transformers loads weights in several
        stack.callback(lambda: setattr(threading.Thread, "run", run))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(lambda: torch.__future__.set_swap_module_params_on_conversion(swaps))
        lifted = torch._C._only_lift_cpu_tensors()
        stack.callback(lambda before=lifted: torch._C._set_only_lift_cpu_tensors(before))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(setattr, device, "current", device.current)
        device.current = sim
        stack.enter_context(Mode())
        yield sim
