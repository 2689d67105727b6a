"""Decisions of one nest that need no simulated cluster."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import journal, letters, readings
from flock_ray.core import messages as msg
from flock_ray.core.aworset import Hashes
from flock_ray.core.holds import BirdLife, Phase
from flock_ray.core.registry import BURST, GATHER, LITTLE, NAMES_A_STEP, Registry
from flock_ray.core.replica import RECORDS, Replica
from flock_ray.core.sync import Sync
from flock_ray.core.wire import LifeBegins, LifeCrashed, LifeEnded, LifeExited, LifeRunning
from flock_ray.notices import BirdCrashed, BirdMoved, BirdRestarted, BirdRunning, BirdStarted, BirdStopped, CastLost, NameConflict, Notice
from flock_ray.specs import Dot, Life, NodeRecord, Options, Spec, Stamp

ME, PEER = Life("a", 1), Life("b", 1)


def lone_nest(cpus: float) -> Registry:
    nest = Registry(ME, Config(), lambda: 0.5)
    nest.handle(ev.Booted(NodeRecord(ME, cpus)), 0.0)
    nest.handle(ev.NodesListed(frozenset(["a"])), 0.1)
    assert nest.membership.ready
    return nest


def test_that_a_node_once_had_cpus_is_heard_of_peers_and_makes_another_view():
    """P1: a head without CPUs has birds only where no node ever had any, and all nests have to agree on that."""
    nest = lone_nest(cpus=0.0)
    assert nest.owns("bird")
    number = nest.membership.number
    outlook = msg.Outlook(frozenset([PEER]), (), (), had_cpus=True)
    ask = msg.SyncAsk(1, Hashes(), 0, outlook)
    effects = nest.handle(ev.Received(msg.Envelope(PEER, 1, accepts=False, body=ask)), 0.2)
    assert not nest.owns("bird")
    assert nest.membership.number > number, "answers to the old ring's questions are void"
    (answer,) = [effect.envelope.body for effect in effects if isinstance(effect, do.Send)]
    assert answer.outlook.had_cpus, "and it is told on"


def demands(effects: list[do.Effect]) -> list[tuple]:
    return [effect.bundles for effect in effects if isinstance(effect, do.Demand)]


def test_the_autoscaler_is_asked_for_room_for_all_birds_while_one_has_none():
    """Found with Ray's fake provider: asked for the pending bird alone it said that the cluster has such a node, where another bird was."""
    nest = Registry(ME, Config(), lambda: 0.5)
    nest.handle(ev.Booted(NodeRecord(ME, 2.0, (("perch", 1.0),))), 0.0)
    nest.handle(ev.NodesListed(frozenset(["a"])), 0.1)
    perching = Options(resources=(("perch", 1.0),))
    assert demands(nest.handle(start(1, perching), 0.2)) == []
    assert not nest.lacks_nodes
    both = ((("perch", 1.0),), (("perch", 1.0),))
    assert demands(nest.handle(start(2, perching), 0.3)) == [both]
    assert nest.lacks_nodes
    assert demands(nest.handle(ev.Stop("s", "bird-2"), 0.4)) == [()]
    assert not nest.lacks_nodes


def test_birds_without_demands_ask_for_a_node_with_cpus_where_only_a_head_without_is_left():
    nest = lone_nest(cpus=0.0)
    ask = msg.SyncAsk(1, Hashes(), 0, msg.Outlook(frozenset([PEER]), (), (), had_cpus=True))
    effects = nest.handle(ev.Received(msg.Envelope(PEER, 1, accepts=False, body=ask)), 0.2)
    assert demands(effects) == []
    assert demands(nest.handle(start(1), 0.3)) == [((("CPU", 1.0),),)]
    assert nest.lacks_nodes


def test_a_nest_that_waits_for_others_before_it_is_ready_does_not_wake_all_the_time():
    """Found with a profile of the simulator: seven of ten events were ticks, of nests whose time to be ready alone had long passed."""
    config = Config()
    nest = Registry(ME, config, lambda: 0.5)
    nest.handle(ev.Booted(NodeRecord(ME, 1.0)), 0.0)
    assert nest.wake_at() <= config.bootstrap_wait
    nest.handle(ev.MemberAlive(PEER), 0.1)
    late = 10 * config.bootstrap_wait
    nest.handle(ev.Tick(), late)
    assert not nest.membership.ready, "the other one has not answered"
    assert nest.wake_at() > late


def written_views(effects: list[do.Effect]) -> list[frozenset[Life]]:
    return [entry for effect in effects if isinstance(effect, do.Write) for entry in effect.entries if isinstance(entry, frozenset)]


def test_a_nest_that_does_not_act_yet_leaves_the_view_that_was_written():
    """Found by the simulator (mix blackout, seed 60): all nests die, and one dies again while it waits for the others. It had written
    that it is alone, so its next life was ready alone, and hatched what the others' hosts ran."""
    before = frozenset([Life("a", 0), PEER])
    nest = Registry(ME, Config(), lambda: 0.5)
    assert written_views(nest.handle(ev.Booted(NodeRecord(ME, 1.0), journal=(journal.pack([before]),)), 0.0)) == []
    assert not nest.membership.ready
    again = Replica()
    reader = journal.Reader(again)
    for piece in nest.copy():
        reader.read(piece)
    assert reader.view == before, "nor is it in a copy"
    effects = nest.handle(ev.NodeProbed(PEER, "refused"), 0.1)
    assert nest.membership.ready
    assert written_views(effects) == [frozenset([ME])]


def test_a_nest_is_booting_until_all_that_was_written_is_read():
    """A journal that is long is written anew by the next life. Done while that one reads, it deleted what was not read yet."""
    pieces = tuple(journal.pack([frozenset([ME])]) for _ in range(3))
    nest = Registry(ME, Config(), lambda: 0.5)
    nest.handle(ev.Booted(NodeRecord(ME, 1.0), journal=pieces), 0.0)
    assert nest.booting
    for _ in pieces:
        nest.handle(ev.Tick(), 0.0)
    assert not nest.booting


def test_casts_to_a_name_that_nobody_knows_are_told_once():
    nest = lone_nest(cpus=1.0)
    for casts in (0, 3):
        effects = nest.handle(ev.Locate(f"request {casts}", "nobody", "running", 1.0, casts=casts), 0.2)
        assert told(effects) == ([CastLost(ME, "nobody", 3)] if casts else [])
        assert [effect.outcome.error for effect in effects if isinstance(effect, do.Reply)] == ["BirdNotFound"]


def told(effects: list[do.Effect]) -> list[Notice]:
    return [effect.notice for effect in effects if isinstance(effect, do.Emit)]


def test_each_next_life_in_place_is_told_as_a_restart_and_the_end_as_a_stop():
    """`restart` ends a life too, but that is not told as a stop."""
    nest = lone_nest(2.0)
    kinds = [type(notice) for notice in told(nest.handle(start(1), 1.0))]
    for request, kind in (("a", "run"), ("b", "crash")):
        kinds += [type(notice) for notice in told(nest.handle(event_of(nest, kind, 1, request), 1.0))]
    kinds += [type(notice) for notice in told(nest.handle(ev.Tick(), 2.0))]
    kinds += [type(notice) for notice in told(nest.handle(event_of(nest, "run", 1, "c"), 2.0))]
    assert kinds == [BirdStarted, BirdRunning, BirdCrashed, BirdRestarted, BirdRunning]
    (end,) = [effect for effect in nest.handle(ev.Restart("d", "bird-1"), 3.0) if isinstance(effect, do.EndLife)]
    effects = nest.handle(LifeEnded(end.dot, end.born), 3.0) + nest.handle(ev.Tick(), 3.0)
    assert [(type(notice), notice.incarnation) for notice in told(effects)] == [(BirdRestarted, 3)]
    nest.handle(event_of(nest, "run", 1, "e"), 3.0)
    (end,) = [effect for effect in nest.handle(ev.Stop("f", "bird-1"), 4.0) if isinstance(effect, do.EndLife)]
    assert [type(notice) for notice in told(nest.handle(LifeEnded(end.dot, end.born), 4.0))] == [BirdStopped]


# Many names


def spec(number: int, options: Options | None = None) -> Spec:
    return Spec("birds", "Bird", "code", b"args", options or Options(), None, Stamp(0, 0), f"request-{number}")


def start(number: int, options: Options | None = None) -> ev.Start:
    return ev.Start(f"r{number}", f"bird-{number}", spec(number, options), b"class", 1_000 + number)


class Pair:
    """Nests that hear each other, on a clock of their own; what they send comes at once, packed."""

    def __init__(self, *lives: Life, config: Config | None = None) -> None:
        self.now, self.sent = 1.0, []
        self.nests = {life: Registry(life, config or Config(), lambda: 0.5) for life in lives}
        for life in lives:
            self.take(life, ev.Booted(NodeRecord(life, 2.0)))
            self.take(life, *[ev.MemberAlive(other) for other in lives if other != life])
        self.pass_time(6.0)
        assert all(nest.membership.ready and len(nest.membership.view) == len(lives) for nest in self.nests.values())
        self.sent.clear()

    def take(self, life: Life, *events: ev.Event) -> list[do.Effect]:
        effects = self.nests[life].handle_all(events, self.now)
        for effect in effects:
            if isinstance(effect, do.Send) and effect.to in self.nests:
                self.sent.append(effect.envelope.body)
                for packed in letters.pack([(effect.to, effect.envelope)], letters.Bodies()):
                    for envelope, _ in letters.unpack(packed, effect.to):
                        self.take(effect.to, ev.Received(envelope))
        return effects

    def pass_time(self, seconds: float) -> list[do.Effect]:
        effects, end = [], self.now + seconds
        while self.now < end:
            self.now += 0.01
            for life, nest in list(self.nests.items()):
                while nest.wake_at() <= self.now:
                    effects += self.take(life, ev.Tick())
        return effects

    def news(self) -> list[msg.News]:
        """What was told since the last time."""
        news = [body for body in self.sent if isinstance(body, msg.News)]
        self.sent.clear()
        return news


class Told(Pair):
    """Keeps all that its nests have wanted done, and so what they have told."""

    def __init__(self, *lives: Life) -> None:
        self.effects: list[do.Effect] = []
        super().__init__(*lives)

    def take(self, life: Life, *events: ev.Event) -> list[do.Effect]:
        effects = super().take(life, *events)
        self.effects += effects
        return effects

    def of(self, kind: type[Notice]) -> list[Any]:
        return [notice for notice in told(self.effects) if isinstance(notice, kind)]


def running(effects: list[do.Effect]) -> list[ev.Event]:
    return [LifeRunning(effect.dot, effect.born, "host") for effect in effects if isinstance(effect, do.Hatch)]


def event_of(nest: Registry, kind: str, number: int, request: str) -> ev.Event:
    name = f"bird-{number}"
    if kind == "start":
        return ev.Start(request, name, spec(number)._replace(request_id=request), b"class", 1)
    if kind == "stop":
        return ev.Stop(request, name)
    lives = nest.holds.lives_of(name)
    if kind == "locate" or not lives:
        return ev.Locate(request, name, "running", 30.0)
    dot, born = lives[0].dot, lives[0].born
    return {"run": LifeRunning(dot, born, "host"), "crash": LifeCrashed(dot, born, "boom"), "exit": LifeExited(dot, born)}[kind]


def quiet(nest: Registry, effects: list[do.Effect]) -> set[tuple[object, ...]]:
    """Lets lives that are to end do so, and nothing else; returns what came of it."""
    while True:
        ended = [LifeEnded(each.dot, each.born) for each in effects if isinstance(each, do.EndLife)]
        if not ended and nest.wake_at() > 1.0:
            states = {
                name: [(dot, record.status and record.status.state) for dot, record in pairs] for name, pairs in nest.replica.birds.items()
            }
            return {(name, *pair) for name, pairs in states.items() for pair in pairs} | {
                (life.name, life.dot, life.phase, life.crashes) for life in nest.holds.lives.values()
            }
        effects = nest.handle_all([*ended, ev.Tick()], 1.0)


@given(st.lists(st.tuples(st.sampled_from(["start", "stop", "locate", "run", "crash", "exit"]), st.integers(0, 3)), max_size=25), st.data())
@settings(deadline=None)
def test_many_events_at_once_come_to_the_same_as_one_by_one(steps, data):
    at_once, by_one = lone_nest(2.0), lone_nest(2.0)
    while steps:
        size = data.draw(st.integers(1, len(steps)))
        some = [(kind, number, f"{kind}-{len(steps)}-{index}") for index, (kind, number) in enumerate(steps[:size])]
        together = at_once.handle_all([event_of(at_once, *each) for each in some], 1.0)
        alone = [effect for event in [event_of(by_one, *each) for each in some] for effect in by_one.handle(event, 1.0)]
        assert quiet(at_once, together) == quiet(by_one, alone)
        steps = steps[size:]


def test_a_single_start_is_told_at_once_with_its_status():
    """S6: "starting" is handed over with the `Hatch` it speaks of."""
    pair = Pair(ME, PEER)
    name = next(n for n in range(99) if pair.nests[ME].owns(f"bird-{n}"))
    effects = pair.take(ME, start(name))
    kinds = [type(effect) for effect in effects]
    assert do.Hatch in kinds and do.Send in kinds
    (news,) = pair.news()
    ((_, record),) = news.update.delta.entries[f"bird-{name}"]
    assert record.status is not None and record.status.state == "starting"


def test_news_of_a_burst_is_what_it_has_become_in_messages_of_bounded_size():
    pair = Pair(ME, PEER)
    names = [n for n in range(9_000) if pair.nests[ME].owns(f"bird-{n}")]
    few = LITTLE // 2  # each is added and starts
    pair.take(ME, *[start(n) for n in names[:few]])
    first = pair.news()
    assert len(first) == 1, "nothing was told lately: at once"
    effects = pair.take(ME, *[start(n) for n in names[few:2500]])
    hatches = [effect for effect in effects if isinstance(effect, do.Hatch)]
    while pair.nests[ME].wake_at() <= pair.now:
        hatches += [effect for effect in pair.take(ME, ev.Tick()) if isinstance(effect, do.Hatch)]
    assert len(hatches) == 2500 - few, "what is to be done waits for nobody"
    pair.take(ME, *running(hatches))
    assert pair.news() == [], "a burst is gathered"
    pair.now += BURST
    assert pair.nests[ME].wake_at() <= pair.now
    pair.take(ME, ev.Tick())
    news = pair.news()
    sizes = [len(each.update.delta.entries) for each in news]
    assert sum(sizes) == 2500 - few and max(sizes) <= RECORDS
    states = {record.status.state for each in news for pairs in each.update.delta.entries.values() for _, record in pairs}
    assert states == {"running"}
    assert len(pair.nests[PEER].replica) == 2500


@pytest.mark.parametrize("why", ["it is another's", "it is stopped", "it has lived before"])
def test_what_another_nest_has_to_act_on_is_kept_back_for_less_long(why):
    pair = Pair(ME, PEER)
    mine = [n for n in range(2_000) if pair.nests[ME].owns(f"bird-{n}")]
    theirs = next(n for n in range(2_000) if not pair.nests[ME].owns(f"bird-{n}"))
    if why != "it is another's":
        pair.take(ME, *running(pair.take(ME, start(mine[-1]))))
        pair.pass_time(1.0)
    pair.take(ME, *[start(n) for n in mine[:LITTLE]])
    pair.news()
    if why == "it is another's":
        pair.take(ME, start(theirs))
    elif why == "it is stopped":
        pair.take(ME, ev.Stop("stop", f"bird-{mine[-1]}"))
    else:
        registry = pair.nests[ME]
        life = registry.holds.lives_of(f"bird-{mine[-1]}")[0]
        registry.holds.end(life)  # as if another nest had held it
        registry.mark([life.name])
        pair.take(ME, ev.Tick())
    assert pair.nests[ME].wake_at() <= pair.now + GATHER
    pair.now += GATHER
    pair.take(ME, ev.Tick())
    assert pair.news()


def test_a_start_that_is_to_be_acknowledged_is_told_at_once_in_a_burst_too():
    pair = Pair(ME, PEER)
    pair.take(ME, *[start(n) for n in range(LITTLE)])
    pair.take(ME, *[start(100 + n) for n in range(LITTLE)])
    pair.news()
    wanted = [start(1_000 + n, Options(ack="peer")) for n in range(3)]
    effects = pair.take(ME, *wanted)
    (news,) = [each for each in pair.news() if each.acks]
    assert set(news.acks) == {event.request for event in wanted}
    assert not [effect for effect in effects if isinstance(effect, do.Reply)], "they are answered when the peer has answered"
    assert not pair.nests[ME].desk._unacknowledged


def test_a_peer_does_not_look_at_birds_that_do_not_concern_it(monkeypatch):
    pair = Pair(ME, PEER)
    looked: list[tuple[Life, object]] = []
    whole = Registry._evaluate
    monkeypatch.setattr(Registry, "_evaluate", lambda self, name: looked.append((self.me, name)) or whole(self, name))
    names = [n for n in range(200) if pair.nests[ME].owns(f"bird-{n}")]
    effects = pair.take(ME, *[start(n) for n in names])
    pair.take(ME, *running(effects))
    pair.pass_time(BURST + 0.1)
    assert len(pair.nests[PEER].replica) == len(names)
    assert not [name for life, name in looked if life == PEER]
    assert len(looked) == len(names), "the owner looks at a start once, and at what its life says not at all"


def test_a_view_change_looks_at_the_names_that_were_gained_and_at_no_others(monkeypatch):
    third = Life("c", 1)
    trio = Pair(ME, PEER, third)
    for life, nest in list(trio.nests.items()):
        effects = trio.take(life, *[start(n) for n in range(600) if nest.owns(f"bird-{n}")])
        trio.take(life, *running(effects))
    trio.pass_time(1.0)
    lost = set(trio.nests[third].holds.names())
    assert len(lost) > 100 and all(len(nest.replica) == 600 for nest in trio.nests.values())
    del trio.nests[third]
    looked: list[tuple[Life, object]] = []
    whole = Registry._evaluate
    monkeypatch.setattr(Registry, "_evaluate", lambda self, name: looked.append((self.me, name)) or whole(self, name))
    for life in list(trio.nests):
        trio.take(life, ev.MemberDead(third), ev.NodeProbed(third, "refused"))
    effects = trio.pass_time(2.0)
    assert {effect.name for effect in effects if isinstance(effect, do.Hatch)} | {
        life.name for nest in trio.nests.values() for life in nest.holds.lives.values()
    } >= lost
    assert {name for _, name in looked} == lost
    assert len(looked) == len(lost), "once each"


def test_an_answer_by_another_ring_is_not_asked_for_again_at_wire_speed():
    """Found by measuring: in the time between two nests' adoptions they asked and answered each other without pause."""
    trio = Pair(ME, PEER, Life("c", 1))
    del trio.nests[Life("c", 1)]
    trio.take(ME, ev.MemberDead(Life("c", 1)), ev.NodeProbed(Life("c", 1), "refused"))  # the peer has not heard of it
    trio.sent.clear()
    trio.pass_time(2.0)
    assert sum(isinstance(body, msg.BarrierAsk) for body in trio.sent) <= 2.0 / Config().retry_interval + 3


def test_a_new_nest_is_told_of_many_names_in_messages_of_bounded_size():
    full, empty = lone_nest(2.0), Replica()
    for first in range(0, 3_000, 500):
        full.handle_all([start(n) for n in range(first, first + 500)], 1.0 + first)
    outlook = msg.Outlook(frozenset([ME]), (), (), True)
    asker, answerer = Sync(empty, 1.0), Sync(full.replica, 1.0)
    asker.begin(ME, 0)
    while ME in asker.sessions:
        answer = pickle.loads(pickle.dumps(answerer.answer(asker.ask(ME, 0.0, (), outlook), (), outlook)))
        assert answer.content is None or len(answer.content.part.entries) <= RECORDS
        progress = asker.proceed(ME, answer)
        assert progress is not None and progress.news == []
    assert dict(empty.birds.items()) == dict(full.replica.birds.items())
    assert empty.birds.context == full.replica.birds.context


def test_many_lives_are_adopted_in_steps_and_none_is_lost_that_ends_meanwhile():
    nest, old = Registry(ME, Config(), lambda: 0.5), Life("a", 0)
    count = 2 * NAMES_A_STEP + 1
    adopted = tuple(ev.Adopted(f"bird-{n}", Dot(old, n + 1), spec(n), b"class", 1, 1, "host", 0, 0, True) for n in range(count))
    nest.handle_all([ev.Booted(NodeRecord(ME, 2.0), adopted), ev.NodesListed(frozenset(["a"]))], 0.0)
    assert len(nest.holds.lives) < count and not nest.membership.ready
    nest.handle(LifeCrashed(Dot(old, count), 1, "boom"), 0.0)
    while nest.wake_at() <= 0.0:
        nest.handle(ev.Tick(), 0.0)
    assert nest.membership.ready and len(nest.holds.lives) == count
    assert nest.holds.lives[Dot(old, count)].phase is Phase.BACKOFF


@pytest.mark.parametrize(("found", "dies"), [("refused", True), ("silent", False), ("up", False)])
def test_a_broken_connection_has_the_node_probed_and_only_a_refusal_is_its_death(found, dies):
    third = Life("c", 1)
    trio = Pair(ME, PEER, third)
    trio.pass_time(1.0)
    nest = trio.nests[ME]
    effects = nest.handle(ev.ConnectionBroken("c"), trio.now)
    assert do.ProbeNode(third) in effects
    del trio.nests[third]
    trio.take(ME, ev.NodeProbed(third, found))
    trio.pass_time(2 * Config().nest_grace)  # also the time for which a nest that restarts is waited for
    assert (third not in nest.membership.view) == dies


def test_the_end_of_a_connection_to_a_nest_that_nobody_hears_says_nothing():
    pair = Pair(ME, PEER)
    assert not [effect for effect in pair.nests[ME].handle(ev.ConnectionBroken("c"), pair.now) if isinstance(effect, do.ProbeNode)]


def test_the_time_a_light_bird_has_to_start_begins_with_its_init():
    nest = Pair(ME)
    own = spec(1)._replace(options=Options(light=True, start_timeout=5.0), request_id="r")
    effects = nest.take(ME, ev.Start("r", "a", own, b"class", 1))
    hatch = next(effect for effect in effects if isinstance(effect, do.Hatch))
    assert not [effect for effect in nest.pass_time(20.0) if isinstance(effect, do.Kill)], "it waits for a thread"
    nest.take(ME, LifeBegins(hatch.dot, hatch.born))
    assert not [effect for effect in nest.pass_time(4.9) if isinstance(effect, do.Kill)]
    assert [effect.dot for effect in nest.pass_time(0.2) if isinstance(effect, do.Kill)] == [hatch.dot]


def test_the_time_another_bird_has_to_start_begins_with_its_process():
    nest = Pair(ME)
    own = spec(1)._replace(options=Options(start_timeout=5.0), request_id="r")
    effects = nest.take(ME, ev.Start("r", "a", own, b"class", 1))
    hatch = next(effect for effect in effects if isinstance(effect, do.Hatch))
    nest.pass_time(4.0)
    nest.take(ME, LifeBegins(hatch.dot, hatch.born))
    assert [effect.dot for effect in nest.pass_time(1.1) if isinstance(effect, do.Kill)] == [hatch.dot]


def flock_that_moves(light: bool) -> tuple[Pair, Life]:
    """Two nests hold birds, and a third has joined to which some of them are to move."""
    third = Life("c", 1)
    trio = Pair(ME, PEER)
    options = Options(light=light)
    for life, nest in trio.nests.items():
        own = [n for n in range(3_000) if nest.owns(f"bird-{n}")]
        events = [ev.Start(f"{n}", f"bird-{n}", spec(n)._replace(options=options, request_id=f"{n}"), b"class", 1) for n in own]
        trio.take(life, *running(trio.take(life, *events)))
    trio.pass_time(3.0)
    trio.nests[third] = Registry(third, Config(), lambda: 0.5)
    trio.take(third, ev.Booted(NodeRecord(third, 2.0)))
    for life in (ME, PEER):
        trio.take(life, ev.MemberAlive(third))
        trio.take(third, ev.MemberAlive(life))
    trio.pass_time(3.0)
    return trio, third


def ending(trio: Pair) -> dict[Life, list[BirdLife]]:
    return {life: [one for one in nest.holds.lives.values() if one.phase is Phase.ENDING] for life, nest in trio.nests.items()}


@pytest.mark.parametrize(("light", "most"), [(False, 16), (True, 256)])
def test_so_many_birds_move_at_a_time_and_each_that_is_done_makes_room_for_another(light, most):
    trio, third = flock_that_moves(light)
    for turn in range(1, 4):
        assert sum(map(len, ending(trio).values())) == most
        for life, lives in ending(trio).items():
            trio.take(life, *[LifeEnded(one.dot, one.born) for one in lives])
        trio.pass_time(0.2)
        there = trio.nests[third].holds.lives
        trio.take(third, *[LifeRunning(one.dot, one.born, "host") for one in there.values() if one.phase is Phase.STARTING])
        trio.pass_time(1.0)
        assert len(there) == turn * most


def test_a_release_that_is_not_answered_is_asked_for_again_and_again():
    trio, _ = flock_that_moves(False)
    trio.sent.clear()
    trio.pass_time(5.0)  # nothing ends
    asked = [body for body in trio.sent if isinstance(body, msg.Release)]
    assert len({body.dot for body in asked}) == 16
    assert len(asked) >= 16 * (5.0 / Config().retry_interval - 2)


def test_a_context_goes_with_an_answer_only_if_it_is_another():
    one, other = Pair(ME).nests[ME], Pair(PEER).nests[PEER]
    outlook = one.outlook()
    asker, answerer = Sync(one.replica, 1.0), Sync(other.replica, 1.0)
    asker.begin(PEER, 1)
    assert answerer.answer(asker.ask(PEER, 0.0, (), outlook), (), outlook).context is None
    other.replica.birds.context.add(Dot(PEER, 1))
    asker.begin(PEER, 1)
    assert answerer.answer(asker.ask(PEER, 0.0, (), outlook), (), outlook).context is not None


def test_readings_of_birds_that_failed_or_lived_on_a_node_that_is_gone():
    third = Life("c", 1)
    trio = Pair(ME, PEER, third)
    nest = trio.nests[ME]
    theirs = next(n for n in range(100) if trio.nests[third].owns(f"bird-{n}"))
    mine = next(n for n in range(100) if nest.owns(f"bird-{n}"))
    trio.take(third, *running(trio.take(third, start(theirs))))
    hatch = next(effect for effect in trio.take(ME, start(mine)) if isinstance(effect, do.Hatch))
    trio.take(ME, LifeRunning(hatch.dot, hatch.born, "host"))
    trio.pass_time(1.0)
    (found,) = [bird for birds in readings.birds(nest, None, ME.node, None, "birds.Bird") for bird in birds]
    assert (found.name, found.class_name, found.path) == (f"bird-{mine}", "birds.Bird", None)
    assert sum(readings.tally(nest), Counter()) == {(ME.node, "running"): 1, ("c", "running"): 1}
    assert readings.is_expected(nest, f"bird-{theirs}") and readings.is_expected(nest, f"bird-{mine}")
    assert not readings.is_expected(nest, "nobody")
    nest.holds.lives[hatch.dot].crashes = 1_000
    trio.take(ME, LifeCrashed(hatch.dot, hatch.born, "boom"))
    assert not readings.is_expected(nest, f"bird-{mine}")
    del trio.nests[third]
    trio.take(ME, ev.MemberDead(third), ev.NodeProbed(third, "refused"))  # the peer has not heard of it: nobody may hatch it yet
    trio.pass_time(1.0)
    counts = sum(readings.tally(nest), Counter())
    assert set(counts) == {(ME.node, "failed"), (PEER.node, "pending")}, "each where it is, or should be"
    assert "pending" in nest.desk.too_late(f"bird-{theirs}", "running").message


# One name with two specs


def test_each_move_is_told_once_by_whoever_hatches_the_next_life():
    """Also where the node is gone, so that nobody is left there to tell it."""
    pair, joins = Told(ME), PEER
    pair.take(ME, *running(pair.take(ME, *[start(n) for n in range(20)])))
    pair.nests[joins] = Registry(joins, Config(), lambda: 0.5)
    pair.take(joins, ev.Booted(NodeRecord(joins, 2.0)))
    pair.take(ME, ev.MemberAlive(joins))
    pair.take(joins, ev.MemberAlive(ME))
    pair.pass_time(3.0)
    pair.take(ME, *[LifeEnded(effect.dot, effect.born) for effect in pair.effects if isinstance(effect, do.EndLife)])
    pair.pass_time(2.0)
    there = sorted((joins, f"bird-{n}", ME.node) for n in range(20) if pair.nests[joins].owns(f"bird-{n}"))
    assert there
    assert sorted((notice.by, notice.name, notice.source) for notice in pair.of(BirdMoved)) == there
    assert not pair.of(BirdStopped)
    pair.effects.clear()
    del pair.nests[joins]
    pair.take(ME, ev.MemberDead(joins), ev.NodeProbed(joins, "refused"))
    pair.pass_time(3.0)
    back = sorted((notice.by, notice.name, notice.source) for notice in pair.of(BirdMoved))
    assert back == [(ME, name, joins.node) for _, name, _ in there]


def test_each_bird_is_counted_by_one_nest_in_whatever_state_it_is():
    trio = Pair(ME, PEER, Life("c", 1))
    nowhere = Options(resources=(("wings", 1.0),))
    effects = trio.take(ME, *[start(n) for n in range(30)], start(30, nowhere))
    trio.pass_time(1.0)

    def states():
        return {life: readings.own_states(nest, sum(readings.tally(nest), Counter())) for life, nest in trio.nests.items()}

    assert sum(states().values(), Counter()) == Counter(starting=30, pending=1)
    trio.take(ME, *running(effects))
    trio.pass_time(1.0)
    own = {life: sum(nest.owns(f"bird-{n}") for n in range(30)) for life, nest in trio.nests.items()}
    assert sum(states().values(), Counter()) == Counter(starting=30 - own[ME], running=own[ME], pending=1)
    assert states()[ME] == Counter(running=own[ME], pending=1), "what fits nowhere is counted by the first of the view"
    (life, *_) = trio.nests[ME].holds.lives.values()
    life.crashes = 1_000
    trio.take(ME, LifeCrashed(life.dot, life.born, "boom"))
    trio.pass_time(1.0)
    assert sum(states().values(), Counter()) == Counter(starting=30 - own[ME], running=own[ME] - 1, pending=1, failed=1)


@pytest.mark.parametrize("dies", [False, True], ids=["its node lives", "its node dies"])
@pytest.mark.parametrize("number", range(8))
def test_a_conflict_is_told_once_though_its_owner_changes_with_the_heal(number, dies):
    """On four hosts two nests told of it: the owner on one side of the split, before its view was whole, and the next."""
    lives = [Life(node, 1) for node in "abcd"]
    whole = Told(*lives)
    every = dict(whole.nests)
    for side, wall, args in ((lives[:2], 1_000, b"one"), (lives[2:], 2_000, b"other")):
        whole.nests = {life: every[life] for life in side}
        for life in side:
            away = [other for other in lives if other not in side]
            whole.take(life, *map(ev.MemberDead, away), *[ev.NodeProbed(other, "silent") for other in away])
        whole.pass_time(2.0)
        started = spec(number)._replace(args=args, request_id=str(wall))
        whole.take(side[0], ev.Start(f"r{wall}", f"bird-{number}", started, b"class", wall))
        whole.pass_time(1.0)
    if dies:
        del every[lives[0]]
        whole.nests = {lives[1]: every[lives[1]]}
        whole.take(lives[1], ev.MemberDead(lives[0]), ev.NodeProbed(lives[0], "silent"))
        whole.pass_time(2.0)
    whole.nests = every
    for life in every:
        whole.take(life, *[ev.MemberAlive(other) for other in every if other != life])
    whole.pass_time(15.0)
    assert all(len(nest.membership.view) == len(every) for nest in every.values())
    told, *more = whole.of(NameConflict)
    assert not more
    assert told.winner.life == lives[0]
    assert dies or told.by == lives[0], "by who accepted the winner"


def test_a_paused_minority_hatches_nothing_however_often_it_looks():
    """It wrote that a bird is pending, and took its own word, at the next look, for that of one who had held the bird."""
    lives = [Life(node, 1) for node in "abc"]
    pair = Pair(*lives, config=Config(minority="pause"))
    numbers = range(30)
    for number in numbers:
        pair.take(ME, start(number))
    pair.pass_time(1.0)
    nest = pair.nests[ME]
    held = {life.name for life in nest.holds.lives.values()}
    assert 0 < len(held) < 30
    pair.nests = {ME: nest}
    pair.take(ME, *map(ev.MemberDead, lives[1:]), *[ev.NodeProbed(life, "silent") for life in lives[1:]])
    pair.pass_time(2.0)
    nest.mark(nest.replica)
    pair.pass_time(2.0)
    assert nest.membership.paused and all(nest.owns(f"bird-{number}") for number in numbers)
    assert {life.name for life in nest.holds.lives.values()} == held
    assert all(readings.info(nest, name).state == "pending" for name in nest.replica if name not in held)


def test_a_bird_that_stays_where_it_is_runs_again_though_its_holder_had_ended_it_for_another_start():
    """The other start was removed then. The owner took its word of before, that the bird lives there, for ever (mix placed, seed 174)."""
    owner, holder = Life("a", 1), Life("b", 1)
    pair = Pair(holder)
    effects = pair.take(holder, *[ev.Start(f"r{n}", f"bird-{n}", spec(n, Options(moves=False)), b"class", 2_000) for n in range(8)])
    pair.take(holder, *running(effects))
    every = pair.nests
    every[owner] = Registry(owner, Config(), lambda: 0.5)
    pair.take(owner, ev.Booted(NodeRecord(owner, 2.0)), ev.MemberAlive(holder))
    pair.take(holder, ev.MemberAlive(owner))
    pair.pass_time(8.0)
    name = next(f"bird-{n}" for n in range(8) if every[owner].owns(f"bird-{n}"))
    (life,) = every[holder].holds.lives_of(name)
    assert not every[owner].holds.lives, "they stay"
    every[holder].supervision.end(life, "stopped", keep=False)  # as the owner of the name it does so for the start that counts
    pair.take(holder, LifeEnded(life.dot, life.born))
    pair.pass_time(5.0)
    assert [one.dot for nest in every.values() for one in nest.holds.lives_of(name)] == [life.dot]
