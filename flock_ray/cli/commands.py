"""The commands of `flock-ray`. Each looks at, or does, one thing through the public API, and returns an `Answer`.

Rules kept here: an error is one sentence on standard error, and an exit code (`joining.py`); no command but `init` brings a flock up.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from flock_ray import errors
from flock_ray.cli.joining import FINE, INTERRUPTED, NOT_THERE, REFUSED, USAGE, Failure, ask, check_flock, join_cluster
from flock_ray.cli.render import Answer, Facts, Line, Table, View, one_line, show
from flock_ray.cli.text import BadText, name_of, pasted, text_of, to_json, values_of

if TYPE_CHECKING:
    from flock_ray.api.flock import Flock
    from flock_ray.notices import Notice
    from flock_ray.runtime.pending import Default
    from flock_ray.specs import BirdInfo, BirdStack, Explanation, Name

EPILOG = """\
Exit status: 0 fine; 1 the flock said no, or a bird's method raised; 2 the command was not given as it has to be; 3 there is no such Ray
cluster, or no such flock on it. An error is one sentence on standard error.

Names are written as they are, or as Python literals: tweety, 42, '"42"', '("room", 7)', 'b"key"', 'UUID("...")'. What is printed can be
pasted. Arguments of classes and methods are JSON values: 5, '"text"', '[1, 2]', or key=VALUE.

In a pipe rows are lines with tabs between cells, without titles and colours.
"""

app = typer.Typer(
    name="flock-ray",
    help="Looks at a flock of birds on a running Ray cluster, and does things with it.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

NameText = Annotated[str, typer.Argument(metavar="NAME", help="The bird's name, as `birds` prints it.")]
Values = Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="JSON values, or key=VALUE.")]
Timeout = Annotated[float | None, typer.Option(min=0.0, help="Seconds; the flock's call_timeout if not given.")]
StateName = Literal["pending", "starting", "running", "moving", "restarting", "failed"]
LITERAL = {"ignore_unknown_options": True}  # -5 is a value

SHARED = {
    "address": (
        Annotated[
            str, typer.Option(envvar="RAY_ADDRESS", help="The Ray cluster, ip:port or ray://ip:port; auto: the one on this machine.")
        ],
        "auto",
    ),
    "flock": (Annotated[str, typer.Option(envvar="FLOCK_RAY_FLOCK", help="The flock's name.")], "default"),
    "as_json": (Annotated[bool, typer.Option("--json", help="Answer with JSON.")], False),
}


def command(joins: bool = True, **settings: Any) -> Callable[[Callable[..., Answer | None]], Callable[..., None]]:
    """Makes a command of a function that takes a `Flock`, and what its command line has; all have the options of `SHARED` besides.

    Args:
        joins: the flock has to be there already.
    """

    def decorate(function: Callable[..., Answer | None]) -> Callable[..., None]:
        takes = inspect.signature(function, locals={"Flock": Any}, eval_str=True).parameters

        @functools.wraps(function)
        def run(address: str, flock: str, as_json: bool, **given: Any) -> None:
            join_cluster(address)
            if joins:
                check_flock(flock)
            from flock_ray.api.flock import Flock

            answer = function(Flock(flock), **given, **({"as_json": as_json} if "as_json" in takes else {}))
            if answer is not None:
                show(answer, Console(highlight=False), as_json)

        own = [parameter for parameter in takes.values() if parameter.name not in ("flock", "as_json")]
        shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a) for name, (a, d) in SHARED.items()]
        run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        app.command(**settings)(run)
        return run

    return decorate


def short(node: str | None) -> str:
    return node[:8] if node else "-"


# Looking


@command()
def status(flock: Flock) -> Answer:
    """How the flock is: its nests, its birds by state."""
    nests, tally = flock.nests(), states_of(flock)
    data = {"flock": flock.name, "nests": len(nests), "birds": sum(tally.values()), "states": tally}
    states = ", ".join(f"{count} {state}" for state, count in tally.items()) or "none"
    return Answer(data, [Facts([("flock", flock.name), ("nests", str(len(nests))), ("birds", str(data["birds"])), ("states", states)])])


def states_of(flock: Flock) -> dict[str, int]:
    """How many birds are in each state, the most first."""
    counts: dict[str, int] = {}
    for (_, state), count in ask(flock, "tally").items():
        counts[state] = counts.get(state, 0) + count
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


@command()
def nests(flock: Flock) -> Answer:
    """The nests: birds they hold, share of the ring, address."""
    found = flock.nests()
    total = sum(nest.birds for nest in found)
    rows = [
        (short(n.node_id), str(n.birds), f"{100 * n.birds / total if total else 0:.1f} %", f"{100 * n.share:.1f} %", n.address)
        for n in found
    ]
    return Answer([asdict(nest) for nest in found], [Table(("node", "birds", "load", "ring", "address"), rows)])


@command()
def birds(
    flock: Flock,
    node: Annotated[str | None, typer.Option(help="Only those on this node: its id, or how it begins.")] = None,
    state: Annotated[StateName | None, typer.Option(help="Only those in this state.")] = None,
    like: Annotated[str | None, typer.Option(help="Only those whose name matches, as file names do: 'room:*'.")] = None,
) -> Answer:
    """The birds: state, node, life, restarts, class, note."""
    found = [
        bird
        for bird in flock.birds(state=state)
        if (node is None or (bird.node_id or "").startswith(node)) and (like is None or _is_like(bird.name, like))
    ]
    found.sort(key=lambda bird: text_of(bird.name))
    rows = [
        (pasted(b.name), b.state, short(b.node_id), str(b.incarnation), str(b.restarts), b.class_name.rpartition(".")[2], _note(b))
        for b in found
    ]
    titles = ("name", "state", "node", "life", "restarts", "class", "note")
    return Answer([_bird(bird) for bird in found], [Table(titles, rows)])


def _is_like(name: Name, pattern: str) -> bool:
    """A text is matched as it is, what is no text as it is written."""
    return fnmatchcase(name if isinstance(name, str) else text_of(name), pattern)


def _note(bird: BirdInfo) -> str:
    return bird.reason or last_line(bird.last_error)


def last_line(error: str) -> str:
    return (error.strip().splitlines() or [""])[-1]


def _bird(bird: BirdInfo) -> dict[str, Any]:
    return {**asdict(bird), "name": text_of(bird.name)}


@command()
def info(flock: Flock, name: NameText) -> Answer:
    """What is known of a bird, its last error's traceback too."""
    bird = flock.info(name_of(name))
    facts = [
        ("name", pasted(bird.name)), ("state", bird.state), ("node", bird.node_id or "none can run it"), ("class", bird.class_name),
        ("light", "yes" if bird.light else "no"), ("incarnation", str(bird.incarnation)), ("restarts", str(bird.restarts)),
    ]  # fmt: skip
    facts += [("reason", bird.reason)] * bool(bird.reason) + [("error", bird.last_error)] * bool(bird.last_error)
    return Answer(_bird(bird), [Facts(facts)])


@command()
def explain(flock: Flock, name: NameText) -> Answer:
    """Why a bird is where it is, or why it is pending."""
    return explained(flock.explain(name_of(name)))


def explained(told: Explanation) -> Answer:
    """The view of an explanation."""
    data = {
        "name": text_of(told.bird.name), "state": told.bird.state, "owner": told.owner, "told_by": told.told_by, "reasons": told.reasons,
        "candidates": [candidate._asdict() for candidate in told.candidates],
    }  # fmt: skip
    rows = [
        (str(place), short(one.node_id), str(one.weight), "owns it" if one.node_id == told.owner else "", one.holds, one.lacks)
        for place, one in enumerate(told.candidates, 1)
    ]
    head = f"{pasted(told.bird.name)} is {told.bird.state}."
    return Answer(data, ["\n".join([head, *told.reasons]), Table(("choice", "node", "points", "owner", "holds", "lacks"), rows)])


@command()
def stack(flock: Flock, name: NameText) -> Answer:
    """What a bird does right now: methods, stacks, queue."""
    plain = name_of(name)
    return stacked(plain, flock.stack(plain))


def stacked(name: Name, found: BirdStack) -> Answer:
    """The view of what a bird does."""
    running = [
        {"method": one.method, "seconds": round(one.seconds, 3), "waiting": [text_of(w) for w in one.waiting], "stack": one.stack}
        for one in found.running
    ]
    data = {"name": text_of(name), **found._asdict(), "running": running}
    process = [("state", found.state), ("node", found.node_id), ("pid", str(found.pid)), ("queue", str(found.queue))]
    views: list[View] = [Facts([("name", pasted(name)), *process])]
    for one in found.running:
        waiting = f", called by {' <- '.join(pasted(bird) for bird in reversed(one.waiting))}" if one.waiting else ""
        views.append(f"{one.method} for {one.seconds:.1f} s{waiting}\n{one.stack}")
    return Answer(data, views if running else [*views, "No method is under way."])


# Doing


@command(context_settings=LITERAL)
def start(
    flock: Flock,
    name: NameText,
    target: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="What to start; found from here, and on the nodes.")],
    args: Values = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option, as light=true.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it runs.")] = True,
    timeout: Timeout = None,
) -> Answer:
    """Start a bird: a class with arguments, under a name."""
    plain, cls, (positional, keywords) = name_of(name), _class_at(target), values_of(args or ())
    options = values_of(option or ())
    if options[0]:
        raise BadText(f"--option {option[0] if option else ''} is no KEY=VALUE; give it as --option light=true")
    bird = flock.options(**options[1]).start(plain, cls, *positional, **keywords)
    if not wait:
        return Answer({"name": text_of(plain), "state": "accepted"}, [f"{pasted(plain)} is accepted"])
    flock.wait(bird, timeout=_seconds(timeout))
    node = flock.where(bird)
    return Answer({"name": text_of(plain), "state": "running", "node_id": node}, [f"{pasted(plain)} runs on node {short(node)}"])


def _seconds(timeout: float | None) -> float | Default:
    from flock_ray.runtime.client import DEFAULT

    return DEFAULT if timeout is None else timeout


def _class_at(target: str) -> Any:
    """The class of `module:Class`."""
    import importlib

    module, colon, qualname = target.partition(":")
    if not colon or not module or not qualname:
        raise BadText(f"{target} is no MODULE:CLASS; give it as in counters:Counter")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # also what the user's module raises
        text = f"{target} cannot be imported ({type(error).__name__}: {one_line(str(error))})"
        raise BadText(f"{text}; run flock-ray where it can be, or set PYTHONPATH") from error
    return found


@command(context_settings=LITERAL)
def call(
    flock: Flock,
    name: NameText,
    method: Annotated[str, typer.Argument(metavar="METHOD")],
    args: Values = None,
    timeout: Timeout = None,
) -> Answer:
    """Call a method of a bird, and print its result as JSON."""
    plain, (positional, keywords) = name_of(name), values_of(args or ())
    (result,) = flock.call_many([(plain, method, positional, keywords)], timeout=_seconds(timeout))
    text = to_json(result)
    return Answer({"name": text_of(plain), "method": method, "result": json.loads(text)}, [text])


@command(context_settings=LITERAL)
def cast(flock: Flock, name: NameText, method: Annotated[str, typer.Argument(metavar="METHOD")], args: Values = None) -> Answer:
    """Send a message to a bird, without waiting for a result."""
    plain, (positional, keywords) = name_of(name), values_of(args or ())
    flock.info(plain)
    flock.cast_many([(plain, method, positional, keywords)])
    return Answer({"name": text_of(plain), "method": method, "sent": True}, [f"sent {method} to {pasted(plain)}"])


@command()
def stop(flock: Flock, name: NameText, timeout: Timeout = None) -> Answer:
    """Stop a bird for good, and wait until it is gone."""
    plain = name_of(name)
    flock.stop(plain)
    flock.wait([plain], "gone", timeout=_seconds(timeout))
    return Answer({"name": text_of(plain), "state": "gone"}, [f"{pasted(plain)} is gone"])


@command()
def restart(flock: Flock, name: NameText) -> Answer:
    """Give a bird a new life; this revives a failed one."""
    plain = name_of(name)
    flock.restart(plain)
    return Answer({"name": text_of(plain), "state": "restarting"}, [f"{pasted(plain)} is restarted"])


@command(joins=False)
def init(
    flock: Flock,
    settings: Annotated[list[str] | None, typer.Argument(metavar="SETTING=VALUE", help="As spares=2.")] = None,
) -> Answer:
    """Bring a flock up: a nest on every node."""
    positional, given = values_of(settings or ())
    if positional:
        raise BadText(f"{(settings or [''])[0]} is no SETTING=VALUE; give it as in spares=2")
    flock.init(**given)
    return Answer({"flock": flock.name, "nests": len(flock.nests())}, [f"flock {flock.name} is up"])


# Watching


@command()
def events(
    flock: Flock,
    as_json: bool,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    since: Annotated[float, typer.Option(min=0.0, help="Only the last so many seconds; 0: all that nests still keep.")] = 0.0,
) -> None:
    """What has happened in the flock, a line each."""
    console = Console(highlight=False)
    for notice in flock.events(follow=follow, since=time.time() - since if since else 0.0):
        show(noticed(notice), console, as_json)


def noticed(notice: Notice) -> Answer:
    """The view of an event."""
    import logging

    kind, level = type(notice).__name__, logging.getLevelName(notice.level).lower()
    name = getattr(notice, "name", None)
    data = {"time": notice.time, "kind": kind, "level": level, "node_id": notice.node_id, "text": notice.text}
    if name is not None:
        data["name"] = text_of(name)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(notice.time))
    cells = (at, level, short(notice.node_id), kind, pasted(name) if name is not None else "-", one_line(notice.text))
    return Answer(data, [Line(cells, f"{at[11:]} {level:7} {cells[2]} {cells[5]}")])


@command()
def top(
    flock: Flock,
    as_json: bool,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="How many looks; in a pipe one if not given.")] = None,
) -> None:
    """Load, calls, errors, moves, restarts of each nest, live."""
    from flock_ray.cli.top import watch

    watch(flock, interval, count, as_json)


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(min=2, help="Raylets, the head's included.")] = 4,
    birds: Annotated[int, typer.Option(min=2, help="Birds to start.")] = 20,
    light: Annotated[bool, typer.Option("--light", help="Light birds, many in a process.")] = False,
) -> None:
    """Show what a flock does, on a Ray cluster of its own."""
    from flock_ray.cli.demo import run

    raise typer.Exit(run(nodes, birds, light))


# The way in


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    sys.path.insert(0, os.getcwd())  # `start` imports from here, as Ray's workers do
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name may have what a terminal's encoding has not
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Runs a command line. Returns the exit code."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = typer.main.get_command(app).main(given or ["--help"], prog_name="flock-ray", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else FINE
    except BrokenPipeError:  # who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        text, code = explained_failure(error)
        print(f"flock-ray: {one_line(text)}", file=sys.stderr)
        return code


def explained_failure(error: Exception) -> tuple[str, int]:
    """The sentence for an error, and the exit code."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, BadText):
        return str(error), USAGE
    if isinstance(error, typer.TyperException):
        message = getattr(error, "format_message", lambda: str(error))()
        path = getattr(getattr(error, "ctx", None), "command_path", "flock-ray")
        return f"{message.replace('Value error, ', '').rstrip('.')}; see `{path} --help`", USAGE
    if isinstance(error, errors.FlockNotRunning):
        return str(error), NOT_THERE
    if isinstance(error, errors.FlockError):
        last = last_line(str(error.__cause__ or ""))
        return f"{error}{f' (its last error: {last})' if last else ''}", REFUSED
    if isinstance(error.__cause__, errors.RemoteError):
        return f"the method raised {type(error).__name__}: {error}", REFUSED
    said = str(error) if isinstance(error, AttributeError | TypeError | ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
    return said, REFUSED
