"""How modules were chosen: the settings that a decomposition carries along with its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from moda.checks import Bounds, check_number, json_value, one_of, text

__all__ = ["BudgetRule", "Combine", "FiringRule", "check_combine", "check_fraction", "check_settings"]

Combine: TypeAlias = Literal["rows", "logit", "probability"]
"""How the outputs of modules become those of a composition. "rows": the union of the modules is one network, of whose
logits the rows of the classes are taken. "logit": every class's module is a network of its own, of which the class's
logit is taken. "probability": likewise, and the module's head makes a probability of all its logits."""


@dataclass(frozen=True)
class FiringRule:
    """The published rule of MODA: a class keeps the neurons that fire for enough of its samples.

    Attributes:
        threshold: firing rate from which a neuron is kept, in [0, 1].
        min_fraction: the least share of a layer's neurons that a class keeps, in [0, 1].
    """

    NAME: ClassVar[str] = "firing"

    threshold: float = 0.9
    min_fraction: float = 0.005

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError where a field is not as above."""
        check_fraction("threshold", self.threshold)
        check_fraction("min_fraction", self.min_fraction)

    def settings(self) -> dict[str, Any]:
        """As a decomposition holds them."""
        return {"rule": self.NAME, **asdict(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> FiringRule:
        """The rule in a decomposition's settings.

        Raises:
            ValueError: another rule made it, or a field is missing, unknown or out of range.
        """
        if settings.get("rule") != cls.NAME:
            raise ValueError(f"settings: expected those of the rule {cls.NAME!r}, got {dict(settings)!r:.200}")
        names = ["rule", *(field.name for field in fields(cls))]
        if sorted(settings) != sorted(names):
            raise ValueError(f"settings: expected the entries {', '.join(names)}, got {', '.join(sorted(settings))}")
        return cls(settings["threshold"], settings["min_fraction"])


@dataclass(frozen=True)
class BudgetRule:
    """A class keeps the fewest neurons, of all layers together, that hold a share 1 - epsilon of its scores.

    Attributes:
        rule: what the scores are, of `NAMES`.
        epsilon: share of the scores that is dropped, in [0, 1].
    """

    NAMES: ClassVar[tuple[str, ...]] = ("share", "attribution")

    rule: str = "attribution"
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError where a field is not as above."""
        one_of(self.NAMES)("rule", self.rule)
        check_fraction("epsilon", self.epsilon)

    def settings(self) -> dict[str, Any]:
        """As a decomposition holds them."""
        return asdict(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> BudgetRule:
        """The rule in a decomposition's settings.

        Raises:
            ValueError: another rule made it, or a field is missing, unknown or out of range.
        """
        if settings.get("rule") not in cls.NAMES:
            expected = " or ".join(map(repr, cls.NAMES))
            raise ValueError(f"settings: expected those of the rule {expected}, got {dict(settings)!r:.200}")
        if sorted(settings) != ["epsilon", "rule"]:
            raise ValueError(f"settings: expected the entries rule, epsilon, got {', '.join(sorted(settings))}")
        return cls(settings["rule"], settings["epsilon"])


RULES: tuple[str, ...] = (FiringRule.NAME, *BudgetRule.NAMES)
"""What neurons may be chosen by."""


def rule_of(settings: Mapping[str, Any]) -> FiringRule | BudgetRule:
    """The rule in a decomposition's settings.

    Raises:
        ValueError: they are of no rule that is known here, or a field is missing, unknown or out of range.
    """
    return BudgetRule.of(settings) if settings.get("rule") in BudgetRule.NAMES else FiringRule.of(settings)


def check_settings(method: Any, settings: Any) -> dict[str, Any]:
    """The settings of a method, as plain JSON values; none at all where nothing is known of them.

    Raises:
        TypeError, ValueError: the method has no name, a value is nothing that JSON can hold, or they are settings of
            a rule in `RULES` and out of range.
    """
    text()("method", method)
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings: expected an object, got {type(settings).__name__}")
    values: dict[str, Any] = json_value("settings", settings)
    if method == "moda" and values.get("rule") in RULES:
        rule_of(values)
    return values


def check_combine(value: Any) -> None:
    """Raise ValueError unless `value` is one of `Combine`."""
    one_of(get_args(Combine))("combine", value)


def check_fraction(name: str, value: Any) -> float:
    """`value`, the argument `name`, as a float; raise TypeError or ValueError unless it is a number in [0, 1]."""
    return check_number(name, value, Bounds(at_least=0, at_most=1))
