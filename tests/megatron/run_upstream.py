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
DEFAULT = (
    "tests/unit_tests/inference/contexts",
    "tests/unit_tests/inference/engines/test_dynamic_engine.py",
    "tests/unit_tests/inference/engines/test_static_engine.py",
    "tests/unit_tests/inference/text_generation_controllers",
    "tests/unit_tests/models/test_gpt_model.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkout", type=Path, help="a checkout of Megatron-LM, of the installed megatron-core's version"
    )
    parser.add_argument("tests", nargs="*", help="paths within it (default: inference contexts, engines, controllers)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of one test (default: 60)")
    args = parser.parse_args()
    if not (args.checkout / "tests" / "unit_tests" / "conftest.py").is_file():
        print(f"error: {args.checkout}: no tests/unit_tests there; give a checkout of Megatron-LM", file=sys.stderr)
        return 2
    chosen = [t for t in args.tests or DEFAULT if (args.checkout / t).exists()]
    plain, patched = (run(args.checkout, chosen, args.timeout, pikv) for pikv in (False, True))
    lost = sorted(plain - patched)
    print(f"{len(plain)} tests pass without PiKV, {len(plain & patched)} of them with it")
    for test in lost:
        print(f"  only without: {test}")
    return 1 if lost or not plain else 0


def run(checkout: Path, tests: list[str], timeout: float, pikv: bool) -> set[str]:
    """Names of the tests that pass."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(HERE.parents[1]), str(checkout), os.environ.get("PYTHONPATH", "")]
        ),
        "PIKV_UPSTREAM": str(int(pikv)),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": "29611",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "upstream_plugin",
        "-rA",
        "-q",
        "--no-header",
        f"--timeout={timeout}",
    ]
    command += ["-p", "no:cacheprovider", "--color=no", "-o", "addopts=", *tests]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    passed = set(re.findall(r"^PASSED (\S.*)$", done.stdout, re.MULTILINE))
    summary = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{'with' if pikv else 'without'} PiKV: {summary}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
