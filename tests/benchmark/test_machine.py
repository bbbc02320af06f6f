"""What figures were measured on is read from the system."""

import torch

from d2dmoe_pl.benchmark.machine import parse_cpu_info, this_machine

INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum
flags\t\t: fpu sse2 fma avx2 avx512f amx_bf16 avx512_bf16 amx_tile

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\n"


def test_cpu_info():
    assert parse_cpu_info(INTEL) == (
        "Intel(R) Xeon(R) Platinum",
        ["avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"],
    )
    name, instructions = parse_cpu_info(ARM)
    assert name
    assert instructions == ["asimd", "sve"]


def test_this_machine():
    machine = this_machine(torch.device("cpu"))
    assert machine.threads == torch.get_num_threads()
    assert torch.__version__ in str(machine)
    assert torch.backends.cpu.get_cpu_capability() in machine.capability
