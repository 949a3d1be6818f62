"""When a run is due for a generation that nobody asked for. Pure: the course, the settings and the time come in."""

from __future__ import annotations

from ema_server.averager.active_run import ActiveRun
from ema_server.averager.jobs import Reason
from ema_server.config import ServerConfig

FIRST_S = 10.0  # a run's first generation comes this early: no trainer goes back before it


def is_due(course: ActiveRun, config: ServerConfig, now: float, ring_due_at: int | None = None) -> Reason | None:
    """Why the run should be published at `now` (monotonic seconds); None while there is no reason.

    Args:
        course: the run's.
        config: the schedule.
        now: monotonic seconds.
        ring_due_at: the step at which its ring is due for a snapshot, None while it is not.
    """
    last_step = course.last_step
    if last_step is None or not course.is_changed or not course.is_quiet or course.barrier or course.held:
        return None
    if course.publish_error is not None and now < course.retry_at:
        return None
    if course.publish_error is not None or course.departed:
        return "schedule"
    every_s = config.publish_every_seconds if course.generation else min(config.publish_every_seconds, FIRST_S)
    if every_s and now - course.begun_at >= every_s:
        return "schedule"
    if ring_due_at is not None and last_step >= ring_due_at:
        return "schedule"
    if config.publish_every_steps and last_step - course.begun_step >= config.publish_every_steps:
        return "schedule"
    return None
