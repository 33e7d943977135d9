"""What a million tokens cost: time, energy and money, from a measured speed and the reader's own prices."""

from __future__ import annotations

from dataclasses import dataclass

from labutils.measurement.energy import Energy
from labutils.measurement.resources import NOT_MEASURED

MILLION = 1e6


@dataclass(frozen=True)
class Cost:
    """Of a million tokens; `kwh` is None where energy was not measured."""

    hours: float
    rent: float
    kwh: float | None
    energy_price: float

    @property
    def total(self) -> float:
        """Rent and energy; without a measured energy, the rent alone."""
        return self.rent + (self.energy_price if self.kwh is not None else 0.0)

    def __str__(self) -> str:
        energy = NOT_MEASURED if self.kwh is None else f"{self.kwh:.3g} kWh"
        return f"{self.hours:.3g} h, energy {energy}, price {self.total:.3g} per million tokens"


def cost_per_million(
    tokens_per_s: float,
    *,
    price_per_hour: float,
    joules_per_token: float | None = None,
    price_per_kwh: float = 0.0,
    utilisation: float = 1.0,
) -> Cost:
    """The cost of 10^6 tokens.

        hours = 10^6 / (tokens/s · utilisation) / 3600,   price = hours · rent + kWh · tariff

    Args:
        tokens_per_s: measured, all sequences of the batch together.
        price_per_hour: what the machine costs, in any currency.
        joules_per_token: measured; None where no counter could be read.
        price_per_kwh: the tariff; 0 where the rent includes it.
        utilisation: share of the paid hours in which it really generates.

    Raises:
        ValueError: for a speed that is not positive, a share outside (0, 1], or a negative price.

    >>> cost_per_million(100.0, price_per_hour=3.6).rent
    10.0
    """
    if tokens_per_s <= 0 or not 0 < utilisation <= 1:
        raise ValueError(f"tokens_per_s must be positive, utilisation in (0, 1]; got {tokens_per_s}, {utilisation}")
    if min(price_per_hour, price_per_kwh, joules_per_token or 0) < 0:
        raise ValueError(f"prices and energy must not be negative; got {price_per_hour}, {price_per_kwh}")
    hours = MILLION / (tokens_per_s * utilisation) / 3600
    kwh = None if joules_per_token is None else joules_per_token * MILLION / 3.6e6
    return Cost(hours, hours * price_per_hour, kwh, (kwh or 0.0) * price_per_kwh)


def joules_per_token(reading: Energy, tokens: int) -> float | None:
    """A measured region's energy per token; None where no counter could be read.

    Raises:
        ValueError: when there was no token.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    return None if reading.joules is None else reading.joules / tokens
