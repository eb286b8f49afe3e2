"""Builds the compiled ops for GPUs, also on a machine without one, and says which build may be measured.

    make gpu-extension                                  here, for the H100 and H200 (architecture 9.0a)
    make gpu-extension ARCHITECTURES="8.0;10.0"         for others

The result lies in build/gpu. Carry that folder with the tree to a machine with a GPU: `benchmarks/gpu.sh` uses it
where it was built from the sources that the tree has, and runs there; else it builds another one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.runner import ending
from pikv_ds.checks import named
from pikv_ds.errors import UsageError
from pikv_ds.tools.command_line import Parser, guarded

ROOT = Path(__file__).resolve().parents[2]
PREBUILT, INSTALLED = ROOT / "build" / "gpu", ROOT / "pikv_ds"
BINARY, NOTE = "_C.abi3.so", "_C.json"

PROBE = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("pikv_ds._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
outs, lses = torch.ones(2, 3, 8, device="cuda"), torch.zeros(2, 3, device="cuda")
out, lse = torch.zeros(3, 8, device="cuda"), torch.zeros(3, device="cuda")
torch.ops.pikv_ds.merge_partials(outs, lses, out, lse)
assert (out == 1).all(), "a kernel gave a wrong result"
"""
"""Ends well where a build loads, has CUDA kernels, and these run on the GPU that is there."""


def digest(paths: Iterable[Path], root: Path = ROOT) -> str:
    """SHA-256 over files and their names."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def built_from(root: Path = ROOT, *more: Path) -> str:
    """Digest of what the extension is made of, and of more files."""
    return digest([root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file()), *more], root)


def measured() -> str:
    """Digest of all code that the run measures, or measures with."""
    return built_from(ROOT, *(p for folder in ("pikv_ds", "benchmarks/gpu") for p in (ROOT / folder).rglob("*.py")))


def fault(folder: Path, root: Path = ROOT) -> str | None:
    """Why the build in a folder is not to be measured, None if it may be."""
    binary, note = folder / BINARY, folder / NOTE
    if not binary.exists():
        return "there is none"
    if not note.exists():
        return f"no {NOTE} beside it says which sources it was built from"
    try:
        facts = json.loads(note.read_text())
        sources, digested = facts["sources"], facts["binary"]
    except (ValueError, TypeError, KeyError):  # cut short as it was carried, or of something else
        return f"{NOTE} beside it cannot be read"
    if sources != built_from(root):
        return "it was built from other sources than csrc/ and setup.py are now"
    if digested != digest([binary], folder):
        return f"it is not the file that {NOTE} was written for"
    done = subprocess.run([sys.executable, "-c", PROBE, str(binary)], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() if done.returncode > 0 else []  # what dies of a signal says nothing of it
    return f"it does not run here: {said[-1] if said else ending(done.returncode)}"


def cuda_home() -> str:
    """The toolkit's folder: CUDA_HOME, or what nvcc itself says, as the one on the path may be a wrapper.

    Raises:
        ValueError: there is no nvcc.
    """
    if home := os.environ.get("CUDA_HOME"):
        return home
    if shutil.which("nvcc") is None:
        raise UsageError("no CUDA toolkit: nvcc is not on the path; install one, or set CUDA_HOME to its folder")
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in said.splitlines():
        if line.startswith("#$ TOP="):
            return str(Path(line.removeprefix("#$ TOP=")).resolve())
    raise UsageError("`nvcc --dryrun` does not tell its folder (no line TOP=); set CUDA_HOME to it")


def build(architectures: str, root: Path = ROOT) -> None:
    """Builds into `PREBUILT`.

    Raises:
        ValueError: there is no toolkit, or the compiler does not like it.
    """
    environment = os.environ | {
        "CUDA_HOME": cuda_home(),
        "TORCH_CUDA_ARCH_LIST": architectures,
        "PIKV_BUILD_CPP": "1",
        "PIKV_BUILD_CUDA": "1",
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count()),
    }
    sources = built_from(root)
    folders = ["--build-lib", str(PREBUILT / "lib"), "--build-temp", str(root / "build" / "gpu-objects")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    if code := subprocess.run(command, cwd=root, env=environment).returncode:
        raise UsageError(f"the build for {architectures!r} ended with {ending(code)}; see what the compiler printed")
    shutil.move(PREBUILT / "lib" / "pikv_ds" / BINARY, PREBUILT / BINARY)
    shutil.rmtree(PREBUILT / "lib")
    facts = {"sources": sources, "binary": digest([PREBUILT / BINARY], PREBUILT), "architectures": architectures}
    (PREBUILT / NOTE).write_text(json.dumps(facts) + "\n")


def prepare(architectures: str, root: Path = ROOT) -> dict[str, str]:
    """Sees to it that `pikv_ds._C` is of these sources and runs here: the one that is there, a carried one, or a new
    one. Returns which it is, and what was the matter with the others; prints that as soon as it is known.

    Raises:
        ValueError: none can be built, or also a new one does not run.
    """
    told = {}
    for name, folder in (("in pikv_ds", INSTALLED), ("in build/gpu", PREBUILT), ("built here", PREBUILT)):
        if name == "built here":
            try:
                build(architectures, root)
            except UsageError as error:
                refused = "; ".join(f"the extension {other}: {why}" for other, why in told.items())
                raise UsageError(f"{refused}; a new one: {error}") from error
        if (why := fault(folder, root)) is None:
            if folder is PREBUILT:
                for file in (BINARY, NOTE):
                    replace(PREBUILT / file, INSTALLED / file)
            return {"used": name, **told}
        told[name] = why
        print(f"the extension {name}: {why}", flush=True)
    raise UsageError(f"the extension was built, but {told['built here']}")


def replace(source: Path, target: Path) -> None:
    """Copies a file over another one, which a process that has mapped it keeps as it was."""
    new = target.with_name(f"new-{os.getpid()}-{target.name}")
    try:
        shutil.copy2(source, new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def architecture_list(text: str) -> str:
    """The type of an option: architectures of GPUs, such as ``8.0;9.0a;10.0+PTX``."""
    if not re.fullmatch(r"\d{1,2}\.\d[af]?(\+PTX)?([; ]\d{1,2}\.\d[af]?(\+PTX)?)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{named(text)}: write architectures as 9.0a, or 8.0;10.0+PTX")
    return text


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=architecture_list, default="9.0a", help="of GPUs; default: 9.0a")
    args = parser.parse_args()

    def work() -> int:
        build(args.architectures)
        size = (PREBUILT / BINARY).stat().st_size / 2**20
        print(f"{PREBUILT.relative_to(ROOT) / BINARY} ({size:.0f} MiB): carry build/gpu with the tree")
        return 0

    return guarded("error", work)


if __name__ == "__main__":
    sys.exit(main())
