"""Decides when the student's snapshot is refreshed: by steps, epochs or drift (`schedule.refresh`).

Pure. The plan asks between segments, and publishes the snapshot.
"""

from __future__ import annotations

from npd.config.sections import Refresh
from npd.types import SegmentReport


class RefreshRule:
    """The rule of a run, and its last refresh.

    `version` is the newest published snapshot, `step` the optimiser step it was taken after.
    """

    def __init__(self, rule: Refresh) -> None:
        self.version = 0
        self.step = 0
        self._rule = rule
        self._has_drifted = False
        self._num_passed_over = 0

    @property
    def next_epoch(self) -> int | None:
        """The epoch of the next refresh, if the rule is `at_epochs`."""
        return self._next_of(self._rule.at_epochs)

    @property
    def next_step(self) -> int | None:
        """The step of the next refresh, if the rule is `at_steps`."""
        return self._next_of(self._rule.at_steps)

    def trained(self, report: SegmentReport) -> None:
        """A segment was trained; its drift counts until the next one."""
        self._has_drifted = has_drifted(report, self._rule.drift)

    def published(self, version: int, step: int) -> None:
        """A snapshot was published."""
        self.version, self.step, self._has_drifted = version, step, False

    def is_due(self, step: int, *, uses: int, uses_per_epoch: int) -> bool:
        """Whether to publish the next snapshot after `step`, when samples had so many `uses`.

        A point reached without a step since the last refresh is passed over: the new snapshot would
        equal the old one.
        """
        while self._is_reached(step, uses, uses_per_epoch):
            if step > self.step:
                return True
            self._num_passed_over += 1
        return False

    def _is_reached(self, step: int, uses: int, uses_per_epoch: int) -> bool:
        rule, since = self._rule, step - self.step
        if rule.every_steps is not None:
            return since >= rule.every_steps
        if rule.drift is not None:
            return self._has_drifted and since >= rule.min_steps
        if self.next_step is not None:
            return step >= self.next_step
        return self.next_epoch is not None and uses >= self.next_epoch * uses_per_epoch

    def _next_of(self, points: tuple[int, ...] | None) -> int | None:
        passed = self.version + self._num_passed_over
        return points[passed] if points is not None and passed < len(points) else None


def has_drifted(report: SegmentReport, threshold: float | None) -> bool:
    """Whether the segment's mean KL(theta || gen) per token is above `threshold` (None: never)."""
    measured = [(s.drift, s.response_tokens) for s in report.steps if s.drift is not None]
    tokens = sum(count for _, count in measured)
    if threshold is None or tokens == 0:
        return False
    return sum(drift * count for drift, count in measured) / tokens > threshold
