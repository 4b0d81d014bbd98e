"""Energy of one call, estimated from published energies per operation: to compare networks by, not a measurement.

Arithmetic: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, pages 10–14, figure 1.1.9:
45 nm, 0.9 V. Memory: the 640 pJ for 32 bits from DRAM of Han et al., "Learning both weights and connections for
efficient neural networks", NeurIPS 2015, figure 1; Horowitz gives 1.3–2.6 nJ for 64 bits; it is about half its low end.

Left out: caches and every reuse of a value once it is on the chip, instruction fetch and control, leakage, and
element-wise work. On today's chips every figure is several times lower; what carries over is that moving a value costs
about a hundred times what multiplying it does.
"""

from __future__ import annotations

from featherweight.errors import did_you_mean

MULTIPLY_ADD_PICOJOULES = {"float32": 3.7 + 0.9, "float16": 1.1 + 0.4, "int8": 0.2 + 0.03}
DRAM_PICOJOULES_PER_BYTE = 640 / 4


def estimate(macs: float, bytes_moved: float, arithmetic: str = "float32") -> float:
    """Joules of so many multiply-accumulates and so many bytes to or from DRAM.

    Args:
        macs: multiply-accumulates.
        bytes_moved: bytes read from and written to DRAM.
        arithmetic: what is multiplied: ``float32`` (the default), ``float16`` or ``int8``.

    Raises:
        ValueError: no energy is known for the arithmetic.
    """
    if arithmetic not in MULTIPLY_ADD_PICOJOULES:
        known = ", ".join(MULTIPLY_ADD_PICOJOULES)
        hint = did_you_mean(arithmetic, MULTIPLY_ADD_PICOJOULES)
        raise ValueError(f"no energy is known for {arithmetic!r} arithmetic, only for {known}{hint}")
    return (macs * MULTIPLY_ADD_PICOJOULES[arithmetic] + bytes_moved * DRAM_PICOJOULES_PER_BYTE) * 1e-12
