"""Runs Megatron's own unit tests on this machine's CPU, without and with PiKV, and compares.

  python tests/megatron/run_upstream.py /path/to/Megatron-LM            # a checkout of core_v0.16.1
  python tests/megatron/run_upstream.py /path/to/Megatron-LM tests/unit_tests/inference/test_wandb_logging.py

Fetches nothing. Many of Megatron's tests need a GPU, Transformer Engine or data, and fail here in any
case; what counts is that whatever passes without PiKV passes with it. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = {
    1: (
        "tests/unit_tests/inference/contexts",
        "tests/unit_tests/inference/engines/test_dynamic_engine.py",
        "tests/unit_tests/inference/engines/test_static_engine.py",
        "tests/unit_tests/models/test_gpt_model.py",
    ),
    2: (
        "tests/unit_tests/inference/engines/test_dynamic_engine.py",
        "tests/unit_tests/inference/text_generation_controllers/test_simple_text_generation_controller.py",
    ),
}
"""Per number of ranks, since each test wants its own and fails or skips with another."""


INTENDED = {
    "test_max_requests": "asserts how many of Megatron's blocks are in use; PiKV replaces them (docs/megatron.md)",
    "test_zero_tokens_generated_batch_vs_single": "asserts bf16 log-probabilities of a padded and an unpadded batch "
    "to the bit; torch's flash attention sums in another order for another padding",
}
"""Tests that cannot pass with it, and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkout", type=Path, help="a checkout of Megatron-LM, of the installed megatron-core's version"
    )
    parser.add_argument("tests", nargs="*", help="paths within it (default: inference contexts, engines, controllers)")
    parser.add_argument("--ranks", type=int, help="ranks to run them on (default: 1, then 2)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of one test (default: 60)")
    args = parser.parse_args()
    if not (args.checkout / "tests" / "unit_tests" / "conftest.py").is_file():
        print(f"error: {args.checkout}: no tests/unit_tests there; give a checkout of Megatron-LM", file=sys.stderr)
        return 2
    failed = False
    for ranks in [args.ranks] if args.ranks else sorted(DEFAULT):
        chosen = [t for t in args.tests or DEFAULT.get(ranks, DEFAULT[2]) if (args.checkout / t).exists()]
        plain, _ = run(args.checkout, chosen, ranks, args.timeout, pikv=False)
        patched, refused = run(args.checkout, chosen, ranks, args.timeout, pikv=True)
        missing = sorted(plain - patched - refused)
        lost = [t for t in missing if not reason(t)]
        print(
            f"{ranks} rank(s): {len(plain)} tests pass without PiKV; with it {len(plain & patched)} of them, "
            f"{len(plain & refused)} are of what it refuses by name, {len(missing) - len(lost)} cannot pass, "
            f"{len(lost)} are lost"
        )
        for test in missing:
            print(f"  {test.rpartition('::')[2]}: {reason(test) or 'LOST, ' + test}")
        failed |= bool(lost) or not plain
    return int(failed)


def reason(test: str) -> str | None:
    """Why a test cannot pass, from `INTENDED`."""
    return INTENDED.get(test.rpartition("::")[2].partition("[")[0])


def run(checkout: Path, tests: list[str], ranks: int, timeout: float, pikv: bool) -> tuple[set[str], set[str]]:
    """Names of the tests that pass on rank 0, and of those that PiKV refuses by name."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(HERE.parents[1]), str(checkout), os.environ.get("PYTHONPATH", "")]
        ),
        "PIKV_UPSTREAM": str(int(pikv)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    launch = [f"--nproc-per-node={ranks}", "--standalone", "--local-ranks-filter=0", "-m", "pytest"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-p", "upstream_plugin", "-rA", "-q"]
    command += ["--no-header", "--continue-on-collection-errors", f"--timeout={timeout}"]
    command += ["-p", "no:cacheprovider", "--color=no", "-o", "addopts=", *tests]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    passed = set(re.findall(r"^PASSED (\S.*)$", done.stdout, re.MULTILINE))
    refused = set(re.findall(r"^XFAIL (\S.*?) - ", done.stdout, re.MULTILINE))
    summary = re.findall(r"^\d+ (?:passed|failed|skipped|error).* in .*s.*$", done.stdout, re.MULTILINE)
    print(
        f"{'with' if pikv else 'without'} PiKV: {summary[-1] if summary else done.stderr.strip()[-200:]}", flush=True
    )
    return passed, refused


if __name__ == "__main__":
    sys.exit(main())
