"""What the article says a fast start is worth, each claim held against a slow and a fast plan. Pure.

"Before" counts as met within a quarter of the figure, "after" when it is at least as good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from _queueing import Policy, Result

BEFORE_SLACK: Final = 0.25
POOL: Final = (0.50, 0.05)
UTILISATION: Final = (0.20, 0.65)
SAVED: Final = 0.45
DOLLARS: Final = (0.35, 0.12)
"""Of a million tokens."""
FACTOR: Final = DOLLARS[0] / DOLLARS[1]
_SECONDS_AN_HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a GPU costs, and what it does.

    Attributes:
        dollars_an_hour: of one GPU, held for whatever.
        tokens_per_s: that an instance gives while it serves.
    """

    dollars_an_hour: float
    tokens_per_s: float

    def of_million_tokens(self, utilisation: float) -> float:
        """Dollars, when the GPU serves for that part of the time in which it is held."""
        return self.dollars_an_hour / (_SECONDS_AN_HOUR * self.tokens_per_s * utilisation) * 1e6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cheapest way to meet the goal with starts of a given length.

    Attributes:
        start_s: of a start.
        policy: which way that is.
        result: what came of it.
        peak: most requests at the same time, had none to wait.
    """

    start_s: float
    policy: Policy
    result: Result
    peak: int

    @property
    def pool(self) -> float:
        """Instances that are ready and serve nobody, in the mean, as a part of the peak: whatever keeps them there."""
        idle_s = self.result.held_s - self.result.busy_s - self.result.starts * self.start_s
        return max(0.0, idle_s) / self.result.span_s / self.peak  # rounding may leave a trace below 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one claim.

    Attributes:
        claim: in the article's figures.
        ours: in ours.
        before: whether the slow side is as claimed; None where the claim has none.
        after: whether the fast one is.
    """

    claim: str
    ours: str
    before: bool | None
    after: bool

    @property
    def word(self) -> str:
        if self.after and self.before is not False:
            return "reproduced"
        if self.after:
            return "after: reproduced; before: not"
        return "before: reproduced; after: not" if self.before else "not reproduced"


def verdicts(slow: Plan, fast: Plan, prices: Prices) -> list[Verdict]:
    """Each claim of the article, `slow` being before and `fast` after."""
    pools, uses = (slow.pool, fast.pool), (slow.result.utilisation, fast.result.utilisation)
    saved = 1 - fast.result.held_s / slow.result.held_s
    dollars = tuple(prices.of_million_tokens(use) for use in uses)
    return [
        Verdict(
            claim="warm pool: 50 % to under 5 % of peak",
            ours=f"{pools[0]:.0%} to {pools[1]:.1%}",
            before=_about(pools[0], POOL[0]),
            after=pools[1] < POOL[1],
        ),
        Verdict(
            claim="GPU utilisation: 20 to 65 %",
            ours=f"{uses[0]:.0%} to {uses[1]:.0%}",
            before=_about(uses[0], UTILISATION[0]),
            after=uses[1] >= UTILISATION[1],
        ),
        Verdict(claim="cost: 45 % lower", ours=f"{saved:.0%} lower", before=None, after=saved >= SAVED),
        Verdict(
            claim="a million tokens: $0.35 to $0.12",
            ours=f"${dollars[0]:.2f} to ${dollars[1]:.2f}",
            before=_about(dollars[0], DOLLARS[0]),
            after=dollars[1] <= DOLLARS[1],
        ),
        Verdict(
            claim=f"the same as a factor: {FACTOR:.1f}, whatever a GPU costs and gives",
            ours=f"{dollars[0] / dollars[1]:.1f}; $0.35 before would be {_tokens_per_s(prices, uses[0]):.0f} tokens/s",
            before=None,
            after=dollars[0] / dollars[1] >= FACTOR,
        ),
    ]


def consistency() -> list[str]:
    """What the article's figures imply of each other, by arithmetic alone."""
    implied = [dollars * use for dollars, use in zip(DOLLARS, UTILISATION, strict=True)]
    rates = [2 / _SECONDS_AN_HOUR / dollars * 1e6 for dollars in implied]
    return [
        f"${DOLLARS[0]} to ${DOLLARS[1]} is {1 - DOLLARS[1] / DOLLARS[0]:.0%} lower, 20 to 65 % utilisation would be "
        f"{1 - UTILISATION[0] / UTILISATION[1]:.0%} lower for the same tokens: neither is the 45 % that it states.",
        f"At full use a million tokens would cost ${implied[0]:.3f} (from before) or ${implied[1]:.3f} (from after): "
        f"a GPU at $2 an hour would have to give {rates[0]:.0f} or {rates[1]:.0f} tokens/s whenever it serves.",
    ]


def _tokens_per_s(prices: Prices, utilisation: float) -> float:
    """What a serving GPU must give for a million tokens to cost what they did before."""
    return prices.dollars_an_hour / (_SECONDS_AN_HOUR * utilisation * DOLLARS[0]) * 1e6


def _about(ours: float, claimed: float) -> bool:
    return abs(ours - claimed) <= BEFORE_SLACK * claimed
