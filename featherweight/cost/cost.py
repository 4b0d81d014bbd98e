"""What a layer or a network costs, as one value that adds up."""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.cost import energy
from featherweight.errors import did_you_mean

METRICS = ("macs", "params", "bytes", "energy")


@dataclass(frozen=True)
class Cost:
    """The cost of one call of a layer or a network.

    Attributes:
        macs: multiply-accumulates of matrix-like products (see `featherweight.cost.count`).
        params: number of parameters.
        bytes: bytes of parameters and persistent buffers as they are stored.
        activation_bytes: bytes the operations write.
        uncounted: operations whose multiply-accumulates are missing from `macs`, by name.
    """

    macs: int = 0
    params: int = 0
    bytes: int = 0
    activation_bytes: int = 0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        """Both together; what either left out stays named."""
        return self._combined(other, +1)

    def __sub__(self, other: Cost) -> Cost:
        """What is left without the other; figures may be negative, and what either left out stays named."""
        return self._combined(other, -1)

    def _combined(self, other: Cost, sign: int) -> Cost:
        return Cost(
            self.macs + sign * other.macs,
            self.params + sign * other.params,
            self.bytes + sign * other.bytes,
            self.activation_bytes + sign * other.activation_bytes,
            tuple(sorted({*self.uncounted, *other.uncounted})),
        )

    @property
    def energy_joules(self) -> float:
        """An estimate: float32 arithmetic, each stored byte read once, each activation byte written and read once."""
        return energy.estimate(self.macs, self.bytes + 2 * self.activation_bytes)

    def metric(self, name: str) -> float:
        """The figure by its name: ``macs``, ``params``, ``bytes`` or ``energy`` (joules).

        Raises:
            ValueError: there is no such figure.
        """
        if name not in METRICS:
            raise ValueError(f"there is no cost {name!r}, only {', '.join(METRICS)}{did_you_mean(name, METRICS)}")
        return self.energy_joules if name == "energy" else float(getattr(self, name))
