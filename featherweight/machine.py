"""This machine: what its processor can do, and which backends are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Processor:
    """What this machine's processor has, as far as it matters to whole numbers.

    Attributes:
        model: its name.
        instructions: of those that matter, the ones it has, as Linux names them.
    """

    model: str
    instructions: tuple[str, ...] = field(default=())

    @property
    def whole_products(self) -> bool:
        """Whether four products of 8-bit numbers are summed in 32 bits, so that nothing overflows."""
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
        return not x86 or any(name in self.instructions for name in ("avx512_vnni", "avx_vnni", "amx_int8"))

    @property
    def bf16(self) -> bool:
        """Whether it multiplies in bfloat16."""
        return any(name in self.instructions for name in ("amx_bf16", "avx512_bf16"))

    def __str__(self) -> str:
        return f"{self.model} ({', '.join(self.instructions) or 'no vector instructions that matter here'})"


def processor() -> Processor:
    """This machine's processor; from ``/proc/cpuinfo`` where there is one, without instructions elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return Processor(platform.processor() or platform.machine())
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(said.get("flags", "").split())
    known = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16")
    return Processor(said.get("model name", platform.machine()), tuple(name for name in known if name in flags))


def free_memory() -> int:
    """Bytes of memory that this process could still take; 4 GiB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a container's own limit; "max" where it has none
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        free = min(free, int((group / "memory.max").read_text(encoding="utf-8")) - used)
    return max(free, 0)


@dataclass(frozen=True)
class Backend:
    """Something that runs, trains or writes models, and that need not be installed.

    Attributes:
        name: what it is for.
        packages: that it needs, with the versions that are installed; None for one that is missing.
        install: how to get it.
    """

    name: str
    packages: dict[str, str | None]
    install: str

    @property
    def works(self) -> bool:
        """Whether all of its packages are here."""
        return None not in self.packages.values()


# By what it is for: the extra that brings it, and the packages it needs.
_BACKENDS = {
    "ONNX files, run in ONNX Runtime": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO files, run in OpenVINO": ("openvino", ("onnx", "onnxscript", "openvino")),
    "ExecuTorch files, run in ExecuTorch": ("executorch", ("executorch", "torchao")),
    "Core ML packages, run on macOS": ("coreml", ("coremltools",)),
    "training loop": ("train", ("accelerate",)),
}


def backends() -> tuple[Backend, ...]:
    """Every backend, with what of it is installed."""

    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return tuple(
        Backend(name, {p: installed(p) for p in packages}, f"pip install 'featherweight[{extra}]'")
        for name, (extra, packages) in _BACKENDS.items()
    )


def missing(extra: str) -> str | None:
    """What of an extra's packages is not installed here and how to get it; None where all of them are."""
    packages = next(packages for name, packages in _BACKENDS.values() if name == extra)
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        return f"{' and '.join(absent)}, not installed here: pip install 'featherweight[{extra}]'"
    return None
