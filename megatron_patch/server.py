"""Serves a Hugging Face MoE checkpoint with Megatron-Core over expert-parallel ranks.

It starts Megatron's dynamic engine on every rank, its data-parallel coordinator, and its own HTTP
endpoints in the form of OpenAI's: POST /v1/completions and /v1/chat/completions, GET /health. Added
are GET /metrics (Prometheus) and /v1/models. What Megatron's endpoints would ignore ("stream", "seed",
"stop", another model, ...) is refused by name. It listens on this machine only; see --host.

SIGTERM and SIGINT stop it: no more connections, running requests are answered, exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_patch import compat
from pikv_ds import launch_env
from pikv_ds.config import ConfigError, PiKVConfig, load_config
from pikv_ds.tools import local_ranks as ranks
from pikv_ds.tools.command_line import GIB, RANKS, Parser, guarded, real, whole

EXAMPLES = """examples:
  launch/megatron_server.sh --model /models/Mixtral-8x7B --ranks 8
  python -m megatron_patch.server --model DIR --ranks 2 --context-length 8192 --max-requests 4
  torchrun --nproc-per-node 8 -m megatron_patch.server --model DIR --pikv-config pikv.json
  python -m megatron_patch.server --model DIR --ranks 2 --no-pikv      # plain Megatron, to compare

  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The whale", "max_tokens": 16, "temperature": 0}'
"""

PUBLISH_SECONDS = 0.5
"""How old the ranks' figures in /metrics may be, when the engine is not in the middle of a step."""

REQUIREMENTS = ("flask", "hypercorn", "zmq", "msgpack", "prometheus_client")
"""What Megatron's server and ours import."""

DAY = 86400
"""Seconds that a request's body may take at most."""

Figures = Callable[[], dict[str, Any]]


class Loaded(NamedTuple):
    """A rank's part of the model, ready to serve.

    Args:
        model: a GPTModel on this rank's device.
        tokenizer: such as `tokenizer.HFTokenizer`.
        context_length: the model's own, in tokens.
        kv_stats: where PiKV is under the model: figures of this rank's KV cache
            (`pikv_ds.observe.prometheus.reading`), shown in ``/metrics``; called between two steps of the engine.
    """

    model: Any
    tokenizer: Any
    context_length: int
    kv_stats: Figures | None = None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m megatron_patch.server",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint of an MoE model")
    parser.add_argument(
        "--load",
        metavar="DIR",
        help="take the weights from this Megatron checkpoint (torch_dist, of any parallel size); --model then gives "
        "configuration and tokenizer only",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="what answers call it (default: DIR's name)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on: by default only this machine's clients reach it, 0.0.0.0 is for all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=whole(0, 2**16 - 1),
        default=8000,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks", type=whole(most=RANKS), metavar="N", help="ranks to start on this machine (default: 1)"
    )
    parser.add_argument(
        "--tp", type=whole(most=RANKS), default=1, metavar="N", help="tensor-parallel ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and KV (default: the checkpoint's; float32 on a CPU)",
    )
    parser.add_argument(
        "--context-length",
        type=whole(),
        metavar="N",
        help="tokens of a sequence, answer included (default: the model's)",
    )
    parser.add_argument(
        "--max-requests",
        type=whole(),
        default=8,
        metavar="N",
        help="sequences in a rank's batch (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole(0),
        default=256,
        metavar="N",
        help="sequences that may wait while the batches of all ranks are full; more are refused with status 429 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--body-timeout",
        type=real(0, DAY, f"use a number of seconds above 0 and at most {DAY}", above=True),
        default=30.0,
        metavar="SECONDS",
        help="in which the body of a request must have come (default: %(default)g)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole(),
        default=2048,
        metavar="N",
        help="tokens of one forward pass; longer prompts come in chunks (default: %(default)s)",
    )
    parser.add_argument(
        "--buffer-gib",
        type=real(0, GIB, f"use a size above 0 and at most {GIB}", above=True),
        metavar="GIB",
        help="Megatron's KV buffer of each rank (default: enough for max-requests full sequences)",
    )
    pikv = parser.add_mutually_exclusive_group()
    pikv.add_argument("--pikv-config", metavar="FILE", help='JSON with PiKV\'s settings, or with a "pikv" section')
    pikv.add_argument("--no-pikv", action="store_true", help="leave Megatron's attention as it is")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, load: Callable[[argparse.Namespace], Loaded] | None = None) -> int:
    """The command.

    Args:
        argv: arguments; the process's own if None.
        load: makes this rank's model of the arguments; by default from the checkpoint.

    Returns:
        The exit code: 2 for what the user can set right.
    """
    args = parse_arguments(argv)
    if not launch_env.launched():
        return guarded("error", lambda: _start(args, load or load_checkpoint))
    if code := guarded("error", _find_place):
        return code
    return guarded(f"rank {launch_env.world().rank}: error", lambda: _start(args, load or load_checkpoint))


def _find_place() -> int:
    """Which rank this is, whatever the launcher."""
    launch_env.normalise()
    return 0


def _start(args: argparse.Namespace, load: Callable[[argparse.Namespace], Loaded]) -> int:
    """The ranks, where no launcher has started them; else this one."""
    _check(args)
    if not launch_env.launched() and (args.ranks or 1) > 1:
        return ranks.run([sys.executable, *sys.orig_argv[1:]], args.ranks)
    return run(args, load)


def _check(args: argparse.Namespace) -> None:
    """What can be known before any rank starts."""
    missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'pikv-ds[megatron]'")
    compat.require(compat.ENGINE_SINCE, "the server")
    world = launch_env.world()
    if launch_env.launched() and args.ranks not in (None, world.size):
        raise ConfigError(f"--ranks {args.ranks}, but the launcher started {world.size}; drop one")
    size = world.size if launch_env.launched() else args.ranks or 1
    if size % args.tp:
        raise ConfigError(f"--tp {args.tp} does not divide the {size} rank(s)")
    if not (Path(args.model) / "config.json").is_file():
        raise ConfigError(f"--model {args.model}: no config.json there; give the folder of a Hugging Face checkpoint")
    pikv_config(args)


def pikv_config(args: argparse.Namespace) -> PiKVConfig | None:
    """The settings that ``--pikv-config`` names, the defaults without it, None with ``--no-pikv``."""
    if args.no_pikv:
        return None
    return load_config(args.pikv_config) if args.pikv_config else PiKVConfig()


def load_checkpoint(args: argparse.Namespace) -> Loaded:
    """This rank's part of the checkpoint, with PiKV under its attention unless ``--no-pikv``."""
    import megatron_patch
    from megatron_patch import convert, models
    from megatron_patch.tokenizer import HFTokenizer

    hf_config = models.load_config(args.model)
    dtype = _dtype(args.dtype, hf_config)
    config = models.transformer_config(hf_config, dtype=dtype, tp=args.tp, ep=dist.get_world_size())
    model = models.build_model(hf_config, config)
    if args.load:
        convert.load_megatron(model, args.load)
    else:
        report = convert.load_hf(model, args.model, progress=_progress)
        read, whole, peak = (
            f"{n / 2**30:.2f}" for n in (report.read_bytes, report.checkpoint_bytes, report.peak_host_bytes)
        )
        print(
            f"rank {dist.get_rank()} read {read} of the checkpoint's {whole} GiB, peak {peak} GiB of memory",
            flush=True,
        )
    settings = pikv_config(args)
    if settings is not None:
        megatron_patch.patch_model(model, settings)
    tokenizer = HFTokenizer.load(args.model, model.vocab_size)
    return Loaded(model, tokenizer, hf_config.max_position_embeddings, kv_figures(model) if settings else None)


def _progress(parameters: Iterable[Any]) -> Iterable[Any]:
    """A bar on rank 0, where somebody may look."""
    from rich.progress import track

    if launch_env.world().rank or not sys.stdout.isatty():
        return parameters
    return track(list(parameters), description="loading weights")


def kv_figures(model: Any) -> Figures:
    """What a rank's KV cache holds and did, for ``/metrics``; needs no other rank."""
    from megatron_patch import attachment_of
    from pikv_ds.observe.prometheus import reading

    cache = attachment_of(model).cache

    return lambda: reading(cache)


def _dtype(name: str, hf_config: Any) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if not torch.cuda.is_available():
        return torch.float32
    return getattr(hf_config, "dtype", None) or torch.bfloat16


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], Loaded]) -> int:
    """One rank, from its process group to its end."""
    launch_env.prepare()
    world = launch_env.world()
    started = time.perf_counter()
    import megatron_patch
    from megatron_patch import coordinator, engine, frontend

    coordinator.quiet_signals()
    bound = frontend.listen(args.host, args.port) if world.rank == 0 else None
    store = engine.initialize(args.tp)
    loaded = load(args)
    context_length = min(args.context_length or loaded.context_length, loaded.context_length)
    if args.context_length and args.context_length > loaded.context_length:
        raise ConfigError(f"--context-length {args.context_length}: the model's is {loaded.context_length}")
    served = engine.dynamic_engine(
        loaded.model,
        loaded.tokenizer,
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        context_length=context_length,
        buffer_gib=args.buffer_gib,
    )
    if loaded.kv_stats is not None:  # the engine's buffer goes before the first request comes
        megatron_patch.patch_context(loaded.model, served.context)
    seconds = time.perf_counter() - started
    try:
        with torch.inference_mode():
            asyncio.run(_serve(args, served, loaded, context_length, bound, store, seconds))
    except BaseException:
        _end_coordinator(served)  # else this process would wait for it at its exit
        raise
    dist.barrier()
    dist.destroy_process_group()
    return 0


async def _serve(
    args: argparse.Namespace,
    engine: Any,
    loaded: Loaded,
    context_length: int,
    bound: Any,
    store: Any,
    seconds: float,
) -> None:
    """Steps the engine until the server, on rank 0, has been stopped."""
    from megatron_patch import coordinator, frontend, gauges, validation

    world = launch_env.world()
    loop = asyncio.get_running_loop()
    address = await coordinator.connect(engine)
    board = gauges.Board(store, world.rank, world.size)
    stop: Callable[[], None] = _ignore  # the others end when rank 0 tells their engines
    tasks: list[asyncio.Future[Any]] = [engine.engine_loop_task]
    if world.rank == 0:
        name = args.served_model_name or Path(args.model).resolve().name
        tokenizer = loaded.tokenizer
        limits = validation.Limits(name, context_length, loaded.model.vocab_size, tokenizer.longest_token)
        port = bound.getsockname()[1]
        most_sequences = args.max_requests * (world.size // args.tp) + args.max_queue
        metrics = gauges.Metrics(board)
        front = frontend.Frontend(bound, address, tokenizer, limits, metrics, most_sequences, args.body_timeout)
        stop = front.stop
        tasks.append(asyncio.wrap_future(front.done))
        print(
            f"{name} on {world.size} rank(s), loaded in {seconds:.1f} s, context {context_length} tokens: "
            f"http://{args.host}:{port} (Ctrl-C stops it)",
            flush=True,
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    publisher = loop.create_task(_publish(board, engine, loaded.kv_stats))
    tasks.append(publisher)
    try:
        while not engine.engine_loop_task.done():
            done, _ = await asyncio.wait([t for t in tasks if not t.done()], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        publisher.cancel()


def _ignore() -> None:
    pass


async def _publish(board: Any, engine: Any, kv_stats: Figures | None) -> None:
    """Shows this rank's figures to rank 0, and ends the rank when what it depends on has ended."""
    from megatron_patch import gauges

    parent = os.getppid()
    coordinator = getattr(engine, "inference_coordinator_process", None)
    while True:
        figures = gauges.engine_figures(engine)
        if kv_stats is not None:
            del figures[gauges.USAGE]  # of a buffer that is not there
        board.publish({"engine": figures, "pikv": None if kv_stats is None else kv_stats()})
        await asyncio.sleep(PUBLISH_SECONDS)
        if os.getppid() != parent:
            raise RuntimeError("the launcher is gone")
        if coordinator is not None and coordinator.exitcode:
            raise RuntimeError(f"Megatron's coordinator ended with exit code {coordinator.exitcode}")


def _end_coordinator(engine: Any) -> None:
    process = getattr(engine, "inference_coordinator_process", None)
    if process is not None:
        with contextlib.suppress(OSError):
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
