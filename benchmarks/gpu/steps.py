"""The steps of `benchmarks/gpu.sh`, in their order."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import cases, extension, timings
from benchmarks.gpu.runner import LEAST_SECONDS, NOT_FINISHED, Step, Worker, ending
from pikv_ds import ExpertShardedKVCache, PiKVConfig
from pikv_ds.core.shape import ModelShape
from pikv_ds.ops import OPS, Ops
from pikv_ds.tools.bench import lookup, memory
from pikv_ds.tools.bench.attention import Setting, label
from pikv_ds.tools.bench.show import machine
from pikv_ds.tools.bench.timing import Contender

BUDGET = 0.125
"""Share of the pages that lookups choose."""
COMPILE_SECONDS = 120
"""Most for a case of libraries that compile what they run, and of tools."""
TEST_SECONDS = 120
"""Most for a process that runs tests."""
KERNELS = "regex:Decode|MergePartials"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats")


def setting_of(worker: Worker, page_size: int = 32, backend: str | None = None) -> Setting:
    """What is timed, on a machine that has the backend's ops (by default those of the worker).

    Raises:
        ValueError: it has not: that is the step's failure, not that of each case.
    """
    Ops(backend or worker.backend, worker.device.type)
    sizes = worker.sizes
    return Setting(*sizes.heads, page_size, torch.bfloat16, worker.device, sizes.working_set)


def prepare(worker: Worker) -> None:
    """The extension, what the machine is, and which backend has which op."""
    facts: dict[str, Any] = {}
    if not worker.dry_run:
        major, minor = torch.cuda.get_device_capability()
        facts = {"extension": extension.prepare(f"{major}.{minor}" + "a" * (major == 9))}
        properties = torch.cuda.get_device_properties(0)
        facts |= {"processors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    ops = Ops("auto", worker.device.type)
    worker.results.append(
        "machine", name=machine(worker.device), ops={op: ops.implementation(op) for op in OPS}, **facts
    )


def bandwidth(worker: Worker) -> None:
    """What a copy moves per second, and what a kernel costs that does nothing."""
    setting = setting_of(worker, backend="reference")

    def copying(num_bytes: int) -> dict[str, Any]:
        return {"rows": timings.timed([memory.copy_of(setting, num_bytes)], setting, worker.sizes.rounds)}

    def launching() -> dict[str, Any]:
        one = torch.zeros(1, device=worker.device)
        least = Contender("one element", lambda _: one.fill_(1.0), 1, 0)
        return {"rows": timings.timed([least], setting, worker.sizes.rounds)}

    for num_bytes in worker.sizes.copy_bytes:
        worker.case(f"copy of {num_bytes >> 20} MiB", partial(copying, num_bytes))
    worker.case("launch", launching)


def float64(worker: Worker, backend: str) -> None:
    """Every case of `cases.CASES` that the backend has kernels for."""
    Ops(backend, worker.device.type)  # where they are missing, that is the step's failure
    for case in cases.CASES[:: worker.sizes.every]:
        if backend == "triton" and not (case.layout.kernels_know and case.latent_dim is None):
            continue  # it has no kernels for these
        worker.case(case.name, partial(cases.check, case, backend, worker.device))


def decode(worker: Worker, backend: str) -> None:
    """Codecs × contexts × batches and a ragged one × page sizes, each beside torch's attention over as many tokens."""
    sizes = worker.sizes

    def one(setting: Setting, codec: str, lengths: Sequence[int], context: int | None) -> dict[str, Any]:
        contenders = timings.decoding(setting, codec, lengths, backend)
        if context is not None:
            contenders.append(timings.Plain(setting, context, len(lengths)).sdpa())
        return {"rows": timings.without_merge(timings.timed(contenders, setting, sizes.rounds))}

    for page_size in sizes.page_sizes:
        setting = setting_of(worker, page_size, backend)
        shapes = [(f"{label(n)} b{b}", (n // page_size,) * b, n) for n in sizes.contexts for b in sizes.batches]
        for name, lengths, context in [*shapes, ("ragged", sizes.ragged(page_size), None)]:
            for codec in sizes.codecs:
                worker.case(f"{codec} {name} p{page_size}", partial(one, setting, codec, lengths, context))


def peer(worker: Worker, name: str) -> None:
    """Another library's attention beside torch's and ours, by the name of a method of `timings.Plain`."""
    setting, sizes = setting_of(worker), worker.sizes

    def one(context: int, batch: int) -> dict[str, Any]:
        plain, lengths = timings.Plain(setting, context, batch), (context // setting.page_size,) * batch
        ours = [timings.decoding(setting, codec, lengths, worker.backend)[0] for codec in ("none", "int4")]
        return {"rows": timings.timed([getattr(plain, name)(), plain.sdpa(), *ours], setting, sizes.rounds)}

    for context in sizes.contexts:
        for batch in sizes.batches:
            worker.case(f"{label(context)} b{batch}", partial(one, context, batch), COMPILE_SECONDS)


def lookups(worker: Worker) -> None:
    """Choosing an eighth of the pages and attending to them, against attending to all."""
    context = worker.sizes.contexts[-1]

    def one(setting: Setting, codec: str) -> dict[str, Any]:
        contenders = lookup.lookups(setting, context, codec, worker.backend, BUDGET)
        return {"rows": timings.timed(contenders, setting, worker.sizes.rounds)}

    for page_size in worker.sizes.page_sizes:
        setting = setting_of(worker, page_size)
        for codec in ("int4", "none"):
            worker.case(f"{codec} {label(context)} p{page_size}", partial(one, setting, codec))


def seal(worker: Worker) -> None:
    """Sealing a prompt's pages beside a plain copy of its keys and values."""
    setting = setting_of(worker)

    def one(codec: str) -> dict[str, Any]:
        contenders = [memory.sealing(setting, codec, worker.backend), memory.copying(setting)]
        return {"rows": timings.timed(contenders, setting, worker.sizes.rounds)}

    for codec in (*worker.sizes.codecs, "int3/int2+clip"):
        worker.case(codec, partial(one, codec))


def layer(worker: Worker) -> None:
    """A decode pass of a cache of one rank: the host's and the device's time per layer, and launches."""
    setting = setting_of(worker)
    for codec in ("int4", "none"):
        worker.case(codec, partial(_decode_pass, worker, setting, codec))


def _decode_pass(worker: Worker, setting: Setting, codec: str) -> dict[str, Any]:
    layers, rows, tokens, passes = worker.sizes.layer
    heads, kv_heads, head_dim = setting.num_heads, setting.num_kv_heads, setting.head_dim
    shape = ModelShape(layers, heads, kv_heads, head_dim, num_experts=8, dtype=setting.dtype)
    config = PiKVConfig.from_dict({"codec": codec, "page_size": setting.page_size, "backend": worker.backend})
    cache = ExpertShardedKVCache(shape, config, device=worker.device)
    batch, spent = cache.new_batch(rows), {"begin_step": [], "attend": [], "routed": []}

    def clocked(name: str, work: Any, *args: Any) -> None:
        began = time.perf_counter()
        work(*args)
        spent[name].append(time.perf_counter() - began)

    def inputs(new: int) -> tuple[Tensor, Tensor]:
        qkv = torch.randn(new * rows, heads + 2 * kv_heads, head_dim, device=worker.device).to(shape.dtype)
        return qkv, torch.randint(8, (new * rows, 2), device=worker.device)

    def one_pass(qkv: Tensor, experts: Tensor) -> None:
        clocked("begin_step", cache.begin_step, batch, [len(qkv) // rows] * rows)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        for index in range(layers):
            clocked("attend", cache.attend, batch, index, query, key, value, head_dim**-0.5)
            clocked("routed", cache.routed, batch, index, experts)

    def settle() -> None:
        if worker.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        one_pass(*inputs(tokens))
        token = inputs(1)
        one_pass(*token)  # compiles and loads
        settle()
        for times in spent.values():
            times.clear()
        for _ in range(passes):
            one_pass(*token)
            settle()
        host = {f"host_us_{name}": statistics.median(times) * 1e6 for name, times in spent.items()}
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if worker.device.type == "cuda" else [])]
        with profile(activities=kinds) as profiled:
            one_pass(*token)
            settle()
    if codec == "int4":
        profiled.export_chrome_trace(str(worker.folder / "layer.json.gz"))
    on_device = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return host | {
        "sequences": rows,
        "tokens": tokens,
        "device_us_per_layer": sum(e.time_range.elapsed_us() for e in on_device) / layers,
        "launches_per_layer": len(on_device) / layers,
        "torch_ops_per_layer": sum(e.cpu_parent is None for e in profiled.events()) / layers,
    }


def ncu(worker: Worker) -> None:
    """Nsight Compute's view of the decode kernels and the merge; its text is kept."""
    options = [x for section in SECTIONS for x in ("--section", section)]
    launches = ["--kernel-name", KERNELS, "--launch-skip", "2", "--launch-count", "2"]  # the second call's
    command, tokens = ["ncu", "--clock-control", "none", *launches, *options], [worker.sizes.probe]
    for codec in ("int4", "none"):
        worker.case(codec, partial(_tool, worker, command, [codec], tokens, "ncu.txt"))


def sanitizer(worker: Worker) -> None:
    """Memory errors and races of small cases; torch's caching allocator would hide what lies beyond a tensor."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        work = partial(_tool, worker, command, ["int4", "none"], [320, 32, 0], "sanitizer.txt")
        worker.case(tool, work, COMPILE_SECONDS)


def _tool(worker: Worker, command: list[str], codecs: list[str], tokens: list[int], text: str) -> dict[str, Any]:
    """Runs a tool over `timings.main` and appends what it prints to a file."""
    target = [sys.executable, "-m", "benchmarks.gpu.timings", *codecs, "--device", worker.device.type]
    target += ["--tokens", *map(str, tokens)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with (worker.folder / text).open("a") as out:
        out.write(f"== {' '.join(command)}: {' '.join(codecs)}\n")
        out.flush()
        done = subprocess.run([*command, *target], stdout=out, stderr=subprocess.STDOUT, env=environment)
    wrong = {} if done.returncode == 0 else {"wrong": f"{ending(done.returncode)}, see {text}"}
    return {"ok": done.returncode == 0, "text": text, **wrong}


def tests(worker: Worker) -> None:
    """The ops' tests on the GPU, a few to a process and as many processes as there is room for, until the time is
    over."""
    sizes, pytest = worker.sizes, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def in_tree(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=extension.ROOT, timeout=TEST_SECONDS)

    collected = in_tree([*pytest, "--collect-only", *sizes.tests])
    names = [line for line in collected.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if collected.returncode or not names:
        raise RuntimeError(f"pytest finds no tests: {(collected.stdout + collected.stderr).strip()[-500:]}")
    starts = range(0, len(names), sizes.chunk)
    chunks = {f"from {at + 1} of {len(names)}": names[at : at + sizes.chunk] for at in starts}
    before = {name for name, case in worker.results.cases(worker.step).items() if "error" not in case}

    def one(name: str) -> None:
        if worker.seconds_left < LEAST_SECONDS:
            return
        about = {"step": worker.step, "case": name, "call": worker.call}
        try:
            done = in_tree([*pytest, "-rfE", *chunks[name]])
        except subprocess.TimeoutExpired:
            worker.results.append("case", **about, error=f"took longer than {TEST_SECONDS} s")
            return
        lines = done.stdout.strip().splitlines() or [""]
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
        failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode:
            print(done.stdout[-20000:] + done.stderr[-2000:], flush=True)
        wrong = {"wrong": "; ".join(failed) or f"pytest: {ending(done.returncode)}"} if done.returncode else {}
        worker.results.append("case", **about, ok=done.returncode == 0, counts=counts, **wrong)

    with ThreadPoolExecutor(sizes.processes) as pool:
        list(pool.map(one, [name for name in chunks if name not in before]))
    if set(chunks) - set(worker.results.cases(worker.step)):
        sys.exit(NOT_FINISHED)


STEPS = (
    Step("prepare", "the extension, and what the machine is", prepare, 300, always=True),
    Step("bandwidth", "what a plain copy moves", bandwidth, 40),
    Step("float64", "40 cases of decoding against float64", lambda w: float64(w, w.backend), 100),
    Step("decode", "decoding and merging, at sizes of serving", lambda w: decode(w, w.backend), 150),
    Step("lookup", "choosing 12.5 % of the pages, against all", lookups, 45),
    Step("seal", "sealing beside a copy", seal, 30),
    Step("layer", "a decode pass of the cache, layer by layer", layer, 45),
    Step("ncu", "Nsight Compute on int4 and bfloat16 pages", ncu, 90, program="ncu"),
    Step("sanitizer", "memory errors and races of a small case", sanitizer, 150, program="compute-sanitizer"),
    Step("flex", "torch's flex attention", lambda w: peer(w, "flex"), 150, gpu=True),
    Step("flashinfer", "FlashInfer", lambda w: peer(w, "flashinfer"), 150, module="flashinfer", gpu=True),
    Step(
        "float64-triton", "the same cases with Triton", lambda w: float64(w, "triton"), 60, module="triton", gpu=True
    ),
    Step("decode-triton", "the same times with Triton", lambda w: decode(w, "triton"), 60, module="triton", gpu=True),
    Step("tests", "the ops' tests", tests),
)
