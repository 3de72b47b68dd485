"""A CUDA device simulated on the CPU, with real numbers: mixing devices raises, and what a GPU waits for is noted.

    from tests.simulated_gpu.device import simulated_cuda
    with simulated_cuda() as sim:
        model.to("cuda")(x.to("cuda")).sum().backward()
    print(sim.table())

A tensor "on the GPU" is a `DeviceTensor`, a wrapper subclass whose `device` is cuda:0 for all of PyTorch, C++ included
(autograd's device threads, autocast("cuda"), dispatch keys). Its values are a CPU tensor, `.host`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

HERE = Path(__file__).parent


def load_backend() -> None:
    """Compile (3 s, once) and load the C++ part: device guard, hooks, pinned memory; `import torch` asks for it."""
    if "torch" in sys.modules:
        raise RuntimeError("import tests.simulated_gpu.device before torch")
    root = Path(importlib.util.find_spec("torch").origin).parent
    source = HERE / "device.cpp"
    version = (root / "version.py").read_bytes()
    # In the checkout: a library in a folder that others can write would be theirs.
    folder = HERE.parents[1] / "build"
    folder.mkdir(exist_ok=True)
    lib = folder / f"libsimulatedgpu-{hashlib.sha256(source.read_bytes() + version).hexdigest()[:12]}.so"
    if not lib.exists():
        part = f"{lib}.{os.getpid()}.part"
        command = [
            "g++",
            "-O0",
            "-std=c++20",
            "-fPIC",
            "-shared",
            "-w",
            f"-I{root}/include",
            str(source),
            "-o",
            part,
            f"-L{root}/lib",
            "-lc10",
            "-ltorch_cpu",
        ]
        subprocess.run(command, check=True)
        os.replace(part, lib)
    for path in (root / "lib" / "libc10.so", root / "lib" / "libtorch_cpu.so", lib):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


load_backend()

# ruff: noqa: E402
import torch
import torch._dynamo  # before anything is patched: it imports names of CUDA builds if a GPU is there
import torch._inductor.utils
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated GPU."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=CUDA,
            requires_grad=False,
        )

    def __init__(self, host):
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self):
        return f"DeviceTensor({self.host!r}, device='cuda:0')"

    # What the C++ accessors cannot know.
    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        if not isinstance(value, DeviceTensor):
            raise RuntimeError("incompatible tensor type: data of a CUDA tensor set to a CPU tensor")
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def storage_offset(self):
        return self.host.storage_offset()

    def is_pinned(self, *a):
        return False

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(
                "can't convert a cuda:0 tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype=None):
        return self.numpy()

    def tolist(self):
        if current:
            current.note("sync: item", "tolist", short(self))
        return self.host.tolist()

    def __reduce_ex__(self, protocol):
        return self.host.detach().__reduce_ex__(protocol)


Event = collections.namedtuple("Event", "kind op where detail phase")
current: Simulation | None = None

# Operators whose CUDA kernels wait for the device (the size of the result, or an error code, is read).
SYNCS = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
    aten.equal,
    aten.linalg_eigh,
    aten._linalg_eigh,
    aten.linalg_cholesky_ex,
    aten._linalg_svd,
    aten._linalg_solve_ex,
    aten.linalg_inv_ex,
    aten.linalg_qr,
    aten.linalg_lstsq,
    aten._linalg_det,
    aten._linalg_slogdet,
    aten.linalg_eig,
    aten._linalg_eigvals,
}
MIXED = {
    aten.copy_,
    aten._to_copy,
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
    aten._unsafe_index,
    aten._unsafe_index_put,
    aten.set_,
    aten._copy_from,
}


def is_device(x):
    return isinstance(x, DeviceTensor)


def unwrap(x):
    return x.host if isinstance(x, DeviceTensor) else x


def short(x):
    return f"{str(x.dtype)[6:]}{list(x.shape)}"


def dispatch(func, args, kwargs):
    # torch.tensor(values, device="cuda") would ask CUDA itself for memory; of each thread, so also of autograd's.
    torch._C._set_only_lift_cpu_tensors(True)
    packet = getattr(func, "overloadpacket", func)
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = [x for x in flat if is_device(x)]
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
    if not on_device and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    sim = current
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    ):
        # In inference mode they come here whole.
        with Mode():
            found = func.decompose(
                *args, **({**kwargs, "device": CUDA} if wanted is not None and wanted.type == "cuda" else kwargs)
            )
        if found is not NotImplemented:
            return found
    # Mixed devices.
    if on_device and packet not in MIXED and not packet.__name__.startswith("_foreach"):
        strangers = [x for x in flat if not is_device(x) and x.dim() > 0]
        cat = (
            [x for x in flat if not is_device(x)]
            if packet in (aten.cat, aten.stack, aten.mm, aten.addmm, aten.bmm, aten.index_add, aten.index_add_)
            else []
        )
        if strangers or cat:
            message = (
                f"Expected all tensors to be on the same device, but {packet.__name__} got cuda:0 "
                f"({', '.join(map(short, on_device))}) and cpu ({', '.join(map(short, strangers or cat))})"
            )
            if sim:
                sim.note("MISMATCH", packet.__name__, message)
            raise RuntimeError(message)
    if sim:
        sim.watch(func, packet, args, kwargs, wanted, on_device)
    # The keys that resolve lazy conjugates and negatives are off within a mode.
    func = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}.get(func, func)
    host_args, host_kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if torch.Tag.nondeterministic_seeded in func.tags and sim is not None:
        with sim.device_generator():
            out = func(*host_args, **host_kwargs)
    else:
        out = func(*host_args, **host_kwargs)
    to_cpu = wanted is not None and wanted.type == "cpu"
    if to_cpu or packet is aten._local_scalar_dense:
        # A copy: on a GPU no memory is shared with the host.
        return pytree.tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) and any(x is y.host for y in on_device) else x, out
        )
    if torch.Tag.inplace_view in func.tags:
        target = args[0]
        new = DeviceTensor(target.host)
        torch.Tensor.data.__set__(target, new)
        return target
    by_host = {id(x.host): x for x in on_device}
    cpu_inputs = {id(x) for x in flat if not is_device(x)}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, DeviceTensor):
            return x
        if id(x) in by_host:
            return by_host[id(x)]
        if id(x) in cpu_inputs:  # copy_ into a CPU tensor
            return x
        if sim and x.dtype == torch.float64:
            sim.note("float64", packet.__name__, short(x))
        if is_view:
            with torch.inference_mode(False):
                return DeviceTensor(x)
        return DeviceTensor(x)

    is_view = (
        torch.is_inference_mode_enabled()
        and any(r.alias_info is not None for r in func._schema.returns)
        and on_device
        and not on_device[0].is_inference()
    )
    return pytree.tree_map(wrap, out)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t not in (torch.Tensor, torch.nn.Parameter, DeviceTensor) for t in types):
            return NotImplemented  # a quantised weight decides itself
        return dispatch(func, args, kwargs or {})


class Simulation:
    def __init__(self, roots):
        self.events, self.phase, self.roots = [], "", tuple(roots)
        self.generator_state = torch.Generator().manual_seed(0).get_state()
        self.ops = collections.Counter()
        self.quiet = False

    # Where: innermost frame in the project, and the frame that called into another library from it.
    def where(self):
        frame, found = sys._getframe(2), []
        library = None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.roots) and "/.venv/" not in name and name != __file__:
                parts = (name.rfind(f"/{part}/") for part in ("training", "modeling_llm2clip", "tests"))
                found.append(f"{name[max(parts) + 1 :]}:{frame.f_lineno}")
                if len(found) == 3:
                    break
            elif library is None and "/site-packages/" in name and "/torch/" not in name:
                library = f"{name.split('/site-packages/')[1]}:{frame.f_lineno}"
            frame = frame.f_back
        return (" < ".join(found) or "(no frame of the project)") + (f" via {library}" if library else "")

    def note(self, kind, op, detail=""):
        if not self.quiet:
            self.events.append(Event(kind, op, self.where(), detail, self.phase))

    def watch(self, func, packet, args, kwargs, wanted, on_device):
        self.ops[packet.__name__] += 1
        if packet is aten._local_scalar_dense:
            self.note("sync: item", "item", short(args[0]))
        elif packet in SYNCS:
            self.note("sync: kernel reads a size or code", packet.__name__, short(on_device[0]))
        elif packet is aten.repeat_interleave and kwargs.get("output_size") is None and len(args) >= 1:
            self.note("sync: kernel reads a size or code", "repeat_interleave", short(on_device[0]))
        elif packet in (aten.index, aten._unsafe_index):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note("sync: kernel reads a size or code", "index by mask", short(index))
                elif index is not None and not is_device(index):
                    self.note("h2d", "index on CPU", short(index))
        elif packet in (aten.index_put, aten.index_put_, aten._index_put_impl_):
            value = args[2]
            for index in args[1]:
                if (
                    index is not None
                    and index.dtype in (torch.bool, torch.uint8)
                    and not (value.numel() == 1 and not is_device(value))
                ):
                    self.note("sync: kernel reads a size or code", "assign by mask", short(index))
                elif index is not None and not is_device(index):
                    self.note("h2d", "index on CPU", short(index))
        elif packet is aten._to_copy and wanted is not None:
            source = args[0]
            if wanted.type == "cuda" and not is_device(source):
                self.transfer(source, kwargs.get("non_blocking", False))
            elif wanted.type == "cpu" and is_device(source):
                self.note(
                    "sync: d2h" if not kwargs.get("non_blocking") else "d2h non_blocking", "to(cpu)", short(source)
                )
        elif packet is aten.copy_:
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if is_device(target) and not is_device(source):
                self.transfer(source, non_blocking)
            elif not is_device(target) and is_device(source):
                self.note("sync: d2h" if not non_blocking else "d2h non_blocking", "copy_ to cpu", short(source))

    def transfer(self, source, non_blocking):
        pinned = source.is_pinned()
        kind = f"h2d {'non_blocking' if non_blocking else 'blocking'} {'pinned' if pinned else 'pageable'}"
        self.note(kind, "to(cuda)", short(source))

    @contextlib.contextmanager
    def device_generator(self):
        """Random numbers of the device come from a generator of its own."""
        cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator_state)
        try:
            yield
        finally:
            self.generator_state = torch.default_generator.get_state()
            torch.default_generator.set_state(cpu)

    def table(self, kinds=("",), group_by_phase=False):
        counts = collections.Counter()
        for e in self.events:
            if any(e.kind.startswith(k) for k in kinds):
                counts[
                    (
                        e.phase if group_by_phase else "",
                        e.kind,
                        e.op,
                        e.where,
                    )
                ] += 1
        lines, details = [], {}
        for e in self.events:
            details.setdefault((e.kind, e.op, e.where), e.detail)
        for (phase, kind, op, where), n in sorted(counts.items(), key=lambda i: (i[0][0], i[0][1], -i[1])):
            detail = details[kind, op, where]
            lines.append(f"{n:5d}  {phase:12s} {kind:36s} {op:18s} {detail[:40]:40s} {where}")
        return "\n".join(lines)


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
        if current:
            current.note("sync: event", "Event.synchronize")

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
        if current:
            current.note("sync: stream", "Stream.synchronize")


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
        "get_device_capability": lambda *a: (9, 0),
        "get_device_name": lambda *a: "Simulated",
        "get_device_properties": lambda *a: properties,
        "synchronize": lambda *a: sim.note("sync: synchronize", "synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0,
        "max_memory_reserved": lambda *a: 0,
        "reset_peak_memory_stats": lambda *a: None,
        "mem_get_info": lambda *a: (70 * 2**30, 80 * 2**30),
        "memory_stats": lambda *a: {},
        "get_rng_state": lambda *a: sim.generator_state.clone(),
        "get_rng_state_all": lambda: [sim.generator_state.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": lambda states: set_state(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "device": _Context,
        "device_of": _Context,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *a: _Stream(),
        "default_stream": lambda *a: _Stream(),
        "stream": _Context,
        "_is_compiled": lambda: True,
        "_is_in_bad_fork": lambda: False,
    }


@contextlib.contextmanager
def simulated_cuda(roots=None):
    """Within this context there is one GPU. `roots`: folders whose lines the notes name."""
    global current
    if roots is None:
        import llm2clip
        import modeling_llm2clip

        roots = [str(Path(m.__file__).resolve().parent) for m in (llm2clip, modeling_llm2clip)]
    sim = Simulation(roots)
    with contextlib.ExitStack() as stack:
        for name, value in _patches(sim).items():
            for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
                if hasattr(module, name):
                    old = getattr(module, name)
                    setattr(module, name, value)
                    stack.callback(lambda module=module, name=name, old=old: setattr(module, name, old))
        for name, value in {
            "empty_cache": lambda: None,
            "synchronize": lambda *a: sim.note("sync: synchronize", "synchronize"),
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
        before, current = current, sim
        stack.callback(lambda: globals().__setitem__("current", before))
        stack.enter_context(Mode())
        yield sim
