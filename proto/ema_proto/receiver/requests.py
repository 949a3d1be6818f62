"""The requests of a session for its run: PUBLISH, REWIND and FINISH, from the frame to the averager's answer.

All ranks of a gang have to ask for a REWIND. The FINISH of the leading rank counts, and each rank's is answered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from ema_proto.limits import RANKS_WAIT_S
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connections
from ema_proto.receiver.gang import Claim, ClaimState, Gang
from ema_proto.receiver.intake import Intake
from ema_proto.receiver.ownership import Ownership
from ema_proto.receiver.streaming import Streaming
from ema_proto.wire import messages as m


class Requests:
    """The requests of all gangs.

    Args:
        connections: where answers go.
        runs: which gang owns which run.
        streaming: the sessions that stream.
        events: where requests for the averager are appended.
    """

    def __init__(
        self, connections: Connections, runs: Ownership, streaming: Streaming, events: deque[e.ReceiverEvent]
    ) -> None:
        self._connections = connections
        self._runs = runs
        self._streaming = streaming
        self._events = events

    def publish(self, gang: Gang, claim: Claim, publish: m.Publish) -> None:
        """A rank asks for a durable generation. A finished run has one of all that was applied."""
        if gang.finished is None:
            self._events.append(e.PublishRequested(gang.run, gang.ticket, claim.rank, publish.request, publish.pin))
        else:
            self._connections.send(claim.peer, m.Published(gang.finished.step, publish.request))

    def publish_answered(self, gang: Gang, rank: int, answer: m.Published) -> None:
        """The generation that this rank asked for is durable, or could not be written."""
        claim = gang.members.get(rank)
        if claim is not None:
            self._connections.send(claim.peer, answer)

    def rewind(self, gang: Gang, claim: Claim, intake: Intake, rewind: m.Rewind, now: float) -> None:
        """A rank asks to go back; the averager is asked once all ranks have asked. A finished run stays."""
        if gang.finished is not None:
            text = f"rank {gang.lead} has finished run {gang.run!r}: start the job again to continue it"
            self._connections.send(claim.peer, m.Rewound(rewind.request, None, text))
            return
        answer = gang.rewound.pop(claim.rank, None)
        if answer is not None and answer.request == rewind.request:
            self._connections.send(claim.peer, answer)
            return
        if not intake.begin_rewind(rewind.request):
            return
        asked = gang.ask_rewind(claim.rank, rewind, now + RANKS_WAIT_S)
        if asked is not None:
            self._request_rewind(gang, asked)

    def rewound(self, gang: Gang, request: int, step: int | None, recent: tuple[int, ...], error: str | None) -> None:
        """The run is back at `step`, or (`error`) unchanged."""
        asked = gang.rewinding.pop(request, None)
        if gang.assembly is None or asked is None:
            return
        if error is None:
            gang.assembly.rewound(step, recent)
        self._answer_rewinds(gang, asked, step, error)
        self._streaming.admit_returned(gang)

    def finish(self, gang: Gang, claim: Claim, finish: m.Finish) -> None:
        """A rank ends the run; that of the leading rank asks the averager."""
        claim.state, claim.finish = ClaimState.FINISHING, finish.request
        if gang.finished is not None:
            self._answer_finish(gang, claim, replace(gang.finished, request=finish.request))
        elif claim.rank == gang.lead:
            self._events.append(e.FinishRequested(gang.run, gang.ticket, finish.request))
        elif gang.assembly is not None:
            gang.assembly.ended(claim.rank)

    def finished(self, gang: Gang, answer: m.Finished, now: float) -> None:
        """The run is finished and durable, which ends the gang; or (`error`) it is not, and the gang goes on."""
        if answer.error is None:
            gang.finished = answer
            self._runs.release(gang, now)
            if gang.assembly is not None:
                gang.assembly.finish(gang.lead)
                self._streaming.report_dropped(gang)
        for claim in list(gang.members.values()):
            if claim.finish is not None:
                self._answer_finish(gang, claim, replace(answer, request=claim.finish))

    def tick(self, now: float) -> None:
        """Let time pass: ranks do not wait for ever for the others to go back too."""
        for gang in self._runs.rewinds_due(now):
            self._answer_rewinds(gang, gang.take_rewinds(), None, "not all ranks have asked to go back")

    def _request_rewind(self, gang: Gang, asked: dict[int, m.Rewind]) -> None:
        steps = sorted({rewind.step for rewind in asked.values()})
        if len(steps) > 1:
            self._answer_rewinds(gang, asked, None, f"ranks ask to go back to different steps: {steps}")
            return
        request = asked[gang.lead].request
        gang.rewinding[request] = asked
        self._events.append(e.RewindRequested(gang.run, gang.ticket, request, steps[0]))

    def _answer_rewinds(self, gang: Gang, asked: dict[int, m.Rewind], step: int | None, error: str | None) -> None:
        for rank, rewind in asked.items():
            claim, answer = gang.members.get(rank), m.Rewound(rewind.request, step, error)
            if claim is not None and claim.intake is not None and claim.intake.end_rewind(rewind.request):
                self._connections.send(claim.peer, answer)
                self._streaming.flush(claim)
            else:
                gang.rewound[rank] = answer

    def _answer_finish(self, gang: Gang, claim: Claim, answer: m.Finished) -> None:
        self._connections.send(claim.peer, answer)
        claim.finish = None
        if answer.error is None:
            self._runs.drop_member(gang, claim)
            return
        claim.state = ClaimState.STREAMING
        if gang.assembly is not None:
            gang.assembly.resumed(claim.rank)
