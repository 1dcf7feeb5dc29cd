"""The kernel as a shared library: compiled once for a machine, kept in a cache, and loaded."""

import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax

_SOURCE = pathlib.Path(__file__).with_name("kernel.cc")
# No -ffast-math: NaN and infinity are data here. The kernel itself marks what may be reordered.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)
_HANDLERS = ("jbn_sums", "jbn_pair", "jbn_gated_pair")


def build() -> pathlib.Path:
    """Compiles the kernel for this machine, if that has not been done.

    The compiler is $CXX or else the first of c++, g++ and clang++ that exists.

    Returns:
      The library's path: in $JBN_CACHE, $XDG_CACHE_HOME/jbn or ~/.cache/jbn, named by what it
      depends on: the source, the flags, jaxlib's version and the processor.

    Raises:
      RuntimeError: there is no compiler, it fails, or the directory cannot be written to.
    """
    path = library()
    if not path.exists():
        _compile(path)
    return path


def library() -> pathlib.Path:
    """Returns the path where `build` puts the library, whether or not it exists."""
    jaxlib = importlib.metadata.version("jaxlib")
    parts = (_SOURCE.read_text(), *_flags(), jaxlib, platform.system(), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return _cache() / f"native-{key}.so"


def _cache() -> pathlib.Path:
    if chosen := os.environ.get("JBN_CACHE"):
        return pathlib.Path(chosen).absolute()  # a name without a slash is looked up elsewhere
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jbn"


def _flags() -> tuple[str, ...]:
    """Returns the flags for this processor: the library is not used on another one."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return (*_FLAGS, "-march=native")
    return (*_FLAGS, "-mcpu=native")


def _processor() -> str:
    """Describes what -march=native depends on: the architecture and, on Linux, its features."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise RuntimeError(
            f"CXX is {chosen!r}, and there is no such command; expected a C++ compiler."
        )
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError(
        "No C++ compiler: looked for c++, g++ and clang++. Install one (Debian and Ubuntu: apt "
        "install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name one: "
        "CXX=/path/to/compiler python -m jbn.native. jbn works without it."
    )


def _compile(path: pathlib.Path) -> None:
    compiler = _compiler()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise RuntimeError(
            f"Cannot write to {path.parent} ({error.strerror}): the compiled kernel goes there. "
            "Name another directory: JBN_CACHE=/some/directory"
        ) from error
    with directory as name:
        output = pathlib.Path(name) / path.name
        include = ("-isystem", jax.ffi.include_dir())
        command = [*compiler, *_flags(), *include, str(_SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
            raise RuntimeError(f"The C++ compiler failed: {shlex.join(command)}\n{last}")
        output.replace(path)  # atomic: another process sees the complete file or none


def load(path: pathlib.Path) -> dict[str, str]:
    """Loads the library and registers its handlers with XLA; once a process.

    Returns:
      Each handler with its name in XLA.

    Raises:
      RuntimeError: the library belongs to another user, or cannot be loaded.
    """
    if os.name == "posix" and path.stat().st_uid not in (0, os.geteuid()):
        raise RuntimeError(
            f"{path} belongs to another user, and loading it would run that user's code. Name a "
            "directory of yours, JBN_CACHE=/some/directory, and run `python -m jbn.native`."
        )
    try:
        loaded = ctypes.CDLL(str(path))
        handlers = {handler: getattr(loaded, handler) for handler in _HANDLERS}
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"{path} cannot be loaded: {error}. Remove it and run `python -m jbn.native` again."
        ) from error
    # The name includes the library's, so that JAX's persistent cache tells kernels apart.
    targets = {handler: f"{handler}.{path.stem}" for handler in handlers}
    for handler, function in handlers.items():
        jax.ffi.register_ffi_target(targets[handler], jax.ffi.pycapsule(function), "cpu")
    return targets
