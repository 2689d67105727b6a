"""What a nest does with a message of another: one handler for each kind in `core/messages.py`.

Rules kept here: an answer is taken only while it is fresh (M4); nothing is compared with a nest that may have forgotten dots (S2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flock_ray.core import effects as do
from flock_ray.core import messages as msg
from flock_ray.specs import Life

if TYPE_CHECKING:
    from flock_ray.core.registry import Registry


class Inbox:
    """The messages of one nest."""

    def __init__(self, registry: Registry) -> None:
        self._nest = registry

    def take(self, envelope: msg.Envelope) -> None:
        nest = self._nest
        if isinstance(envelope.body, msg.Relay):
            nest.effect(do.Send(envelope.body.to, envelope.body.envelope))
            return
        peer = nest.membership.peer(envelope.sender)
        if envelope.number >= peer.heard:
            if envelope.number > peer.heard:
                nest.asks.pop(envelope.sender, None)  # it has another view now: who needs its word asks at once
            peer.heard = envelope.number
            if not envelope.accepts:
                nest.barrier.void(envelope.sender)
        getattr(self, f"_on_{type(envelope.body).__name__}")(envelope, envelope.body)

    # The set

    def _on_News(self, envelope: msg.Envelope, news: msg.News) -> None:
        nest = self._nest
        if nest.membership.peer(envelope.sender).estranged:
            return
        nest.joined(nest.replica.join(news.update))
        if news.acks:
            nest.reply(envelope, msg.Acknowledge(news.acks))

    def _on_Acknowledge(self, envelope: msg.Envelope, body: msg.Acknowledge) -> None:
        del envelope
        for ack in body.acks:
            self._nest.desk.acknowledged(ack)

    def _on_SyncAsk(self, envelope: msg.Envelope, ask: msg.SyncAsk) -> None:
        nest = self._nest
        if self._compares(envelope, ask.outlook):
            nest.reply(envelope, nest.sync.answer(ask, nest.fading(), nest.outlook()))

    def _on_SyncAnswer(self, envelope: msg.Envelope, answer: msg.SyncAnswer) -> None:
        nest, peer = self._nest, envelope.sender
        if not self._compares(envelope, answer.outlook):
            return
        session = nest.sync.sessions.get(peer)
        progress = nest.sync.proceed(peer, answer)
        if session is None or progress is None:
            return
        nest.joined(progress.changes)
        for update in progress.news:
            nest.send(peer, msg.News(update))
        if progress.complete:
            nest.membership.synced(peer, session.exchange)

    def _on_Estranged(self, envelope: msg.Envelope, body: msg.Estranged) -> None:
        self._nest.membership.heard_outlook(envelope.sender, body.outlook, self._nest.now)
        self._nest.membership.estrange(envelope.sender, self._nest.now)
        self._start_afresh_if_smaller(envelope.sender)

    def _compares(self, envelope: msg.Envelope, outlook: msg.Outlook) -> bool:
        """Notes what a peer says of all nests. Not compared is with one that was away so long that either may have forgotten dots."""
        nest, peer = self._nest, envelope.sender
        nest.membership.heard_outlook(peer, outlook, nest.now)
        if nest.membership.peer(peer).estranged:
            nest.reply(envelope, msg.Estranged(nest.outlook()))
            self._start_afresh_if_smaller(peer)
            return False
        nest.replica.learn(outlook.nodes, outlook.had_cpus)
        return True

    def _start_afresh_if_smaller(self, peer: Life) -> None:
        """Of two sides that are estranged the smaller throws its replica away and joins as new, under other lives (S2)."""
        if self._nest.membership.starts_afresh(peer):
            self._nest.effect(do.StartAfresh())

    def _on_LookUp(self, envelope: msg.Envelope, body: msg.LookUp) -> None:
        self._nest.reply(envelope, msg.LookUpAnswer(body.name, self._nest.replica.content([body.name])))

    def _on_LookUpAnswer(self, envelope: msg.Envelope, answer: msg.LookUpAnswer) -> None:
        nest = self._nest
        if not nest.membership.peer(envelope.sender).estranged:
            nest.joined(nest.replica.join_content(answer.content))
        nest.desk.looked_up(answer.name, envelope.sender)

    def _on_CodeAsk(self, envelope: msg.Envelope, body: msg.CodeAsk) -> None:
        known = self._nest.replica.code
        code = {digest: known[digest] for digest in body.digests if digest in known}
        if code:
            self._nest.reply(envelope, msg.CodeAnswer(code))

    def _on_CodeAnswer(self, envelope: msg.Envelope, body: msg.CodeAnswer) -> None:
        del envelope
        self._nest.replica.take_code(body.code)
        self._nest.mark(self._nest.waiting)

    # The barrier (H1)

    def _on_BarrierAsk(self, envelope: msg.Envelope, ask: msg.BarrierAsk) -> None:
        nest, asker = self._nest, envelope.sender
        if not nest.membership.ready:
            return
        if asker not in nest.membership.view:  # the envelope says so, and by it that no answer is good
            nest.reply(envelope, msg.BarrierAnswer(ask.number, (), frozenset(), frozenset(), ()))
            return
        nest.placement_changed()
        placement = nest.membership.placement
        table, ring = placement.table(), placement.ring
        placed = frozenset(name for name, node in table.items() if node == asker.node)
        elsewhere = frozenset(name for name in table if name not in placed and ring.owner(name) == asker.node)
        names = [name for name in nest.holds.within(ring.arcs(asker.node)) if name not in table]
        names += [name for name in placed if name in nest.holds]
        held = tuple(hold for name in names for hold in nest.holds.of(name))
        nest.reply(envelope, msg.BarrierAnswer(ask.number, tuple(ring.weights.items()), placed, elsewhere, held))

    def _on_BarrierAnswer(self, envelope: msg.Envelope, answer: msg.BarrierAnswer) -> None:
        nest, peer = self._nest, envelope.sender
        fresh = envelope.number == nest.membership.peer(peer).heard
        if fresh and envelope.accepts and answer.number == nest.membership.number and peer in nest.membership.view:
            nest.mark(nest.barrier.take(peer, answer))
            nest.mark_cleared()
            nest.answered(peer)

    # Lives

    def _on_Release(self, envelope: msg.Envelope, release: msg.Release) -> None:
        self._nest.handover.release(envelope, release)

    def _on_ReleaseAnswer(self, envelope: msg.Envelope, answer: msg.ReleaseAnswer) -> None:
        self._nest.handover.answered(envelope, answer)

    def _on_RestartAsk(self, envelope: msg.Envelope, body: msg.RestartAsk) -> None:
        del envelope
        nest = self._nest
        winner = nest.replica.winner(body.name)
        seen = winner[1].status.incarnation if winner is not None and winner[1].status is not None else 0
        if winner is not None and winner[0] == body.dot and seen <= body.incarnation:  # else a repeated ask: it has a new life already
            nest.supervision.restart(body.name)
            nest.mark([body.name])
