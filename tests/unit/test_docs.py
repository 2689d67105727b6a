"""README and INTERNALS say what is so: blocks that run or whose names exist, all options and settings, H4's sentence, files that are there.

A comment before each python block of README says how it is checked: `<!-- runnable: plain -->` is executed; `<!-- runnable: ray -->` needs
Ray, so it is compiled, and every name of flock_ray's, method and argument in it is looked up. Those blocks are one program, in order.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import flock_ray
from flock_ray import notices
from flock_ray.api.options import check
from flock_ray.cli.commands import app
from flock_ray.config import Config
from flock_ray.runtime.metrics import METRICS
from flock_ray.specs import BirdInfo, BirdStack, Candidate, Explanation, NestInfo, Options, Running

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INTERNALS = (ROOT / "INTERNALS.md").read_text()

H4 = (
    "two lives of a name run at the same time only where one nest had been declared dead by the other, or had never been heard by it "
    "(a split, a boot or join during one, or a false death); once they exchange messages again and are in sync, one is left within "
    "seconds: the owner's if it has one, else the highest (incarnation, nest life) hands over; the others stop. The life that stays takes "
    "an incarnation above every one displaced, and writes its status."
)

BLOCK = re.compile(r"^(?:<!-- runnable: (\w+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = BLOCK.findall(README)
HAS_START = (flock_ray.Flock, type(flock_ray.options()))


def blocks(kind: str) -> list[str]:
    return [text for marked, text in BLOCKS if marked == kind]


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]


def defaults_in(title: str) -> dict[str, str]:
    return {name.strip("`"): default.strip("`") for name, default, *_ in rows(section(title))[1:]}


# Names in a block that needs Ray


class Names(ast.NodeVisitor):
    """Looks up what a program uses of flock_ray, with real handles and flocks, of which nothing that reaches Ray is called."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {"flock_ray": flock_ray}
        self.classes: dict[str, set[str]] = {}  # methods, by class of the program
        self.named: dict[object, str] = {}  # classes, by the name a bird was started under
        self.looked_up = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "flock_ray":
            self.known.update({alias.asname or alias.name: self._public(alias.name) for alias in node.names})

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        made = self._thing(node.value)
        self.known.update({target.id: made for target in node.targets if isinstance(target, ast.Name)})

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self._thing(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self._thing(node.func)
        if function is None:
            return
        self._thing(node)
        if isinstance(function, flock_ray.Method):
            return  # the arguments are the user's method's
        self._check_arguments(function, node)
        name, of_method = function.__name__, isinstance(getattr(function, "__self__", None), flock_ray.Method)
        if not of_method and name in ("call", "cast", "send_after", "send_every"):
            self._check_method(name, node.args)

    def _public(self, name: str) -> Any:
        assert name in flock_ray.__all__, f"flock_ray.{name} does not exist"
        self.looked_up += 1
        return getattr(flock_ray, name)

    def _thing(self, node: ast.expr) -> Any:
        """What an expression stands for, if it is a matter of flock_ray's."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            of = self._thing(node.value)
            return None if of is None else self._attribute(of, node.attr)
        if isinstance(node, ast.Call):
            return self._made_by(node)
        return None

    def _attribute(self, of: Any, name: str) -> Any:
        if of is flock_ray:
            return self._public(name)
        assert not name.startswith("_")
        if isinstance(of, flock_ray.Bird):
            assert name in dir(of), f"{of} has no method {name!r}"
        self.looked_up += 1
        return getattr(of, name)

    def _made_by(self, node: ast.Call) -> Any:
        function = self._thing(node.func)
        given = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg and isinstance(word.value, ast.Constant)}
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if function is flock_ray.Flock:
            return flock_ray.Flock(*map(ast.literal_eval, node.args), **given)
        if name == "options":
            return function(**given)
        if name == "start" and isinstance(owner, HAS_START):
            own, cls = ast.literal_eval(node.args[0]), node.args[1]
            assert isinstance(cls, ast.Name)
            self.named[own] = cls.id
            return flock_ray.Bird("default", own, None, self.classes[cls.id])
        return None

    def _check_arguments(self, function: Any, node: ast.Call) -> None:
        """The call fits the signature; settings and options are checked by the functions that check users'."""
        words = {word.arg: word.value for word in node.keywords if word.arg}
        inspect.signature(function).bind(*node.args, **words)
        literal = {key: ast.literal_eval(value) for key, value in words.items() if isinstance(value, ast.Constant)}
        if function.__name__ == "init":
            Config().with_settings(**{key: value for key, value in literal.items() if key != "flock"})
        elif function is flock_ray.defaults:
            check(literal)

    def _check_method(self, function: str, args: list[ast.expr]) -> None:
        bird, method = args[:2]
        if not isinstance(method, ast.Constant):
            return
        anywhere = set[str]().union(*self.classes.values())
        target = self.named.get(ast.literal_eval(bird)) if function in ("call", "cast") and isinstance(bird, ast.Constant) else None
        assert method.value in (self.classes[target] if target else anywhere), f"{function} of {method.value!r}: there is no such method"


def names_in(texts: list[str]) -> Names:
    names = Names()
    for text in texts:
        names.visit(ast.parse(text))
    return names


def test_every_python_block_says_how_it_is_checked():
    assert README.count("```python") == len(BLOCKS)
    assert {kind for kind, _ in BLOCKS} == {"plain", "ray"}


@pytest.mark.parametrize("text", blocks("plain"))
def test_plain_blocks_run(text):
    exec(compile(text, "README.md", "exec"), {"__name__": "readme"})


def test_blocks_that_need_ray_compile_and_use_names_that_exist():
    for text in blocks("ray"):
        compile(text, "README.md", "exec")
    assert names_in(blocks("ray")).looked_up > 30


@pytest.mark.parametrize(
    "wrong",
    [
        "flock_ray.fly('tweety')",
        "from flock_ray import Nestling",
        "flock_ray.stop('tweety', now=True)",
        "flock_ray.init(setle=1)",
        "flock_ray.options(wings=2)",
        "@flock_ray.defaults(wings=2)\nclass C: pass",
        "flock_ray.Flock('a').fly()",
        "class C: pass\nbird = flock_ray.start('c', C)\nbird.fly()",
        "class C:\n    def f(self): pass\nbird = flock_ray.start('c', C)\nbird.f.throw()",
        "class C:\n    def f(self): pass\nbird = flock_ray.start('c', C)\nbird.f.options(wait=1)",
        "class C: pass\nflock_ray.start('c', C)\nflock_ray.call('c', 'fly')",
    ],
)
def test_a_block_that_says_what_is_not_so_is_found(wrong):
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        names_in([wrong])


# Tables and sentences


def test_readme_has_the_promise_word_for_word():
    assert f"\n> {H4}\n" in README


def test_every_setting_is_in_its_table_with_its_default():
    assert defaults_in("Settings") == {setting.name: repr(setting.default) for setting in fields(Config)}


def test_every_option_is_in_its_table_with_its_default():
    said = defaults_in("Options")
    assert said.pop("runtime_env") == "None"  # an option that is no field: it is merged with the starter's
    assert said == {name: "{}" if value == () else repr(value) for name, value in Options._field_defaults.items()}


def test_the_tables_of_the_api_have_every_public_name_and_no_other():
    functions = {name for row in rows(section("API")) for name in re.findall(r"^`(\w+)\(", row[0])}
    errors = {name for row in rows(section("Errors")) for name in re.findall(r"^`(\w+)`", row[0])}
    values = {
        "Bird", "BirdInfo", "BirdStack", "Candidate", "Config", "Explanation", "Feed", "Flock", "FlockError", "Me", "Method", "NestInfo",
        "Running", "Stream", "Timer", "aio", "notices",
    }  # fmt: skip
    assert all(f"`{name}" in README or f"`flock_ray.{name}" in README for name in values)
    assert functions | errors | values == set(flock_ray.__all__)


def test_the_signatures_in_the_api_tables_are_the_functions_own():
    said = [cell for row in rows(section("API")) if "(" in (cell := row[0].strip("`"))]
    assert len(said) > 20
    for text in said:
        (stated,) = ast.parse(f"def {text}: ...").body
        assert isinstance(stated, ast.FunctionDef)
        own = inspect.signature(getattr(flock_ray, stated.name)).parameters.values()
        names = [a.arg for a in [*stated.args.posonlyargs, *stated.args.args, *stated.args.kwonlyargs]]
        assert names == [p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)], text
        assert (stated.args.vararg is not None) == any(p.kind is p.VAR_POSITIONAL for p in own), text
        assert (stated.args.kwarg is not None) == any(p.kind is p.VAR_KEYWORD for p in own), text


@pytest.mark.parametrize("kind", [BirdInfo, NestInfo, BirdStack, Candidate, Explanation, Running])
def test_every_field_of_an_info_is_named(kind):
    names = getattr(kind, "_fields", None) or [field.name for field in fields(kind)]
    assert all(f"`{name}`" in section("API") for name in names)


def test_the_table_of_the_command_line_has_every_command():
    said = {re.match(r"`([\w-]+)", row[0])[1] for row in rows(section("Command line"))[1:]}
    assert said == set(typer.main.get_command(app).commands)


def test_every_notice_is_in_its_table_with_its_level_and_fields():
    table = {name: row for row in rows(section("API")) for name in re.findall(r"`(\w+)`", row[0])}
    kinds = [
        kind for kind in vars(notices).values() if isinstance(kind, type) and issubclass(kind, notices.Notice) and not kind.__subclasses__()
    ]
    common = {field.name for base in (notices.Notice, notices.BirdNotice, notices.NestNotice) for field in fields(base)}
    assert {"BirdCrashed", "NestLeft", "Missed"} < {kind.__name__ for kind in kinds}
    assert all(f"`{name}`" in section("API") for name in common)
    for kind in kinds:
        named, level, text = table[kind.__name__]
        levels = dict(zip(re.findall(r"`(\w+)`", named), level.split(", "), strict=True))
        assert levels[kind.__name__] == logging.getLevelName(kind.level).lower()
        assert all(f"`{field.name}`" in text for field in fields(kind) if field.name not in common), kind


def test_every_metric_is_in_its_table_with_its_kind_and_tags():
    said = {row[0].strip("`"): row for row in rows(section("Metrics"))[1:]}
    assert {name: kind for name, (_, kind, _) in said.items()} == {name: metric.kind.lower() for name, metric in METRICS.items()}
    for name, metric in METRICS.items():
        assert all(f"`{tag}`" in said[name][2] for tag in metric.tags if tag not in ("flock", "node"))


@pytest.mark.parametrize("text", [README, INTERNALS], ids=["README", "INTERNALS"])
def test_names_and_files_in_the_text_exist(text):
    for name in re.findall(r"`flock_ray\.(\w+)", text):
        assert name in flock_ray.__all__, f"flock_ray.{name}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)[`:]", text):
        assert any((base / path).exists() for base in (ROOT, ROOT / "flock_ray")), path


def test_the_code_map_has_every_file():
    code_map = INTERNALS.split("## Code map")[1]
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "flock_ray").rglob("*.py")}
    assert {row[0].strip("`") for row in rows(code_map)[1:]} == there


def test_the_table_of_rules_has_every_rule_the_code_names():
    said = {row[0] for row in rows(INTERNALS.split("## Where the rules are kept")[1].split("\n## ")[0])[1:]}
    named = {rule for path in (ROOT / "flock_ray").rglob("*.py") for rule in re.findall(r"\b[SPMHVC][1-6]\b", path.read_text())}
    assert named <= said


@pytest.mark.parametrize("name", ["README.md", "INTERNALS.md", "CHANGELOG.md"])
def test_no_document_has_a_path_of_a_machine(name):
    assert not re.findall(r"(?<![\w./:])/(?:work|tmp|home|root|usr|opt)\b", (ROOT / name).read_text())
