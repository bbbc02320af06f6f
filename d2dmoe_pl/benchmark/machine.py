"""What the figures were measured on."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
# what decides how fast products are; Linux's own names
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Machine:
    """Where the figures come from.

    Attributes:
        device: Name of the GPU, or model of the CPU.
        capability: A GPU's compute capability; a CPU's instruction sets, and the one that PyTorch uses.
        threads: That PyTorch's operators use on the CPU.
        torch: PyTorch's version.
    """

    device: str
    capability: str
    threads: int
    torch: str

    def __str__(self) -> str:
        return f"{self.device} ({self.capability}), {self.threads} threads, torch {self.torch}"


def this_machine(device: torch.device) -> Machine:
    """The machine that computes on ``device``."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"compute capability {major}.{minor}"
    else:
        info = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
        name, found = parse_cpu_info(info)
        capability = ", ".join([*found, f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}"])
    return Machine(name, capability, torch.get_num_threads(), torch.__version__)


def parse_cpu_info(info: str) -> tuple[str, list[str]]:
    """The CPU's model and those of ``INSTRUCTION_SETS`` that it has, from the text of ``/proc/cpuinfo``."""
    model = re.search(r"^model name\s*:\s*(.+)$", info, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, flags=re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return name, [instructions for instructions in INSTRUCTION_SETS if instructions in has]
