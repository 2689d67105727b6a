"""Anti-entropy: two replicas are compared by digest tree, and what differs is fetched, O(d) for d differences (S3).

The asker drives, one step a message, so a lost message is asked again and nothing is kept at the answering side:

  asker                                        answerer
  SyncAsk(hashes of some nodes of the tree) ->
                                            <- SyncAnswer(hashes of the children of those that differ, content of leaves that differ)
  ... until nothing is left to ask.            If nothing differed at all: the whole context, which may be merged only then.

After it the asker has all that the answerer had when it was asked, and sends back what the answerer lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flock_ray.core.aworset import DEPTH, ROOT, Hashes, Prefix
from flock_ray.core.messages import Outlook, SyncAnswer, SyncAsk
from flock_ray.core.replica import RecordChange, Replica, Update, bounded
from flock_ray.specs import Life

NODES_A_STEP = 128  # of the tree in one message: 4 KB of hashes, or some thousand names


@dataclass(slots=True)
class Session:
    """A comparison under way with one peer."""

    number: int
    exchange: int  # of the membership: tells whether this comparison admits (M3)
    todo: list[Prefix]
    asked: tuple[Prefix, ...] = ()
    ask_again_at: float = 0.0
    attempts: int = 0


@dataclass(slots=True)
class Progress:
    """What an answer brought: changes here, news for the peer, and whether the comparison is complete."""

    changes: list[RecordChange]
    news: list[Update]
    complete: bool


class Sync:
    """All comparisons of one nest."""

    def __init__(self, replica: Replica, retry_interval: float) -> None:
        self.sessions: dict[Life, Session] = {}
        self._replica = replica
        self._retry = retry_interval
        self._number = 0

    def begin(self, peer: Life, exchange: int) -> None:
        self._number += 1
        self.sessions[peer] = Session(self._number, exchange, [ROOT])

    def ask(self, peer: Life, now: float, fading: Iterable[Life], outlook: Outlook) -> SyncAsk:
        """The next step with a peer, or the same again."""
        session = self.sessions[peer]
        session.asked = tuple(session.todo[:NODES_A_STEP])
        session.ask_again_at = now + self._retry
        session.attempts += 1
        hashes = Hashes((prefix, self._replica.birds.digest(prefix)) for prefix in session.asked)
        context = self._replica.shareable_context(fading).fingerprint() if ROOT in session.asked else 0
        return SyncAsk(session.number, hashes, context, outlook)

    def answer(self, ask: SyncAsk, fading: Iterable[Life], outlook: Outlook) -> SyncAnswer:
        birds = self._replica.birds
        hashes, differing = birds.descend(ask.hashes)
        leaves = next(bounded(differing, self._replica.size_of_leaf), [])
        hashes.update((leaf, birds.digest(leaf)) for leaf in (Prefix(DEPTH, number) for number in differing[len(leaves) :]))
        content = self._replica.content(leaves=leaves) if leaves else None
        context = None
        if not hashes and not leaves and ROOT in ask.hashes:
            shared = self._replica.shareable_context(fading)
            context = shared if shared.fingerprint() != ask.context else None
        return SyncAnswer(ask.session, hashes, content, context, outlook)

    def proceed(self, peer: Life, answer: SyncAnswer) -> Progress | None:
        """Takes an answer in; `None` if nobody waits for it (a duplicate, or of an older comparison)."""
        session = self.sessions.get(peer)
        if session is None or session.number != answer.session or not session.asked:
            return None
        changes: list[RecordChange] = []
        news: list[Update] = []
        if answer.content is not None:
            news = self._replica.updates_against(answer.content.part)
            changes = self._replica.join_content(answer.content)
        if answer.context is not None:
            self._replica.merge_context(answer.context)
        rest = session.todo[len(session.asked) :]
        session.todo = self._replica.birds.differing(answer.hashes) + rest
        session.asked, session.attempts, session.ask_again_at = (), 0, 0.0
        if not session.todo:
            del self.sessions[peer]
        return Progress(changes, news, not session.todo)

    def wake_at(self) -> float:
        return min((session.ask_again_at for session in self.sessions.values()), default=float("inf"))
