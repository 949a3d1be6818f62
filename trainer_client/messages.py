"""The log lines when a run is joined, checkpointed or finished: what the averages lack of the trainer's steps."""

from __future__ import annotations

import logging

from ema_proto.sender.events import Answered
from ema_proto.wire.messages import Joined

log = logging.getLogger("ema")


def log_joined(run: str, joined: Joined, steps: int, last_due: int) -> None:
    """Log where a run begins or continues, as a warning if something was set aside or steps are lost.

    Args:
        run: its name.
        joined: the server's answer.
        steps: optimizer steps that the trainer has taken.
        last_due: the newest of them that `every` sends.
    """
    if joined.set_aside is not None:
        text = "ema: run %s begins; the earlier run of this name is kept as %s (to continue a run, resume the training "
        text += "from its checkpoint, or pass step= or call load_state_dict())"
        log.warning(text, run, joined.set_aside)
    elif joined.continuation != "new" and joined.last_step is not None:
        if joined.last_step < last_due:
            verb = "went back to" if joined.continuation == "rewound" else "are at"
            text = "ema: run %s continues at step %d; the averages %s step %d, and the %d steps between them are a gap"
            log.warning(text, run, steps, verb, joined.last_step, steps - joined.last_step)
        else:
            log.info("ema: run %s continues at step %d", run, steps)


def log_checkpoint(step: int, answer: Answered, due: int) -> bool:
    """Log why the generation of a checkpoint lacks steps; whether it has them.

    Args:
        step: of the trainer's checkpoint.
        answer: the server's.
        due: the newest step up to `step` that `every` sends.
    """
    if answer.error is not None:
        log.warning("ema: no checkpoint at step %d: %s", step, answer.error)
    elif answer.step is None:
        log.warning("ema: no checkpoint at step %d: the run has no snapshot", step)
    elif answer.step < due:
        text = "ema: no checkpoint at step %d: the generation holds step %d, later steps were not applied; a training "
        text += "that resumes from here continues its averages from that generation"
        log.warning(text, step, answer.step)
    else:
        return True
    return False


def log_finished(run: str, answer: Answered, last_due: int, stopped: str | None, published: int | None) -> bool:
    """Log what a finished run lacks; whether it is finished.

    Args:
        run: its name.
        answer: the server's.
        last_due: the newest step that `every` sends.
        stopped: why nothing was sent any longer, or None.
        published: the step of the newest generation, as far as is known.
    """
    if answer.error is not None:
        kept = (
            "no generation of it is known"
            if published is None
            else f"its newest known generation is of step {published}"
        )
        log.warning("ema: run %s is not finished on the server, and %s: %s", run, kept, answer.error)
        return False
    if answer.step is None:
        log.warning("ema: run %s ends without a snapshot: no step was sent", run)
        return False
    if answer.step < last_due:
        why = "when_behind='wait' sends every step" if stopped is None else "since the model has changed"
        text = "ema: run %s ends with step %d: those up to %d were not sent; %s"
        log.warning(text, run, answer.step, last_due, why)
    if answer.warning is not None:
        log.warning("ema: run %s is finished: %s", run, answer.warning)
    return True
