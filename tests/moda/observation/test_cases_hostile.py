"""Models that try to be hard to watch: odd classes, odd memory, odd calls. Each is what the plain model is, bit for bit."""

from __future__ import annotations

import abc
import copy
import functools
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import moda
from moda_kernels import ModularLoss
from tests.moda._helpers.observing import Trace, assert_same_pass, one_pass

X = torch.linspace(-1, 1, 24).view(4, 6)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8).mul(30).sin()
LABELS = torch.tensor([0, 1, 0, 1])

MODELS: dict[str, Callable[[], nn.Module]] = {}

Made = TypeVar("Made", bound=Callable[[], nn.Module])


def model(make: Made) -> Made:
    MODELS[make.__name__] = make
    return make


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 8), nn.Linear(8, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.act(self.a(x))))


# -- classes


@model
class NoNewAttributes(Base):
    """Forbids every attribute that it does not know."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("training", "a", "b", "act") and not name.startswith("_"):
            raise AttributeError(name)
        super().__setattr__(name, value)


@model
class NoAttributesAtAll(Base):
    """Is frozen after it was made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "act" in self.__dict__.get("_modules", ()) and name != "training":
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Registered(Base):
    """Keeps a list of its subclasses, and takes no name twice."""

    known: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if cls.__name__ in Registered.known:
            raise TypeError(f"{cls.__name__} is registered already")
        Registered.known[cls.__name__] = cls


@model
class OnceRegistered(Registered):
    pass


class Demanding(nn.ReLU):
    """An activation whose subclasses have to say something."""

    def __init_subclass__(cls, *, word: str, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.word = word  # type: ignore[attr-defined]


class Polite(Demanding, word="please"):
    pass


@model
class WithDemandingActivation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = Polite()


class Meta(abc.ABCMeta):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.made_by = cls.__name__
        return made


@model
class OwnMetaclass(Base, metaclass=Meta):
    pass


Kind = TypeVar("Kind")


@model
class AnswersToEverything(Base):
    """Has every attribute that it is asked for, also those by which wrappers are told."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


@model
class NamedAsWeNameThings(Base):
    def __init__(self) -> None:
        super().__init__()
        self._moda_part, self._moda_plain, self._run = nn.ReLU(), nn.GELU(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self._run(self._moda_plain(self._moda_part(self.a(x)))))


class Generically(Base, Generic[Kind]):
    pass


@model
def generic() -> nn.Module:
    return Generically[int]()


@model
class WithSlots(Base):
    __slots__ = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "kept", 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.kept


@model
class OwnEquality(Base):
    """Modules that compare equal, and hash alike."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([Equal(), Equal()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for act in self.acts:
            h = act(h - 0.01)
        return self.b(h)


class Equal(nn.Module):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 7

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@model
class PropertiesThatRaise(Base):
    @property
    def taps(self) -> Any:
        raise RuntimeError("do not ask")

    @property
    def device(self) -> Any:
        raise RuntimeError("do not ask")


@model
def an_activation_alone() -> nn.Module:
    return nn.Sequential(nn.ReLU())


@model
def forward_as_a_partial() -> nn.Module:
    made = Base()
    made.scale = 2.0

    def forward(scale: float, x: Tensor) -> Tensor:
        return scale * made.b(F.silu(made.a(x)))

    made.forward = functools.partial(forward, 2.0)  # type: ignore[method-assign]
    return made


class Bound(Base):
    def __deepcopy__(self, memo: Any) -> Any:
        return bound_method()


@model
def bound_method() -> nn.Module:
    torch.manual_seed(0)
    made = Bound()
    made.forward = types.MethodType(lambda self, x: self.b(F.elu(self.a(x))), made)  # type: ignore[method-assign]
    return made


@model
def traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(Base())


@model
def parametrized_everywhere() -> nn.Module:
    made = Base()
    parametrizations.orthogonal(made.a)
    parametrizations.weight_norm(made.b)
    return made


# -- calls


@model
class CallsItself(Base):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            return self(x + 0.01 * self.act(self.a(x))[:, :6], depth - 1)
        return super().forward(x)


@model
class MomentumEncoder(Base):
    """MoCo: a second encoder follows the first inside forward, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.a).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.a.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
            order = torch.randperm(x.size(0))
            keys = F.relu(self.slow(x[order]))[order.argsort()]
        return self.b(self.act(self.a(x)) + keys)


@model
class InnerLoop(Base):
    """MAML: a step of gradient descent inside forward, then the adapted weights in a functional call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            weights = dict(self.a.named_parameters())
            loss = F.relu(torch.func.functional_call(self.a, weights, (x,))).square().mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        adapted = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        return self.b(F.relu(torch.func.functional_call(self.a, adapted, (x,))))


@model
class InThreads(Base):
    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            halves = list(pool.map(lambda part: torch.tanh(part), self.a(x).chunk(2, 1)))
        return self.b(self.act(torch.cat(halves, 1)))


@model
class Generating(Base):
    def parts(self, x: Tensor) -> Iterator[Tensor]:
        yield self.act(self.a(x))
        yield F.gelu(self.a(-x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(sum(self.parts(x)))  # type: ignore[arg-type]


@model
class ActivationInAHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(_rectify)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def _rectify(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return F.relu(output)


@model
class PositionalInplace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.elu(F.relu(self.a(x), True) - 0.1, 1.0, True))


@model
class KeywordInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(input=self.act(input=self.a(input=x)) - 0.1))


@model
class BareException(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            self.act("no tensor")
        except TypeError:
            pass
        except AttributeError:
            pass
        return super().forward(x)


@model
class DisabledTorchFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        with torch._C.DisableTorchFunction():
            h = F.relu(h - 0.1)
        return self.b(h)


@model
class OwnMode(Base):
    """Enters a mode of its own, which sees what it always sees."""

    def forward(self, x: Tensor) -> Tensor:
        with Counting() as mode:
            h = F.relu(self.a(x))
        assert mode.calls == ["linear", "relu"]
        return self.b(self.act(h))


class Counting(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


@model
class DefaultDtypeAndDevice(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.device("cpu"):
            h = self.act(self.a(x)) + torch.ones(8)
        return self.b(F.relu(h))


class Rectified(torch.autograd.Function):
    """Overwrites its input, and says so when PyTorch's functions are no longer looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.relu_())
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


@model
class OverwrittenByAFunctionOfItsOwn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)) + Rectified.apply(self.a(-x) * 1))


@model
class WithoutGradientsForGood(Base):
    """Part of it runs in inference mode, whose tensors no backward pass may keep."""

    @torch.inference_mode()
    def target(self, x: Tensor) -> Tensor:
        return F.gelu(self.act(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)) + self.target(x).clone())


@model
class NormsWithoutGradients(Base):
    """A teacher's norms run in inference mode, before the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = self.act(self.norm(self.a(x)))
        return self.b(self.act(self.norm(self.a(x))) + target.clone())


@model
class SparseNeighbours(Base):
    """A graph network, whose neighbours are sparse: a tensor that has no memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = torch.eye(4).roll(1, 0).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(torch.sparse.mm(self.neighbours, self.a(x)))
        return self.b(F.gelu(self.neighbours @ h))


@model
class SavedTensorHooks(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            h = F.relu(self.a(x))
        return self.b(self.act(h))


@model
class MultiplyCalledTorchFunctionSubclass(Base):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x) @ self.w)) + F.relu(self.w).sum()


# -- memory


@model
class InputOverwrittenAfterwards(Base):
    """The activation's input is overwritten behind it: ReLU's gradient needs its output alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + 0.0
        y = F.relu(h)
        h.zero_()
        return self.b(y) + h.sum()


@model
class ImageInputOverwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + 0.0
        y = F.relu(h)
        h.mul_(2)
        return self.b(y.mean((2, 3))) + h.mean()


@model
class SliceAssigned(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1.0
        h[:, :4] = F.relu(h[:, :4])
        return self.b(self.act(h) + 0)


@model
class DataOverwritten(Base):
    """`.data` moves no version counter."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.a(x))
        h.data.mul_(0.5)
        return self.b(h)


@model
class OutputWrittenInto(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.size(0), 8)
        y[:, ::2] = F.relu(self.a(x))[:, ::2]
        y[:, 1::2] += self.act(self.a(-x))[:, 1::2]
        return self.b(y)


@model
class UnsafeViews(nn.Module):
    """ReLU in place on each part of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1.0
        F.relu_(h[:, :4])
        return self.b(h.mean((2, 3)))


@model
class ExpandedActivation(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x).mean(0, keepdim=True).expand(x.size(0), -1))
        return self.b(self.act(self.a(x)) + h)


@model
class ActivationKept(Base):
    """Keeps its last activation, as feature extractors do, and uses it in the next pass."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        before, self.last = self.last, h.detach()
        return self.b(h if before is None else h + 0.1 * before)


@model
class ReturnsItsActivation(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.act(self.a(x))
        return [self.b(h), h, h[:2]]


IMAGE_MODELS = ("ImageInputOverwritten", "UnsafeViews")


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_the_plain_model(name: str, route: Any) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]()
    torch.manual_seed(0)
    observed = MODELS[name]()
    x = IMAGES if name in IMAGE_MODELS else X
    if name == "an_activation_alone":
        x = X.clone().requires_grad_()
    taps = moda.observe(observed, route=route)
    for seed in (0, 1):
        wanted = one_pass(plain, ((x,), {}), seed)
        assert_same_pass(one_pass(observed, ((x,), {}), seed, lambda: check_loss(taps)), wanted)
    taps.remove()
    assert Trace(observed) == Trace(plain)


def check_loss(taps: Any) -> None:
    if not taps.names:  # what threads made is not known
        assert taps.skipped
        return
    activations = taps.activations()
    assert all(activation.size(0) == 4 for activation in activations)
    assert torch.isfinite(ModularLoss()(activations, LABELS))


@pytest.mark.parametrize("inputs", [(), (3,), ("words",), (None,)])
def test_a_model_without_tensors_for_inputs(inputs: Any) -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.b = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

        def forward(self, *_: Any) -> Tensor:
            return self.b(F.relu(self.z))

    made = Generator()
    wanted = made(*inputs)
    with moda.observe(made) as taps:
        assert torch.equal(made(*inputs), wanted)
        assert not taps.names
        with pytest.raises(RuntimeError, match="relu"):
            taps.activations()


def test_a_scripted_model_is_refused_or_run() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    wanted = scripted(X)
    try:
        taps = moda.observe(scripted)
    except (TypeError, ValueError) as error:
        assert "model" in str(error)  # noqa: PT017
        return
    assert torch.equal(scripted(X), wanted)
    taps.remove()


def test_two_models_that_share_an_activation() -> None:
    """As those of transformers do, which keeps one object of GELU for all."""
    act = nn.GELU()
    models = [nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 3)) for _ in range(2)]
    try:
        handles = [moda.observe(each) for each in models]
    except ValueError as error:
        assert "observed already" in str(error)  # noqa: PT017
        return
    for each, taps in zip(models, handles, strict=True):
        wanted = act(each[0](X))
        taps.clear()
        each(X)
        assert torch.equal(taps.activations()[0], wanted)
