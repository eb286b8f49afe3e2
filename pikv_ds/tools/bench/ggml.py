"""llama.cpp's flash attention on the CPU, out of the libraries that `llama-cpp-python` brings.

Called through ggml's C interface: one node, ``ggml_flash_attn_ext``, over keys and values in f16,
q8_0 or q4_0. The query is float32, as ggml wants it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pikv_ds.errors import UsageError
from pikv_ds.tools.bench.attention import Setting, label
from pikv_ds.tools.bench.timing import Contender

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # enum ggml_type
TYPES = {"f16": (F16, 16), "q8_0": (Q8_0, 8.5), "q4_0": (Q4_0, 4.5)}
"""ggml's number of a type, and its bits per element with the scales of its blocks of 32."""
SPACE = 64 << 20
"""Bytes of address space for a graph's nodes and for the work buffer that each computation takes out
of the same memory and never gives back; keys and values come on top."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def missing() -> str | None:
    """Why there is no such baseline, None if there is."""
    return None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"


@cache
def _library() -> Callable[[str], Callable[..., Any]]:
    """Finds a function of ggml by its name."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
    libraries = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]
    pointer, size, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_4d": (pointer, [pointer, ctypes.c_int, long, long, long, long]),
        "ggml_flash_attn_ext": (pointer, [pointer, *[pointer] * 4, *[ctypes.c_float] * 3]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_graph_compute_with_ctx": (ctypes.c_int, [pointer, pointer, ctypes.c_int]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_quantize_chunk": (size, [ctypes.c_int, pointer, pointer, long, long, long, pointer]),
    }

    def find(name: str) -> Callable[..., Any]:
        for library in libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = signatures[name]
                return function
        raise UsageError(f"the installed llama-cpp-python has no {name}")

    return find


def baselines(setting: Setting, context: int) -> list[Contender]:
    """Flash attention of one query over one layer, in each of `TYPES`."""
    if missing() or setting.device.type != "cpu":
        return []
    return [_contender(setting, context, name) for name in TYPES]


def _contender(setting: Setting, context: int, name: str) -> Contender:
    ggml = _library()
    kind, bits = TYPES[name]
    elements = setting.num_kv_heads * context * setting.head_dim
    num_bytes = int(2 * elements * bits / 8)
    source = [torch.randn(elements) for _ in range(2)]
    graphs = []
    for _ in range(setting.copies(num_bytes)):
        memory = torch.empty(num_bytes + SPACE, dtype=torch.uint8)  # ours, so that it goes when the graph goes
        context_pointer = ggml("ggml_init")(_InitParams(memory.nbytes, memory.data_ptr(), False))
        query = ggml("ggml_new_tensor_4d")(context_pointer, F32, setting.head_dim, 1, setting.num_heads, 1)
        ctypes.memmove(
            ggml("ggml_get_data")(query),
            torch.randn(setting.num_heads * setting.head_dim).data_ptr(),
            4 * setting.num_heads * setting.head_dim,
        )
        stored = []
        for x in source:
            tensor = ggml("ggml_new_tensor_4d")(
                context_pointer, kind, setting.head_dim, context, setting.num_kv_heads, 1
            )
            rows = elements // setting.head_dim
            ggml("ggml_quantize_chunk")(
                kind, x.data_ptr(), ggml("ggml_get_data")(tensor), 0, rows, setting.head_dim, None
            )
            stored.append(tensor)
        scale = setting.head_dim**-0.5
        out = ggml("ggml_flash_attn_ext")(context_pointer, query, *stored, None, scale, 0.0, 0.0)
        graph = ggml("ggml_new_graph")(context_pointer)
        ggml("ggml_build_forward_expand")(graph, out)
        graphs.append((memory, context_pointer, graph))
    compute = ggml("ggml_graph_compute_with_ctx")

    def run(copy: int) -> int:
        return compute(*graphs[copy][1:], torch.get_num_threads())

    return Contender(f"llama.cpp {name}", run, len(graphs), num_bytes, label(context))
