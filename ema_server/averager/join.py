"""Carries out what `join_policy` decides about a JOIN: starts, continues, rewinds or sets aside a run."""

from __future__ import annotations

from datetime import UTC, datetime

from ema_proto.errors import RejectCode
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.messages import Continuation
from ema_server.averager.active_run import ActiveRun, PendingRewind, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Failed, Join, Joined, Refused
from ema_server.averager.join_policy import Decision, GoBack, Known, decide
from ema_server.averager.rewind import begin_rewind, carried_back
from ema_server.averager.short_runs import delete_short_runs
from ema_server.publishing.publisher import CutRing
from ema_server.runs.run import new_run
from ema_server.runs.status_store import RunState
from ema_server.storage.catalog import FileEntry, Generation
from ema_server.storage.generation import read_record
from ema_server.storage.records import BrokenGeneration, RunRecord, newest_step_units


def join(runs: ActiveRuns, job: Join) -> None:
    try:
        try:
            _join(runs, job)
        except MemoryError:
            if not runs.drop_spares():
                raise
            _join(runs, job)
    except MemoryError as error:
        text = f"run {job.run!r} does not fit into the server: {error}"
        job.reply(Refused(RejectCode.OUT_OF_MEMORY, text))
    except OSError as error:
        text = f"run {job.run!r} cannot be opened on the server's disk: {error.strerror or error}"
        job.reply(Refused(RejectCode.UNAVAILABLE, text))


def _join(runs: ActiveRuns, job: Join) -> None:
    short = runs.resources.companions.shortage(job.run, _files_of(job) or ())
    if short is not None:
        job.reply(Refused(RejectCode.UNAVAILABLE, f"there is no room for the files of run {job.run!r}: {short}"))
        return
    match decide(job.join, _known(runs, job.run)):
        case Refused(code=RejectCode.NO_GENERATION) if (active := runs.get(job.run)) and not active.is_idle:
            runs.hold(job)  # the generation in progress may be the one to go back to
        case Refused() as refused:
            job.reply(refused)
        case Decision.START:
            _start(runs, job)
        case Decision.CONTINUE:
            _continue(runs, job)
        case GoBack(step):
            _go_back(runs, job, step)
        case Decision.SET_ASIDE:
            _set_aside(runs, job)


def _known(runs: ActiveRuns, name: str) -> Known | None:
    steps = tuple(generation.step for generation in runs.kept(name))
    active = runs.get(name)
    if active is not None and active.run.last_step is not None:
        return _known_by(active.run.record(active.run.last_step), active.run.manifest, steps)
    with runs.resources.unlocked():
        for _, record, manifest in runs.readable(name):
            return _known_by(record.run, manifest, steps)
    return None


def _known_by(run: RunRecord, manifest: Manifest, steps: tuple[int, ...]) -> Known:
    averages = {average.name: average.spec for average in run.averages}
    removed = frozenset((average.name, average.spec) for average in run.removed)
    return Known(run.step, manifest, averages, steps, removed)


def _start(runs: ActiveRuns, job: Join, set_aside: str | None = None) -> None:
    like = runs.resources.data_dir.like(job.run)
    if like is not None:
        text = f"run {job.run!r} differs from run {like!r} only in case, and some file systems confuse the two"
        job.reply(Refused(RejectCode.BAD_RUN, f"{text}: take another name"))
        return
    runs.resources.data_dir.create_run(job.run)
    empty = runs.get(job.run)
    if empty is not None:
        runs.forget(empty)  # it never had a snapshot: its memory goes first
    del empty
    with runs.resources.unlocked():
        run = new_run(job.join, runs.resources.now(), runs.resources.device)
    _admit(runs.create(run), job, "new", set_aside)


def _continue(runs: ActiveRuns, job: Join) -> None:
    active = runs.get(job.run)
    if active is None:
        generation = runs.resources.catalog.generations(job.run)[0]
        active = _load(runs, job, generation)
        if active is None:
            return
        runs.resources.publisher.submit(CutRing(job.run, generation.step))
    _admit(active, job, "continued")


def _go_back(runs: ActiveRuns, job: Join, step: int) -> None:
    active = runs.get(job.run)
    if active is not None:
        if not active.is_idle:
            runs.hold(job)
            return
        begin_rewind(runs, active, _pending(active, job, step, is_loaded=False))
        return
    _, newest, _ = next(runs.readable(job.run))
    source = next(g for g in runs.kept(job.run) if g.step <= step)
    active = _load(runs, job, source, newest.run)
    if active is not None:
        active.run.set_step_units(newest_step_units(newest.run.step_units_history))  # averages added since may need it
        record = active.run.record(source.step)
        active.begin_rewind(source, record, _pending(active, job, step, is_loaded=True))


def _pending(active: ActiveRun, job: Join, step: int, *, is_loaded: bool) -> PendingRewind:
    def done(failed: Failed | None) -> None:
        if failed is None:
            _admit(active, job, "rewound")
        else:
            text = f"run {job.run!r} cannot be rewound: {failed.text}"
            job.reply(Refused(RejectCode.UNAVAILABLE, text))

    return PendingRewind(step, is_loaded, done)


def _load(runs: ActiveRuns, job: Join, generation: Generation, now: RunRecord | None = None) -> ActiveRun | None:
    """Read a run into memory, with the averages that it has `now`.

    A broken generation is set aside, and the JOIN decided again: what is left may lead to another decision.
    """
    try:
        record = read_record(generation.folder).run
        return runs.load(generation, record if now is None else carried_back(record, now))
    except BrokenGeneration as error:
        runs.resources.publisher.set_bad(generation, error)
        _join(runs, job)
        return None


def _set_aside(runs: ActiveRuns, job: Join) -> None:
    active = runs.get(job.run)
    if active is not None:
        if active.is_idle and active.is_changed and active.publish_error is not None:
            text = f"run {job.run!r} cannot be set aside, its last steps are not on disk: {active.publish_error}"
            job.reply(Refused(RejectCode.UNAVAILABLE, text))
            return
        if active.is_idle and active.is_changed:
            active.publish(PublishRequest("leave"))
        if not active.is_idle:
            runs.hold(job)
            return
    resources = runs.resources
    stamp = datetime.fromtimestamp(resources.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
    new_name = resources.data_dir.set_run_aside(job.run, stamp)
    resources.catalog.move(job.run, new_name, resources.data_dir.run_folder(new_name))
    if active is not None:
        runs.forget(active)
    resources.statuses.remove(job.run)
    runs.show_from_disk(new_name)
    resources.publisher.offer(new_name)
    del active  # its memory goes first
    _start(runs, job, new_name)
    delete_short_runs(runs, job.run)


def _admit(active: ActiveRun, job: Join, continuation: Continuation, set_aside: str | None = None) -> None:
    run = active.run
    active.state, active.departed = RunState.ACTIVE, False
    active.session += 1
    active.quarantine = None
    active.publish_every_steps = job.join.publish_every_steps
    active.is_held_back = active.is_held_back and job.join.reconnect
    active.rate.reset(reconnected=job.join.reconnect)
    run.every = job.join.every
    run.set_step_units(job.join.step_units)
    run.config = job.join.config if job.join.config is not None else run.config
    active.show()
    missing = _announce_files(active, job)
    published_step = active.generation.step if active.generation is not None else None
    job.reply(
        Joined(run.last_step, published_step, continuation, run.manifest, run.exempt, run.recent, set_aside, missing)
    )


def _announce_files(active: ActiveRun, job: Join) -> tuple[str, ...]:
    """Take the JOIN's companion files into use, or return which are to be sent before that."""
    files = _files_of(job)
    if files is None:
        return ()
    missing = active.resources.companions.claim(active.name, files, also=active.run.files)
    if not missing:
        active.use_files(files)
    return missing


def _files_of(job: Join) -> tuple[FileEntry, ...] | None:
    files = job.join.files
    return None if files is None else tuple(FileEntry(file.name, file.nbytes, file.sha256) for file in files)
