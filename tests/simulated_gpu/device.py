"""A CUDA device simulated on the CPU, with real numbers: mixing devices raises, and what a GPU waits for is noted.

A tensor "on the GPU" is a `DeviceTensor`, a wrapper subclass whose `device` is cuda:0 for all of PyTorch, C++ included
(autograd's device threads, autocast("cuda"), dispatch keys). Its values are a CPU tensor, `.host`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulated_gpu.waits import Waits

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


# What is noted, within `simulated_cuda`.
current: Waits | None = None

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
