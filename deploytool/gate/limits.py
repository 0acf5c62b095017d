"""What a release may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateLimits:
    """All shares are of the released value: 0.01 is 1 %.

    metric_drop_max   how much worse a task metric may be
    size_growth_max   how much larger the artifact may be
    slowdown_max      how much more time a run may take; None: latency is not looked at
    new_model         the candidate was trained anew: other outputs than the released ones are noted, not failed, and
                      a task metric must then say that it is good
    """

    metric_drop_max: float = 0.01
    size_growth_max: float = 0.05
    slowdown_max: float | None = 0.10
    new_model: bool = False
