"""Builds, checks and times the ops on the GPU of this machine, within the minutes that it is given.

Everything goes into the folder --out as it is found: results.jsonl (a line per case), log.txt, summary.md,
decode.png, the text of ncu and compute-sanitizer, a trace of one decode pass. A call with the same folder goes on
with what is left.

examples:
  benchmarks/gpu.sh --out r --minutes 9     everything, as far as nine minutes reach
  benchmarks/gpu.sh --out r --minutes 4     what is left
  benchmarks/gpu.sh --out r --only bandwidth decode
  benchmarks/gpu.sh --show r                the tables again
  benchmarks/gpu.sh --out r --dry-run       all of it on a CPU with tiny sizes: does the script work?
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from benchmarks.gpu import extension, runner, summary
from benchmarks.gpu.results import Results
from benchmarks.gpu.steps import STEPS
from pikv_ds.errors import UsageError
from pikv_ds.tools.command_line import Parser, guarded, real

MOST_MINUTES = 24 * 60
MEANINGS = {
    runner.ALL_WELL: "all that ran is well",
    runner.SOMETHING_FAILED: "something failed: log.txt has the details",
    2: "wrong arguments, or no GPU",
    runner.NOT_FINISHED: "time over: call again",
    runner.NOTHING_RAN: "nothing ran: every step was left out",
}
"""Of exit codes."""


def parse() -> argparse.Namespace:
    names = [step.name for step in STEPS]
    width = max(map(len, names))
    steps = "\n".join(f"  {step.name:{width}}  {step.what}" for step in STEPS)
    codes = "\n".join(f"  {code}  {meaning}" for code, meaning in MEANINGS.items())
    minutes = real(0, MOST_MINUTES, f"use a number of minutes above 0 and at most {MOST_MINUTES}", above=True)
    parser = Parser(
        prog="benchmarks/gpu.sh",
        description=__doc__,
        epilog=f"steps, in their order:\n{steps}\n\nexit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FOLDER", help="where everything is written")
    target.add_argument("--show", type=Path, metavar="FOLDER", help="prints the summary of a folder's results")
    parser.add_argument("--minutes", type=minutes, default=9.0, help="of this call, all together; default: 9")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="these steps, after prepare")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    args = parser.parse_args()
    if args.show and not (args.show / "results.jsonl").exists():
        parser.error(f"--show {args.show}: there is no results.jsonl in it")
    return args


def main() -> int:
    args = parse()
    return guarded("error", lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """What the arguments ask for; returns an exit code."""
    names = [step.name for step in STEPS]
    if args.show:
        print(summary.markdown(Results(args.show), names))
        return 0
    if not args.dry_run and not runner.sees_gpu():
        raise UsageError(f"torch {torch.__version__} sees no GPU here; on a CPU use --dry-run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no step is left running
    steps = [step for step in STEPS if not args.only or step.name in args.only or step.always]
    code = runner.run(args.out, steps, 60 * args.minutes, args.dry_run, extension.measured())
    summary.write(Results(args.out), names)
    print(f"{MEANINGS[code]} (exit code {code}); see {args.out / 'summary.md'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
