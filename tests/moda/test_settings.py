"""Settings: one field gives the checks, the docstring, the command's option and the JSON schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import typer

from moda.cli.options import option_of, takes
from moda.demo.settings import DemoSettings
from moda.runs.config import RUNTIME_SETTINGS, DataOptions, DecompositionSettings, TrainingConfig
from moda.settings import Settings, check_setting, json_schema, kinds_of, setting, settings_of
from moda.study.digits import StudySettings
from moda.study.replacement_study import ReplacementStudy
from moda.study.sweep import GRIDS, SweepSettings

CLASSES = (
    TrainingConfig, DataOptions, DecompositionSettings, ReplacementStudy, StudySettings, SweepSettings, DemoSettings,
)  # fmt: skip


@dataclass(frozen=True)
class Inner(Settings, command="cook"):
    """What goes in."""

    salt: int | None = setting(None, help="The grains of salt.", at_least=0)
    hot: bool = setting(False, help="Whether it is hot.", option="--hot")


@dataclass(frozen=True)
class Recipe(Settings, command="cook"):
    """How to cook."""

    name: str = setting("soup", help="The name of the dish.")
    minutes: int = setting(10, help="The minutes it takes.", at_least=1, at_most=90, option="--minutes -m")
    share: float = setting(0.5, help="The share that is eaten.", above=0, at_most=1)
    cold: float = setting(0.0, help="How cold it is served.", at_least=0, below=5)
    way: str = setting("boil", help="The way of cooking.", choices=("boil", "fry"))
    ways: tuple[str, ...] = setting(("boil",), help="All ways.", choices=("boil", "fry"))
    steps: tuple[int, ...] = setting((1, 2), help="The steps.", at_least=1, entry="step")
    heats: tuple[float, ...] | None = setting(
        None, help="The heats, or `all`.", at_least=0, at_most=1, words={"all": (0.0, 1.0)}
    )
    inner: Mapping[str, Any] = setting({}, help="What goes in.", entries=Inner)
    lid: bool = setting(True, help="Whether the lid is on.", option="--lid/--no-lid")
    note: str | None = setting(None, help="A note.", commands=("write",))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"name": ""}, ValueError, "name: expected a non-empty string"),
        ({"name": None}, TypeError, "name: expected a string, got NoneType"),
        ({"minutes": 0}, ValueError, "minutes: expected at least 1, got 0"),
        ({"minutes": 91}, ValueError, "minutes: expected at most 90, got 91"),
        ({"minutes": 1.0}, TypeError, "minutes: expected an integer, got float"),
        ({"minutes": True}, TypeError, "minutes: expected an integer, got bool"),
        ({"share": 0}, ValueError, "share: expected a finite number greater than 0 and of at most 1, got 0"),
        ({"share": "x"}, TypeError, "share: expected a number, got str"),
        ({"cold": 5}, ValueError, "cold: expected a finite number of at least 0 and less than 5, got 5"),
        ({"cold": math.nan}, ValueError, "cold: expected a finite number of at least 0 and less than 5, got nan"),
        ({"way": "bake"}, ValueError, "way: expected one of boil, fry, got 'bake'"),
        ({"ways": ("bake", "fry")}, ValueError, "ways: expected some of boil, fry, got ['bake']"),
        ({"ways": ()}, ValueError, "ways: expected some of boil, fry, got none"),
        ({"ways": "boil"}, TypeError, "ways: expected a sequence, got str"),
        ({"steps": ()}, ValueError, "steps: expected at least one step, got none"),
        ({"steps": (1, 0)}, ValueError, "steps: expected at least 1, got 0"),
        ({"steps": (1, "2")}, TypeError, "steps: expected an integer, got str"),
        ({"heats": (0.5, 1.5)}, ValueError, "heats: expected numbers in [0, 1], got 1.5"),
        ({"heats": (0.5, math.nan)}, ValueError, "heats: expected numbers in [0, 1], got nan"),
        ({"heats": ("warm",)}, TypeError, "heats: expected a number, got str"),
        ({"inner": [1]}, TypeError, "inner: expected a mapping, got list"),
        ({"inner": {"salt": {1}}}, TypeError, "inner['salt']: expected a string, number, true, false or null"),
        ({"lid": 1}, TypeError, "lid: expected true or false, got 1"),
        ({"lid": None}, TypeError, "lid: expected true or false, got None"),
        ({"note": 3}, TypeError, "note: expected a string, got int"),
    ],
)  # fmt: skip
def test_values_that_a_field_does_not_allow(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Recipe(**values)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Recipe().changed(**values)


def test_values_are_kept_as_the_fields_type_says() -> None:
    recipe = Recipe(share=1, steps=[3, 4], heats=[0, 1], inner={"salt": 1})
    assert (recipe.share, recipe.steps, recipe.heats) == (1.0, (3, 4), (0.0, 1.0))
    assert all(isinstance(value, float) for value in (recipe.share, *(recipe.heats or ())))
    assert check_setting(Recipe, "note", None) is None
    assert Recipe().inner is not Recipe().inner  # no two share one mapping
    assert kinds_of(Recipe)["heats"].optional
    assert not kinds_of(Recipe)["steps"].optional


@pytest.mark.parametrize("settings", CLASSES)
def test_every_field_is_declared_and_described(settings: type[Settings]) -> None:
    declared = settings_of(settings)
    assert list(declared) == [field.name for field in fields(settings)]
    for name, each in declared.items():
        assert re.fullmatch(r"[A-Z].*[.)]", each.help), name
        assert f"    {name}: {each.help}" in (settings.__doc__ or "")
    assert settings() == settings.from_dict(json.loads(json.dumps(settings().to_dict())))


def check(schema: Mapping[str, Any], value: Any) -> bool:
    """A validator of the words that our schemas use."""
    if "anyOf" in schema:
        return any(check(each, value) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
        "object": dict,
        "array": list | tuple,
    }
    if not isinstance(value, kinds[schema["type"]]) or (
        isinstance(value, bool) and schema["type"] in ("integer", "number")
    ):
        return False
    if schema["type"] == "array":
        return len(value) >= schema["minItems"] and all(check(schema["items"], each) for each in value)
    if schema["type"] == "string":
        return len(value) >= schema.get("minLength", 0)
    bounds = {
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
    }
    return all(holds(schema[word]) for word, holds in bounds.items() if word in schema)


@pytest.mark.parametrize("settings", CLASSES)
def test_schema_allows_the_defaults(settings: type[Settings]) -> None:
    schema = json.loads(json.dumps(json_schema(settings)))
    assert list(schema["properties"]) == [field.name for field in fields(settings)]
    for name, value in settings().to_dict().items():
        assert check(schema["properties"][name], value), name
        default = schema["properties"][name]["default"]
        assert default == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "x"), ("name", ""), ("name", 3), ("minutes", 0), ("minutes", 90), ("minutes", 91), ("minutes", "1"), ("share", 0),
        ("share", 1), ("share", 1.5), ("cold", 0), ("cold", 5), ("way", "fry"), ("way", "bake"), ("ways", ["fry"]), ("ways", []),
        ("ways", ["bake"]), ("steps", [1]), ("steps", [0]), ("steps", []), ("heats", None), ("heats", [0.2]), ("heats", [2.0]),
        ("inner", {}), ("inner", 3), ("lid", True), ("lid", None), ("note", None), ("note", "x"), ("note", 4),
    ],
)  # fmt: skip
def test_schema_allows_what_the_class_allows(name: str, value: Any) -> None:
    try:
        Recipe(**{name: value})
    except (TypeError, ValueError):
        allowed = False
    else:
        allowed = True
    assert check(json_schema(Recipe)["properties"][name], value) == allowed


# ---- options --------------------------------------------------------------------------------------------------------


def cooked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """What the command is given, and what it prints."""
    seen: list[Any] = []
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    @takes(Recipe, "cook")
    def cook(given: Mapping[str, Any], times: int = 1) -> None:
        """Cook."""
        seen.append((dict(given), times))

    app(args=arguments, standalone_mode=False)
    return (seen[0] if seen else None), capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        ("--name stew -m 5", {"name": "stew", "minutes": 5}),
        ("--share 1 --cold 0.5", {"share": 1.0, "cold": 0.5}),
        ("--ways boil,fry --steps 3,4", {"ways": ("boil", "fry"), "steps": (3, 4)}),
        ("--heats all", {"heats": (0.0, 1.0)}),
        ("--heats 0.25,1", {"heats": (0.25, 1.0)}),
        ("--salt 3 --hot", {"inner": {"salt": 3, "hot": True}}),
        ("--no-lid", {"lid": False}),
        ("--lid", {"lid": True}),
    ],
)
def test_options_give_the_fields(arguments: str, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cooked([*arguments.split(), "--times", "2"], capsys)[0] == (given, 2)
    assert Recipe(**given).changed(**given) == Recipe(**given)


def test_help_shows_what_the_fields_say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    printed = cooked(["--help"], capsys)[1]
    for name, declared in settings_of(Recipe, "cook").items():
        if declared.entries is None:
            assert declared.help in printed, name
    assert "The grains of salt." in printed
    assert re.search(r"The minutes it takes\..*10", printed)
    assert "A note." not in printed


def test_mistake_in_a_list_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"--steps: expected integers separated by commas, got '1,x'"):
        cooked(["--steps", "1,x"], capsys)


def test_option_of_a_field() -> None:
    assert option_of(TrainingConfig, "learning_rate") == "--learning-rate"
    assert option_of(TrainingConfig, "num_workers") == "--workers"
    assert option_of(TrainingConfig, "tensorboard") == "--tensorboard"
    assert option_of(TrainingConfig, "data_options", {"image_size": 8}) == "--image-size"


def test_settings_of_the_house() -> None:
    assert {
        "data_root", "accelerator", "graph", "devices", "strategy", "timeout", "num_workers", "log_every_steps", "checkpoint_every_steps",
        "keep_every_epochs", "tensorboard",
    } == RUNTIME_SETTINGS  # fmt: skip
    assert settings_of(SweepSettings)["threshold"].words == {"paper": GRIDS["threshold"]}
    assert (
        TrainingConfig(compactness=0.5).standard().to_dict()
        == TrainingConfig(affinity=0, dispersion=0, compactness=0).to_dict()
    )
