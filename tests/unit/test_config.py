"""The settings: what is impossible is refused at once, by name, and a misspelt setting is told what was meant."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from typing import Any

import pytest

from flock_ray.config import Config, check_known

NO_PORTS = "ports must be the first and the last of a range, (lo, hi) with 1 <= lo <= hi <= 65535"
NUMBERS = [field.name for field in dataclasses.fields(Config) if field.name not in ("minority", "wire", "ports", "metrics")]


def with_one(setting: str, value: Any) -> Config:
    settings: dict[str, Any] = {setting: value}
    return Config(**settings)


def test_the_defaults_are_possible() -> None:
    assert Config().with_settings() == Config()


def test_every_setting_is_explained() -> None:
    text = Config.__doc__ or ""
    attributes = {name for line in text.splitlines() if ":" in line for name in line.split(":")[0].replace(",", " ").split()}
    assert {field.name for field in dataclasses.fields(Config)} <= attributes


def test_a_setting_is_changed_in_a_copy() -> None:
    config = Config()
    assert config.with_settings(call_timeout=None, minority="pause", max_birds=10) == Config(
        call_timeout=None, minority="pause", max_birds=10
    )
    assert config == Config()
    with pytest.raises(AttributeError):
        config.settle = 1.0  # type: ignore[misc]  # that it is refused is the point
    assert pickle.loads(pickle.dumps(config.with_settings(settle=0))) == Config(settle=0)


@pytest.mark.parametrize("setting", NUMBERS)
@pytest.mark.parametrize("value", ["1", True, False, -1, -0.5, math.nan, [1], 1j], ids=repr)
def test_what_is_no_number_or_below_zero_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{setting} must be "):
        with_one(setting, value)


@pytest.mark.parametrize("setting", NUMBERS)
def test_zero_is_refused_unless_it_means_something(setting: str) -> None:
    if setting in ("settle", "bootstrap_wait", "min_free_memory", "spares"):
        assert getattr(with_one(setting, 0), setting) == 0
    else:
        with pytest.raises(ValueError, match=f"^{setting} must be more than 0, not 0$"):
            with_one(setting, 0)


@pytest.mark.parametrize("setting", NUMBERS)
def test_none_is_refused_unless_it_means_something(setting: str) -> None:
    if setting in ("call_timeout", "max_birds", "light_hosts", "rest_after"):
        assert getattr(with_one(setting, None), setting) is None
    else:
        with pytest.raises(ValueError, match=f"^{setting} must be a number, not None$"):
            with_one(setting, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minority": "stop"}, "minority must be 'run' or 'pause', not 'stop'"),
        ({"minority": None}, "minority must be 'run' or 'pause', not None"),
        ({"wire": "tcp"}, "wire must be 'auto' or 'ray', not 'tcp'"),
        ({"metrics": 1}, "metrics must be True or False, not 1"),
        ({"metrics": "no"}, "metrics must be True or False, not 'no'"),
        ({"ports": 80}, f"{NO_PORTS}, not 80"),
        ({"ports": (9, 8)}, f"{NO_PORTS}, not (9, 8)"),
        ({"ports": (0, 8)}, f"{NO_PORTS}, not (0, 8)"),
        ({"ports": (1, 65536)}, f"{NO_PORTS}, not (1, 65536)"),
        ({"ports": [1, 2]}, f"{NO_PORTS}, not [1, 2]"),
        ({"moves_in_flight": 1.5}, "moves_in_flight must be a whole number, not 1.5"),
        ({"max_birds": 10.0}, "max_birds must be a whole number, not 10.0"),
        ({"start_argument_limit": 1e6}, "start_argument_limit must be a whole number, not 1000000.0"),
        ({"min_free_memory": 1}, "min_free_memory is a fraction below 1, not 1"),
        ({"backoff_initial": 6.0}, "backoff_max (5.0) must not be below backoff_initial (6.0)"),
        ({"backoff_max": 0.05}, "backoff_max (0.05) must not be below backoff_initial (0.1)"),
    ],
)
def test_impossible_values_are_value_errors(settings: dict[str, Any], message: str) -> None:
    for attempt in (Config, Config().with_settings):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attempt(**settings)


def test_an_unknown_setting_is_told_what_was_probably_meant() -> None:
    with pytest.raises(TypeError, match=r"^'call_timout' is no setting of init; did you mean 'call_timeout'\?$"):
        Config().with_settings(settle=1.0, call_timout=3)
    with pytest.raises(TypeError, match=r"^'zzz' is no setting of init; known are call_timeout, settle, "):
        Config().with_settings(zzz=3)


def test_known_keywords_pass_and_the_first_unknown_one_is_named() -> None:
    check_known("option", {}, [])
    check_known("option", {"light": True}, ["light", "moves"])
    with pytest.raises(TypeError, match=r"^'lite' is no option; did you mean 'light'\?$"):
        check_known("option", {"light": True, "lite": 1, "move": 2}, ["light", "moves"])
