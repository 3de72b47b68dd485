"""What a GPU would wait for, or copy, and the line of the project that asks for it."""

from __future__ import annotations

import collections
import contextlib
import sys

from tests.simulated_gpu.device import aten, is_device, short  # before torch

import torch  # isort: skip

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
HERE = __file__.rpartition("/")[0]
Event = collections.namedtuple("Event", "kind op where detail phase")


class Waits:
    """Notes of a run; `roots` are the folders whose lines they name."""

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
            if name.startswith(self.roots) and "/.venv/" not in name and not name.startswith(HERE):
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
