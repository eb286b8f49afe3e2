"""Builds the optional C++/CUDA extension `pikv_ds._C`; all metadata is in pyproject.toml.

PIKV_BUILD_CPP   unset: build if a compiler exists, and install without the extension if the build
                 fails; 1: a failed build is an error; 0: do not build.
PIKV_BUILD_CUDA  unset: build the CUDA kernels where torch and the toolkit have CUDA; 0: leave them out all the same;
                 1: it is an error if they cannot be built. With a torch for CPUs they are built all the same, with
                 the toolkit in CUDA_HOME, and run under a torch with CUDA only (see `make gpu-extension`).
MAX_JOBS         number of compiler processes at a time.

Without the extension the package runs on the `reference` backend (pure torch).
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"pikv-ds: setup.py needs torch to build against, but importing it failed ({error}). "
        "Install torch first, then run `pip install --no-build-isolation .`"
    )

# Paths in this file are relative to it, as setuptools demands for sources.
ROOT = Path(__file__).resolve().parent

# The oldest torch and Python whose ABI the binary uses; it then runs on all later ones.
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
PYTHON_ABI_TAG = "cp311"


def sources(pattern: str) -> list[str]:
    """Files of csrc/ that match `pattern`, relative to the root, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def is_for_elsewhere() -> bool:
    """Whether CUDA kernels are to be built with a torch for CPUs, to run on another machine."""
    return os.environ.get("PIKV_BUILD_CUDA") == "1" and torch.version.cuda is None


def toolkit_home() -> str | None:
    """The folder of the CUDA toolkit; CUDA_HOME's alone where a torch for CPUs would not look for it."""
    return os.environ.get("CUDA_HOME") if is_for_elsewhere() else cpp_extension.CUDA_HOME


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are left out, None if they are built. The extension keeps it, to say it on a GPU."""
    if os.environ.get("PIKV_BUILD_CUDA") == "0":
        return "PIKV_BUILD_CUDA=0 left them out"
    if torch.version.cuda is None and not is_for_elsewhere():  # CUDAExtension would raise, whatever CUDA_HOME says
        return f"torch {torch.__version__} is built for CPUs"
    home = toolkit_home()
    if home is None:
        return "no CUDA toolkit was found (CUDA_HOME is not set, and no nvcc is in PATH)"
    # torch takes the folder above nvcc's, which is no toolkit where nvcc is a wrapper script.
    header = "include/cuda_runtime.h"
    if not (Path(home, header).exists() or list(Path(home).glob(f"targets/*/{header}"))):
        return "the folder above the nvcc in PATH, or CUDA_HOME, is no CUDA toolkit (no include/cuda_runtime.h)"
    return None


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, also where this torch cannot use it."""
    return torch.cuda.is_available() or Path("/dev/nvidiactl").exists()


def make_extension():
    """The extension with the CUDA kernels where they can be compiled, else with the CPU ones."""
    for_elsewhere, home, with_cuda = is_for_elsewhere(), toolkit_home(), why_no_cuda() is None
    if os.environ.get("PIKV_BUILD_CUDA") == "1" and not with_cuda:
        sys.exit(f"pikv-ds: PIKV_BUILD_CUDA=1: {why_no_cuda()}; set CUDA_HOME to the folder that has bin/nvcc")
    if for_elsewhere:  # a torch for CPUs does not look for the toolkit
        cpp_extension.CUDA_HOME = home
    common = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    if with_cuda:  # what the kernels need, and no older; torch would add sm_75
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
    # Hidden symbols keep our functions from clashing with another library in the same process.
    # No -march: kernels choose their instructions at run time. OpenMP: torch brings libgomp.so.1 and
    # is loaded first, so its threads and torch.set_num_threads are ours, too.
    cxx = [*common, "-Wall", "-fvisibility=hidden", "-fopenmp"]
    # torch's build defines __CUDA_NO_*_CONVERSIONS__, so kernels must convert explicitly
    # (__bfloat162float); we leave that as it is.
    nvcc = list(common)
    if with_cuda:
        cxx += ["-DPIKV_WITH_CUDA", f'-DPIKV_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
        nvcc.append("-DPIKV_WITH_CUDA")
    else:
        cxx.append(f'-DPIKV_WHY_NO_CUDA="{why_no_cuda()}"')
    extension_class = CUDAExtension if with_cuda and not for_elsewhere else CppExtension
    toolkit, link = {}, ["-fopenmp"]
    if for_elsewhere:
        assert home is not None
        toolkit = {
            "include_dirs": [f"{home}/include"],
            "library_dirs": [f"{home}/lib64"],
            "libraries": ["cudart_static", "rt", "dl", "pthread"],  # within the binary, wherever it will run
        }
        # There libtorch brings libtorch_cuda, which has the stream. This one needs nothing of libtorch itself.
        link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    return extension_class(
        name="pikv_ds._C",
        sources=sources("bindings/*.cpp") + sources("cpu/*.cpp") + (sources("cuda/*.cu") * with_cuda),
        depends=sources("**/*.h") + sources("**/*.cuh"),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
        **toolkit,
    )


class OptionalBuildExtension(BuildExtension):
    """Builds the extension if it can; otherwise warns once, naming the cause, and goes on."""

    def run(self) -> None:
        request = os.environ.get("PIKV_BUILD_CPP", "")
        if request == "0":
            self.go_without("PIKV_BUILD_CPP=0 asks for no build")
            return
        required = request == "1"
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None and not required:
            self.go_without(f"no C++ compiler found (looked for {compiler!r}; set CXX to name one)")
            return
        cause = why_no_cuda()
        if cause is not None and (torch.version.cuda is not None or has_gpu()):
            print(
                f"warning: pikv-ds: building without CUDA kernels: {cause}. On a GPU the slower ops of Triton, or of "
                "plain torch, will run. For the kernels install a torch for CUDA and the CUDA toolkit of its version, "
                "set CUDA_HOME to the toolkit, and install pikv-ds again.",
                file=sys.stderr,
            )
        try:
            super().run()
        except Exception as error:
            if required:
                raise
            self.go_without(f"the build failed: {type(error).__name__}: {error}")

    def go_without(self, cause: str) -> None:
        """Leave the extension out, and remove an older build of it from a source tree."""
        print(
            f"warning: pikv-ds: installing without the C++ extension: {cause}. "
            "The slower `reference` backend will be used.",
            file=sys.stderr,
        )
        if self.inplace or self.editable_mode:  # else Python would go on loading the old one
            for stale in (ROOT / "pikv_ds").glob("_C.*so"):
                stale.unlink()
        self.extensions = []


setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": OptionalBuildExtension},
    options={"bdist_wheel": {"py_limited_api": PYTHON_ABI_TAG}},
)
