"""Supervision: how the lives this nest holds begin, crash, wait, begin again and end (V1, S6), and what is written of them.

    Hatch          LifeRunning
  ---------> STARTING --------> RUNNING
     ^          |                  |      EndLife                 LifeEnded
     |          | LifeCrashed      +------------------> ENDING --------------> a record, or nothing
     +----- BACKOFF <--------------+                      (released, stopped, lost to the winner)

A status is written before the effect it speaks of: a bird that takes its node down while it starts is counted by whoever comes next.
In a burst it is told a little later (`Registry._publish`).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from flock_ray import notices
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import messages as msg
from flock_ray.core import wire
from flock_ray.core.holds import BirdLife, Phase
from flock_ray.core.records import Record
from flock_ray.specs import Dot, Name, Status

if TYPE_CHECKING:
    from flock_ray.core.registry import Registry


class Supervision:
    """The lives of one nest's birds."""

    def __init__(self, nest: Registry) -> None:
        self._nest = nest
        self._sequence = 0
        self._timers: list[tuple[float, Dot, int]] = []  # backoffs and start timeouts

    # A life begins

    def adopt(self, adopted: ev.Adopted) -> None:
        """Goes on with a life that a host has kept while its nest was away (V2)."""
        phase = Phase.RUNNING if adopted.running else Phase.STARTING
        life = BirdLife(
            adopted.name, adopted.dot, adopted.spec, adopted.born, adopted.incarnation, phase, host=adopted.host, address=adopted.address
        )
        life.restarts, life.crashes, life.running_since = adopted.restarts, adopted.crashes, self._nest.now
        self._nest.holds.begin(life)
        self.write(life, "running" if adopted.running else "starting")

    def hatch(self, name: Name, dot: Dot, record: Record) -> None:
        """Begins the first life of a dot at this nest; it has been permitted."""
        status = record.status
        source = self._nest.holds.records.get(dot)
        incarnation = max(status.incarnation if status else 0, source.incarnation if source else 0)
        life = BirdLife(name, dot, record.spec, incarnation + 1, incarnation + 1, Phase.STARTING, source=source)
        if source is not None:
            self._nest.holds.drop(name, dot)  # it lives on as the source, until this life runs
        if status is not None:
            self._nest.hurry()
            life.restarts, life.crashes, life.error = status.restarts, status.crashes, status.error
            if status.state == "starting" and status.life not in self._nest.membership.view:
                life.crashes += 1  # it may be what took its node down (S6)
                life.restarts += 1
        self._nest.holds.begin(life)
        if life.crashes > record.spec.options.max_restarts:
            life.error = life.error or "its node died each time it was started"
            self._fail(life)
        else:
            if status is not None and status.state != "pending":  # it has lived before
                self._tell_next_life(life, status.life.node)
            self.begin(life)

    def _tell_next_life(self, life: BirdLife, before: str) -> None:
        nest = self._nest
        if before == nest.me.node:
            nest.notice(notices.BirdRestarted(nest.me, life.name, life.dot, life.incarnation))
        else:
            nest.notice(notices.BirdMoved(nest.me, life.name, life.dot, life.incarnation, before))

    def begin(self, life: BirdLife) -> None:
        """Starts the process of a life; that it starts is written first (S6)."""
        life.phase, life.born = Phase.STARTING, life.incarnation
        self.write(life, "starting")
        spec, source = life.spec, life.source
        state, has_state = (source.state, True) if source is not None else (None, False)
        code = self._nest.replica.code[spec.code]
        self._nest.effect(do.Hatch(life.name, life.dot, life.born, spec, code, life.restarts, life.crashes, state, has_state))
        if spec.options.start_timeout is not None and not spec.options.light:
            self._schedule(life, self._nest.now + spec.options.start_timeout)

    def raise_incarnation(self, life: BirdLife, record: Record) -> None:
        """The life that stays takes an incarnation above every one displaced, and writes it (H4)."""
        status, released = record.status, self._nest.holds.records.get(life.dot)
        if life.phase is Phase.ENDING:
            return
        if status is not None and status.life in self._nest.membership.living() and status.life not in self._nest.membership.view:
            return  # it will be admitted and released, or die; raised now, the two would outbid each other at wire speed
        mine = status is not None and (status.incarnation, status.life) == (life.incarnation, self._nest.me)
        if mine and released is None:
            return
        above = max(life.incarnation, status.incarnation if status else 0, released.incarnation if released else 0)
        life.incarnation = above + 1
        if released is not None:
            self._nest.handover.drop_record(life.name, life.dot)
        self._nest.effect(do.Raise(life.dot, life.born, life.incarnation))
        self.write(life, {Phase.STARTING: "starting", Phase.RUNNING: "running", Phase.BACKOFF: "restarting"}[life.phase])

    def restart(self, name: Name) -> bool:
        """A new life in place, if this nest is the one to see to it. Returns whether it is."""
        winner = self._nest.replica.winner(name)
        if winner is None:
            return False
        dot, record = winner
        life = self._nest.holds.lives.get(dot)
        if life is not None:
            life.crashes = 0
            if life.phase is Phase.BACKOFF:
                self._schedule(life, self._nest.now)
            elif life.phase is not Phase.ENDING:
                life.restart_after = True
                self.end(life, "stopped", keep=False)
            return True
        if self._nest.owns(name) and record.status is not None and record.status.state == "failed":
            cleared = Status(
                record.status.incarnation + 1, self._nest.me, self.next_sequence(), "restarting", restarts=record.status.restarts
            )
            self._nest.changed(self._nest.replica.set_status(name, dot, cleared))
            return True
        return False

    # What becomes of it

    def begins(self, event: wire.LifeBegins) -> None:
        """A light bird's time to start begins now: before, others may have had its process's threads."""
        life = self._nest.holds.life(event.dot, event.born)
        if life is not None and life.phase is Phase.STARTING and life.spec.options.light and life.spec.options.start_timeout is not None:
            self._schedule(life, self._nest.now + life.spec.options.start_timeout)

    def running(self, event: wire.LifeRunning) -> None:
        life = self._nest.holds.life(event.dot, event.born)
        if life is None or life.phase is not Phase.STARTING:
            return
        life.phase, life.host, life.address, life.running_since = Phase.RUNNING, event.host, event.address, self._nest.now
        if life.source is not None:
            life.source = None
            self._nest.effect(do.Forget(life.dot))
        self.write(life, "running")
        self._nest.notice(notices.BirdRunning(self._nest.me, life.name, life.dot, life.incarnation))

    def crashed(self, event: wire.LifeCrashed) -> None:
        life = self._nest.holds.life(event.dot, event.born)
        if life is None or life.phase is Phase.BACKOFF:
            return
        if life.phase is Phase.ENDING:
            self._over(life, None, False)
            return
        options = life.spec.options
        self._nest.notice(notices.BirdCrashed(self._nest.me, life.name, life.dot, life.incarnation, event.error))
        life.error = event.error
        if options.restart == "temporary":
            self._left(life)
            return
        if self._was_healthy(life):
            life.crashes = 0
        life.crashes += 1
        life.restarts += 1
        if life.crashes > options.max_restarts:
            self._fail(life)
            return
        self._back_off(life, self._after_pause(life.crashes))

    def lost(self, event: ev.LifeLost) -> None:
        """Its process died with others' code running: nothing is counted against it."""
        life = self._nest.holds.life(event.dot, event.born)
        if life is None or life.phase is Phase.BACKOFF:
            return
        if life.phase is Phase.ENDING:
            self._over(life, None, False)
        elif life.spec.options.restart == "temporary":
            self._left(life)
        else:
            life.error = event.error
            life.restarts += 1
            self._back_off(life, self._nest.now + event.pause)

    def evacuate(self, event: ev.Evacuate) -> None:
        """Moves lives into another process of this node, with what they hand over."""
        for dot, born in event.lives:
            life = self._nest.holds.life(dot, born)
            if life is not None and life.phase in (Phase.STARTING, Phase.RUNNING):
                life.restart_after = True
                self.end(life, "moved", keep=True)

    def _was_healthy(self, life: BirdLife) -> bool:
        return life.phase is Phase.RUNNING and self._nest.now - life.running_since >= life.spec.options.healthy_after

    def _after_pause(self, lives: int) -> float:
        """When the next life is due, after so many short ones in a row."""
        pause = min(self._nest.config.backoff_initial * 2.0 ** min(lives - 1, 64), self._nest.config.backoff_max)
        return self._nest.now + pause * (0.5 + self._nest.jitter() / 2)

    def _fail(self, life: BirdLife) -> None:
        life.phase = Phase.ENDING  # it is no hold any more: a failed bird runs nowhere
        self.write(life, "failed")
        self._nest.notice(notices.BirdFailed(self._nest.me, life.name, life.dot, life.incarnation, life.error))
        self._nest.holds.end(life)
        self._nest.mark([life.name])

    def _back_off(self, life: BirdLife, until: float) -> None:
        life.phase = Phase.BACKOFF
        self._schedule(life, until)
        self.write(life, "restarting")
        self._nest.mark([life.name])

    def _schedule(self, life: BirdLife, at: float) -> None:
        life.due = at
        heapq.heappush(self._timers, (at, life.dot, life.born))

    def exited(self, event: wire.LifeExited) -> None:
        life = self._nest.holds.life(event.dot, event.born)
        self._nest.effect(do.Forget(event.dot))
        if life is None:
            return
        if life.spec.options.restart == "permanent" and life.phase is not Phase.ENDING:
            life.restarts += 1
            life.exits = 1 if self._was_healthy(life) else life.exits + 1
            self._back_off(life, self._after_pause(life.exits))  # it has not crashed, but one that leaves at once must not spin either
        else:
            self._left(life)

    def _left(self, life: BirdLife) -> None:
        """It ended for good, of itself: just the dot that ran is removed (V1)."""
        self._nest.holds.end(life)
        self._nest.remove(life.name, [life.dot])
        self._nest.handover.answer_askers(life)
        self._nest.notice(notices.BirdStopped(self._nest.me, life.name, life.dot, life.incarnation))

    def ended(self, event: wire.LifeEnded) -> None:
        life = self._nest.holds.life(event.dot, event.born)
        if life is None or life.phase is Phase.BACKOFF:
            return
        if life.phase is not Phase.ENDING:
            life.keep = True  # an earlier life of this nest had begun to end it
        self._over(life, event.state, event.handed_over)

    def end(self, life: BirdLife, reason: str, keep: bool) -> None:
        """Begins to end a life in good order."""
        had_process = life.phase in (Phase.STARTING, Phase.RUNNING)
        life.phase, life.keep, life.reason = Phase.ENDING, keep, reason
        if reason == "moved":
            self.write(life, "moving")
        if had_process:
            self._nest.effect(do.EndLife(life.dot, life.born, reason, keep, life.spec.options.stop_timeout))
        else:
            self._over(life, None, False)

    def _over(self, life: BirdLife, state: bytes | None, handed_over: bool) -> None:
        self._nest.holds.end(life)
        if life.restart_after and self._nest.replica.record(life.name, life.dot) is not None:
            life.restart_after = False
            if handed_over:
                life.source = msg.Released(life.dot, life.incarnation, self._nest.me, state)
            self._nest.holds.begin(life)
            self._back_off(life, self._nest.now)
        elif life.keep and (handed_over or life.source is not None):
            if not handed_over and life.source is not None:
                state = life.source.state  # it never ran: what it was to take over is handed on
            self._nest.holds.keep(life.name, msg.Released(life.dot, life.incarnation, self._nest.me, state))
        elif life.reason != "moved":
            self.write(life, "pending")  # if its entry is still there, another start of the name counts now, and maybe not for long
        if life.phase is not Phase.BACKOFF and not (life.reason == "moved" and life.keep):  # else who hatches it next tells that
            self._nest.notice(notices.BirdStopped(self._nest.me, life.name, life.dot, life.incarnation))
        self._nest.handover.answer_askers(life)
        self._nest.mark([life.name])

    # Time and status

    def run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self._nest.now:
            at, dot, born = heapq.heappop(self._timers)
            life = self._nest.holds.life(dot, born)
            if life is None or at < life.due:
                continue
            if life.phase is Phase.BACKOFF:
                self._hatch_again(life)
            elif life.phase is Phase.STARTING and life.spec.options.start_timeout is not None:
                text = f"its __init__ did not return within start_timeout={life.spec.options.start_timeout:g} s"
                self._nest.effect(do.Kill(dot, born, text))

    def _hatch_again(self, life: BirdLife) -> None:
        """The next life in place, after a crash (V1): the hold never ended, so there is nobody to ask."""
        record = self._nest.replica.record(life.name, life.dot)
        if record is None or life.spec.code not in self._nest.replica.code:
            self.end(life, "stopped", keep=False)
            return
        life.incarnation = max(life.incarnation, record.status.incarnation if record.status else 0) + 1
        self._tell_next_life(life, self._nest.me.node)
        self.begin(life)

    def wake_at(self) -> float:
        return self._timers[0][0] if self._timers else float("inf")

    def write(self, life: BirdLife, state: str) -> None:
        counted = (life.restarts, life.crashes, life.error)
        status = Status(life.incarnation, self._nest.me, self.next_sequence(), state, life.host, *counted, address=life.address)
        self._nest.changed(self._nest.replica.set_status(life.name, life.dot, status))

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
