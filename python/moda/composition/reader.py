"""Reads a captured graph: finds the rule of every operation, each of which is called with ATen's own names."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx

from moda.composition.functional import writes
from moda.composition.movers import Concat, Labels, Move, Run, Stack, argument, packet_of, read_move
from moda.composition.owners import Bilinear, Contraction, Convolution, Lookup, Recurrent
from moda.composition.parameters import parameter_rule
from moda.composition.products import Attention, Product
from moda.composition.rules import Elementwise, Rule, Tap, Unary, Whole, WholeWeight, rank_of
from moda.composition.spatial import Along, GroupNorm, Norm
from moda.composition.values import TAP, Shape, is_free, is_tensor, shape_of, size_of

__all__ = ["Reader"]

aten = torch.ops.aten

_POINTWISE = frozenset((
    "alias", "celu", "clip", "clone", "contiguous", "copy", "detach", "dropout", "alpha_dropout", "elu", "fill",
    "feature_dropout", "feature_alpha_dropout", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "lift_fresh_copy", "lift_fresh", "log_sigmoid", "logsigmoid", "masked_fill", "mish", "prelu", "rrelu", "relu6",
    "selu", "silu", "softplus", "softshrink", "square", "tanhshrink", "threshold", "to", "_to_copy", "type_as", "where",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "bernoulli", "nan_to_num", "float",
    "half", "double", "true_divide", "floor_divide", "multiply", "divide", "subtract", "absolute", "negative",
    "result_type", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "rsub", "native_dropout", "softsign",
    "_prelu_kernel", "conj", "resolve_conj", "resolve_neg",
))  # fmt: skip
_PRODUCTS = frozenset(("mul", "multiply"))
_QUOTIENTS = frozenset(("div", "divide", "true_divide"))
_MOVERS = frozenset((
    "_reshape_alias", "_unsafe_view", "as_strided", "broadcast_to", "channel_shuffle", "chunk", "constant_pad_nd",
    "diagonal", "expand", "flatten", "flip", "index_select", "movedim", "moveaxis", "narrow", "native_channel_shuffle",
    "numpy_T", "matrix_H", "mT", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave",
    "reshape", "roll", "rot90", "select", "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes",
    "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold",
    "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "im2col", "adjoint", "hsplit", "vsplit", "dsplit", "index",
))  # fmt: skip
_SIZES = {
    "view": ("size",), "reshape": ("shape",), "_unsafe_view": ("size",), "expand": ("size",), "unflatten": ("sizes",),
    "broadcast_to": ("size",),
}  # fmt: skip
_SPATIAL = {
    "max_pool": True, "avg_pool": True, "adaptive_avg_pool": True, "adaptive_max_pool": True, "upsample": True,
    "_upsample": True, "lp_pool": True, "fractional_max_pool": True, "reflection_pad": True, "replication_pad": True,
    "pad": True, "constant_pad_nd": True, "grid_sampler": True, "max_unpool": True, "_adaptive_avg_pool": True,
}  # fmt: skip
_REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "linalg_vector_norm", "logsumexp", "prod",
    "nansum", "nanmean", "median", "argmax", "argmin", "any", "all", "std_mean", "var_mean", "count_nonzero",
))  # fmt: skip
_MIXERS = frozenset((
    "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "glu", "sort", "topk", "flip",
    "logcumsumexp", "renorm", "softmin",
))  # fmt: skip


class Reader:
    """The rules of a graph.

    Args:
        graph: as `moda.composition.capture` gives it.
        tensors: the model's parameters, buffers and constants by name: those that a lookup of constants needs are read.
        moves: where readers of graphs of one model note what operations that move data did: the next one knows it.

    Attributes:
        rules: per node that is called or a leaf.
        activations: the nodes that depend on the input.
        sizes: the nodes that compute sizes.
    """

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], moves: dict[Any, Labels] | None = None) -> None:
        self.graph = graph
        self.tensors = tensors
        self.rules: dict[fx.Node, Rule] = {}
        self.activations: set[fx.Node] = set()
        self.sizes: set[fx.Node] = set()
        self._moves = {} if moves is None else moves
        self.written = _written_leaves(graph)
        self._begun = _beginnings(graph)
        for node in graph.nodes:
            if node.op != "output":
                self._read(node)

    @cached_property
    def lean(self) -> Reader:
        """The same, but no filter is kept that nothing comes in to, as the published composition does."""
        other = copy(self)
        other.rules = {
            node: replace(rule, neurons=False) if isinstance(rule, Convolution) else rule
            for node, rule in self.rules.items()
        }
        return other

    def units(self, node: fx.Node) -> Shape:
        """Of an activation."""
        return self.rules[node].units

    def _read(self, node: fx.Node) -> None:
        if node.op == "placeholder" or node in self._begun:
            self.activations.add(node)
            self.rules[node] = Whole(node, (1,) * rank_of(node))
        elif node.op == "get_attr":
            self.rules[node] = WholeWeight(node)
        elif not isinstance(node.meta.get("val"), Tensor | tuple | list):
            self.sizes.add(node)
        elif any(source in self.activations for source in node.all_input_nodes):
            self.activations.add(node)
            rule = self._activation(node)
            self.rules[node] = rule
        else:
            self.rules[node] = self._weight(node)

    # -- parameters -----------------------------------------------------------------------------------------

    def _weight(self, node: fx.Node) -> Rule:
        """What is computed of parameters alone."""
        if any(source in self.written for source in _tensor_inputs(node)):
            return WholeWeight(node)
        return parameter_rule(node, _is_pointwise(node))

    # -- activations ----------------------------------------------------------------------------------------

    def _activation(self, node: fx.Node) -> Rule:
        if node.target is TAP:
            return self._tap(node)
        if node.target is operator.getitem:
            return self._part(node)
        packet = packet_of(node)
        rule = None
        if not writes(node):
            rule = self._owner(node, packet) or self._norm(node, packet) or self._product(node, packet)
            rule = rule or self._elementwise(node, packet) or self._move(node, packet) or self._along(node, packet)
        if rule is not None:
            return rule
        units = (1,) * rank_of(node) if is_tensor(node) else ()
        return Whole(node, units, why=f"{packet or node.target} needs all neurons, or is not known to do without some")

    def _tap(self, node: fx.Node) -> Rule:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim = int(argument(node, "neuron_dim")) % rank_of(source)
        units = list(self.units(source))
        units[dim] = shape_of(source)[dim]
        return Tap(node, tuple(units), keeps_zero=True, index=int(argument(node, "index")), dim=dim)

    def _part(self, node: fx.Node) -> Rule:
        """One of several results."""
        call, place = node.args
        assert isinstance(call, fx.Node)
        assert isinstance(place, int)
        rule = self.rules[call]
        if isinstance(rule, Move):
            sources = _tensor_inputs(call)
            run = _runner(call, self, pick=place)
            found = read_move(node, run, sources, {s: self.units(s) for s in sources}, through=call, known=self._moves)
            if found is not None:
                return found
        units = rule.units if len(rule.units) == rank_of(node) else (1,) * rank_of(node)
        if rule.units and units != rule.units and isinstance(rule, Lookup):
            return Whole(node, units)
        if units == rule.units:
            return Unary(node, units, keeps_zero=True)
        return Whole(node, units)

    # -- what owns neurons

    def _owner(self, node: fx.Node, packet: str) -> Rule | None:
        if packet.startswith("conv") or packet == "_convolution":
            return self._convolution(node, packet)
        if packet in ("linear", "matmul", "mm", "addmm", "bmm", "mv", "baddbmm"):
            return self._contraction(node, packet)
        if packet in ("embedding", "embedding_bag", "_embedding_bag"):
            return self._lookup(node)
        if packet in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return self._recurrent(node)
        if packet == "bilinear":
            return self._bilinear(node)
        return None

    def _convolution(self, node: fx.Node, packet: str) -> Rule | None:
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        if (
            not self._is_weight(weight)
            or (bias is not None and not self._is_weight(bias))
            or not self._is_activation(x)
        ):
            return None
        dim = rank_of(x) - (rank_of(weight) - 2) - 1
        if dim < 0:
            return None
        groups = argument(node, "groups", 1)
        transposed = "transpose" in packet or bool(argument(node, "transposed", False))
        units = _only(rank_of(node), dim, shape_of(node)[dim])
        return Convolution(
            node,
            units,
            x=x,
            weight=weight,
            bias=bias,
            groups=int(groups),
            dim=dim,
            transposed=transposed,
            neurons=int(groups) == 1 or _leads_to_tap(node),
        )

    def _contraction(self, node: fx.Node, packet: str) -> Rule | None:
        if packet == "linear":
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            rows, columns = 0, 1
        elif packet == "addmm":
            bias, x, weight = node.args[:3]
            rows, columns = 1, 0
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                return None
        else:
            (x, weight), bias, rows, columns = node.args[:2], None, 1, 0
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return None
        if bias is not None and not self._is_weight(bias):
            return None
        if self._is_activation(x) and self._is_weight(weight):
            return self._right(node, x, weight, bias, rows, columns)
        if self._is_weight(x) and self._is_activation(weight) and rank_of(x) == 2 and rank_of(weight) >= 2:
            return self._left(node, x, weight, bias) if packet != "linear" else None
        return None

    def _right(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, rows: int, columns: int) -> Rule | None:
        """An activation times a parameter."""
        if rank_of(weight) == 1:
            return None
        if rank_of(weight) != 2 or rank_of(x) < 1 or (bias is not None and rank_of(bias) > 1):
            return None
        units = (*self.units(x)[:-1], shape_of(node)[-1])
        return Contraction(
            node,
            units,
            x=x,
            weight=weight,
            bias=bias,
            dim=rank_of(x) - 1,
            out_dim=len(units) - 1,
            rows=rows,
            columns=columns,
        )

    def _left(self, node: fx.Node, weight: fx.Node, x: fx.Node, bias: Any) -> Rule | None:
        """A parameter times an activation."""
        if bias is not None or rank_of(node) != rank_of(x):
            return None
        dim = rank_of(x) - 2
        units = list(self.units(x))
        units[dim] = shape_of(node)[dim]
        return Contraction(node, tuple(units), x=x, weight=weight, dim=dim, out_dim=dim, rows=0, columns=1)

    def _lookup(self, node: fx.Node) -> Rule | None:
        weight = argument(node, "weight")
        if not self._is_weight(weight) or rank_of(weight) != 2:
            return None
        value = node.meta["val"]
        first = value[0] if isinstance(value, tuple | list) else value
        rank = first.dim()
        if argument(node, "padding_idx", -1) not in (None, -1) and packet_of(node) != "embedding":
            return None
        if not is_tensor(node) and argument(node, "per_sample_weights") is not None:
            return None
        return Lookup(node, _only(rank, rank - 1, size_of(first.shape[-1])), weight=weight)

    def _recurrent(self, node: fx.Node) -> Rule | None:
        parameters = argument(node, "params")
        x = argument(node, "input")
        if parameters is None or not self._is_activation(x) or argument(node, "batch_sizes") is not None:
            return None
        biases = bool(argument(node, "has_biases"))
        step = 4 if biases else 2
        if (
            packet_of(node) == "lstm"
            and size_of(parameters[0].meta["val"].shape[0])
            and _projects(node, parameters, biases)
        ):
            step += 1
        directions = 2 if argument(node, "bidirectional") else 1
        columns = tuple(parameters[step * place] for place in range(directions))
        return Recurrent(node, (), x=x, columns=columns, why="states of recurrent layers need all neurons")

    def _bilinear(self, node: fx.Node) -> Rule | None:
        first, second, weight, bias = (argument(node, name) for name in ("input1", "input2", "weight", "bias"))
        if not self._is_activation(first) or not self._is_activation(second) or not self._is_weight(weight):
            return None
        units = _only(rank_of(node), rank_of(node) - 1, shape_of(node)[-1])
        return Bilinear(node, units, first=first, second=second, weight=weight, bias=bias)

    # -- norms

    def _norm(self, node: fx.Node, packet: str) -> Rule | None:
        sources = _tensor_inputs(node)
        vectors = sources[1:]
        if any(vector in self.activations or rank_of(vector) != 1 for vector in vectors):
            return None
        if packet in ("batch_norm", "instance_norm"):
            rank = rank_of(node)
            units = _channels_only(self.units(sources[0]), 1, shape_of(node)[1])
            updates = packet == "batch_norm" and bool(argument(node, "training"))
            updates |= packet == "instance_norm" and bool(argument(node, "use_input_stats"))
            running = argument(node, "running_mean") is not None
            return Norm(node, units, dim=1, updates=updates and running) if rank > 1 else None
        if packet == "group_norm":
            groups, units = int(argument(node, "num_groups")), _only(rank_of(node), 1, shape_of(node)[1])
            if shape_of(node)[1] % groups:
                return None
            return GroupNorm(node, units, groups=groups, why="group norm needs all neurons of a group")
        if packet in ("layer_norm", "rms_norm", "_fused_rms_norm"):
            count = len(argument(node, "normalized_shape"))
            return self._mixing(node, sources[0], range(rank_of(node) - count, rank_of(node)))
        return None

    def _mixing(self, node: fx.Node, source: fx.Node, dims: Sequence[int], keeps_zero: bool = False) -> Along:
        """Along some axes, which stay."""
        units = self.units(source)
        axes = tuple(None if dim in dims else dim for dim in range(rank_of(source)))
        why = f"{packet_of(node)} needs all neurons" if any(units[dim] > 1 for dim in dims) else ""
        kept = tuple(1 if dim in dims else unit for dim, unit in enumerate(units))
        return Along(node, kept, axes=axes, keeps_zero=keeps_zero, why=why)

    # -- products of activations

    def _product(self, node: fx.Node, packet: str) -> Rule | None:
        if packet == "scaled_dot_product_attention":
            query, key, value = (argument(node, name) for name in ("query", "key", "value"))
            if all(map(self._is_activation, (query, key, value))) and not argument(node, "enable_gqa", False):
                wide = [self.units(x) for x in (query, key, value)]
                if len({len(units) for units in wide}) == 1 and len(wide[0]) >= 3 and not any(u[-2] > 1 for u in wide):
                    heads = tuple(map(max, *(units[:-2] for units in wide)))
                    return Attention(node, (*heads, 1, wide[2][-1]), query=query, key=key, value=value)
            return None
        if packet in ("matmul", "bmm"):
            left, right = node.args[:2]
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                return None
            if not self._is_activation(left) or not self._is_activation(right):
                return None
            if min(rank_of(left), rank_of(right)) < 2 or rank_of(left) != rank_of(right):
                return None
            one, other = self.units(left), self.units(right)
            heads = tuple(map(max, one[:-2], other[:-2]))
            return Product(node, (*heads, one[-2], other[-1]), left=left, right=right)
        return None

    # -- elements

    def _elementwise(self, node: fx.Node, packet: str) -> Rule | None:
        sources = _tensor_inputs(node)
        if not _is_pointwise(node) or not is_tensor(node) or not sources:
            return None
        shape = shape_of(node)
        if any(rank_of(source) > len(shape) for source in sources):
            return None
        units = [1] * len(shape)
        for source in sources:
            if source in self.activations:
                for dim, unit in enumerate(self.units(source), len(shape) - rank_of(source)):
                    units[dim] = max(units[dim], unit)
        two = len(sources) == 2 and all(source in self.activations for source in sources)
        product, quotient = two and packet in _PRODUCTS, two and packet in _QUOTIENTS
        keeps_zero = self._keeps_zero(node, sources)
        alone = len(node.all_input_nodes) == 1 and shape_of(sources[0]) == shape and len(sources) == 1
        kind = Unary if alone else Elementwise
        divided = cast(fx.Node, node.args[0]) if quotient else None
        return kind(node, tuple(units), product=product, keeps_zero=keeps_zero, divided=divided)

    def _keeps_zero(self, node: fx.Node, sources: Sequence[fx.Node]) -> bool:
        """Whether the call gives 0 where the activations are 0, by trying."""
        if packet_of(node) in ("rand_like", "randn_like", "empty_like", "bernoulli"):
            return False
        for other in (1.7, -0.6):
            values = {}
            for source in sources:
                number = 0.0 if source in self.activations else other
                values[source] = torch.full((1,) * rank_of(source), number, dtype=source.meta["val"].dtype)
            try:
                result = _runner(node, self)(values, {})
            except (RuntimeError, ValueError, TypeError, IndexError):
                return False
            if not isinstance(result, Tensor) or bool((result != 0).any()):
                return False
        return True

    # -- movements

    def _move(self, node: fx.Node, packet: str) -> Rule | None:
        if packet in ("cat", "concat", "concatenate", "stack", "hstack"):
            return self._join(node, packet)
        if packet not in _MOVERS:
            return None
        sources = _tensor_inputs(node)
        if packet in ("index", "index_select"):
            sources = sources[:1]
        of = [source for source in sources if source in self.activations]
        others = [source for source in sources if source not in self.activations]
        if packet in ("index", "index_select") and any(map(self._is_activation, _tensor_inputs(node)[1:])):
            return self._indexed(node, packet)
        units = {source: self.units(source) for source in of}
        if packet in ("pad", "constant_pad_nd"):
            padded = len(argument(node, "pad")) // 2
            constant = packet != "pad" or argument(node, "mode", "constant") == "constant"
            if not constant or all(unit == 1 for unit in self.units(of[0])[-padded:]):
                return None  # it works along axes without neurons
        run = _runner(node, self)
        if not is_tensor(node):
            return Move(node, (), of=tuple(of), run=run)
        if packet in ("slice_scatter", "select_scatter") and len(of) + len(others) == 2:
            return read_move(node, run, of, units, others)
        return read_move(node, run, of, units, others, sizes=_SIZES.get(packet, ()), known=self._moves)

    def _indexed(self, node: fx.Node, packet: str) -> Rule | None:
        """Positions that the input chooses: along the axes that they are chosen of, everything is needed."""
        source = _tensor_inputs(node)[0]
        if source not in self.activations:
            return None
        if packet == "index_select":
            indices: list[Any] = [None] * (int(argument(node, "dim")) % rank_of(source)) + [node.args[2]]
        else:
            indices = list(argument(node, "indices"))
        before, chosen, after, new = list[int](), list[int](), list[int](), 1
        place, parted = 0, False
        for index in indices:
            if index is None:
                (after if chosen else before).append(place)
                place += 1
                continue
            parted |= bool(after)
            boolean = index.meta["val"].dtype in (torch.bool, torch.uint8)
            chosen.extend(range(place, place + (rank_of(index) if boolean else 1)))
            new = new if boolean else max(new, rank_of(index))
            place = chosen[-1] + 1
        after.extend(range(place, rank_of(source)))
        axes = (*[None] * new, *before, *after) if parted else (*before, *[None] * new, *after)
        if len(axes) != rank_of(node):
            return None
        units = self.units(source)
        why = f"{packet} needs all neurons" if any(units[dim] > 1 for dim in chosen) else ""
        kept = tuple(1 if axis is None else units[axis] for axis in axes)
        return Along(node, kept, axes=axes, keeps_zero=True, why=why)

    def _join(self, node: fx.Node, packet: str) -> Rule | None:
        parts = node.args[0]
        if not isinstance(parts, list | tuple) or not all(is_tensor(part) for part in parts) or packet == "hstack":
            return None
        rank = rank_of(node)
        dim = int(argument(node, "dim", 0)) % rank
        stacked = packet == "stack"
        units = [1] * rank
        for part in parts:
            if part not in self.activations or (not stacked and rank_of(cast(fx.Node, part)) != rank):
                continue
            own = list(self.units(part))  # type: ignore[arg-type]
            if stacked:
                own.insert(dim, 1)
            widest = [max(pair) for pair in zip(units, own, strict=True)]
            units = [*widest[:dim], units[dim], *widest[dim + 1 :]]
            if not stacked and own[dim] > 1:
                units[dim] = shape_of(node)[dim]
        if not stacked and any(rank_of(cast(fx.Node, part)) != rank for part in parts):
            return None
        if stacked and not is_free(node, dim):
            units[dim] = len(parts)
        kind = Stack if stacked else Concat
        return kind(node, tuple(units), parts=tuple(parts), dim=dim)  # type: ignore[arg-type]

    # -- along axes

    def _along(self, node: fx.Node, packet: str) -> Rule | None:
        sources = _tensor_inputs(node)
        source = sources[0]
        if source not in self.activations or any(other in self.activations for other in sources[1:]):
            return None
        if packet in _MIXERS:
            dims = argument(node, "dim", argument(node, "dims", -1))
            chosen = [dim % rank_of(source) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
            return self._same_axes(node, source, chosen)
        if packet in _REDUCTIONS:
            return self._reduction(node, packet, source)
        spatial = _spatial_dims(packet, node)
        if spatial:
            rank = rank_of(source)
            return self._same_axes(node, source, range(rank - spatial, rank))
        return None

    def _same_axes(self, node: fx.Node, source: fx.Node, dims: Sequence[int]) -> Rule | None:
        first = _first(node)
        if first is None or first.dim() != rank_of(source):
            return None
        mixed = set(dims)
        if any(dim not in mixed and size_of(size) != shape_of(source)[dim] for dim, size in enumerate(first.shape)):
            return None
        return self._mixing(node, source, list(dims), keeps_zero=self._zero_gives_zero(node, source))

    def _zero_gives_zero(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether zeros give zeros, by trying on the smallest piece."""
        units = self.units(source)
        shape = [1 if unit > 1 else size for unit, size in zip(units, shape_of(source), strict=True)]
        try:
            result = _runner(node, self)({source: torch.zeros(shape, dtype=source.meta["val"].dtype)}, {})
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        first = result[0] if isinstance(result, tuple | list) else result
        return isinstance(first, Tensor) and not bool((first != 0).any())

    def _reduction(self, node: fx.Node, packet: str, source: fx.Node) -> Rule | None:
        first, rank = _first(node), rank_of(source)
        dims = argument(node, "dim")
        if dims is None and packet in ("any", "all") and argument(node, "dims") is not None:
            dims = argument(node, "dims")
        if first is None:
            return None
        if dims is None or dims == []:
            chosen = list(range(rank))
        else:
            chosen = [int(dim) % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]
        keepdim = bool(argument(node, "keepdim", False))
        axes = [None if dim in chosen else dim for dim in range(rank) if keepdim or dim not in chosen]
        if len(axes) != first.dim():
            return None
        units = self.units(source)
        kept = tuple(1 if axis is None else units[axis] for axis in axes)
        why = f"{packet} needs all neurons" if any(units[dim] > 1 for dim in chosen) else ""
        return Along(node, kept, axes=tuple(axes), keeps_zero=self._zero_gives_zero(node, source), why=why)

    def _is_weight(self, node: Any) -> bool:
        return is_tensor(node) and node not in self.activations

    def _is_activation(self, node: Any) -> bool:
        return is_tensor(node) and node in self.activations

    def constant(self, node: fx.Node) -> Tensor | None:
        """The values of a tensor that is the same for every input and every training step; None if it is not."""
        if node in self.activations or node.op == "placeholder":
            return None
        if node.op == "get_attr":
            held = self.tensors.get(str(node.target))
            fixed = held is not None and not held.is_floating_point() and node not in self.written
            return held if fixed and held is not None and held.device.type != "meta" else None
        values = {source: self.constant(source) for source in _tensor_inputs(node)}
        if any(value is None for value in values.values()) or packet_of(node).startswith(("rand", "bernoulli")):
            return None
        try:
            result = _runner(node, self)(values, {})  # type: ignore[arg-type]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        return result if isinstance(result, Tensor) else None


def _runner(node: fx.Node, reader: Reader, pick: int | None = None) -> Run:
    """Runs the operation of a node on other tensors, sizes as with the example."""

    def value(argument: Any, values: Mapping[fx.Node, Tensor]) -> Any:
        if isinstance(argument, fx.Node):
            if argument in values:
                return values[argument]
            held = argument.meta.get("val")
            if isinstance(held, Tensor):
                constant = reader.constant(argument)
                if constant is None:
                    raise ValueError("not a constant")
                return constant.cpu()
            return held if isinstance(held, int | float | bool) else size_of(held)
        if isinstance(argument, list | tuple):
            return [value(item, values) for item in argument]
        return argument

    def run(values: Mapping[fx.Node, Tensor], changed: Mapping[str, Any]) -> Any:
        target: Any = node.target
        args = [value(item, values) for item in node.args]
        kwargs = {key: value(item, values) for key, item in node.kwargs.items() if key not in ("device", "pin_memory")}
        for name, new in changed.items():
            place = next(i for i, known in enumerate(target._schema.arguments) if known.name == name)
            if place < len(args):
                args[place] = value(new, values)
            else:
                kwargs[name] = value(new, values)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = target(*args, **kwargs)
        return result if pick is None else result[pick]

    return run


def _beginnings(graph: fx.Graph) -> set[fx.Node]:
    """Where values begin that do not depend on the input but pass a tap (a network of positions): as inputs do."""
    depends: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    begun: set[fx.Node] = set()
    pending = [n for n in graph.nodes if n.target is TAP and n not in depends]
    seen = set(pending)
    while pending:
        node = pending.pop()
        sources = [source for source in _tensor_inputs(node) if source not in depends]
        if packet_of(node) in ("linear", "matmul", "mm", "addmm") or packet_of(node).startswith("conv"):
            sources = [s for s in (argument(node, "input", node.args[0]),) if isinstance(s, fx.Node)]
        sources = [source for source in sources if packet_of(node) not in _NORMS or source is node.args[0]]
        if node.op == "get_attr" or not sources:
            begun.add(node)
        pending.extend(source for source in sources if source not in seen)
        seen.update(sources)
    return begun


_NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "prelu")


def _written_leaves(graph: fx.Graph) -> set[fx.Node]:
    """Leaves that the model writes to by itself, and views of them."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and writes(node):
            pending = [source for source in node.all_input_nodes if source.op == "get_attr"]
            pending += [s for source in node.all_input_nodes for s in _views(source)]
            written.update(pending)
    return written


def _views(node: fx.Node) -> list[fx.Node]:
    """What a chain of detached values began with."""
    chain = []
    while node.op == "call_function" and packet_of(node) in ("detach", "alias") and node.all_input_nodes:
        node = node.all_input_nodes[0]
        chain.append(node)
    return chain


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor | tuple | list)]


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return packet_of(node) in _POINTWISE or torch.Tag.pointwise in tags


def _leads_to_tap(node: fx.Node) -> bool:
    """Whether a tap follows, behind norms and functions of single elements at most."""
    for user in node.users:
        if user.target is TAP:
            return True
        alone = [source for source in _tensor_inputs(user) if source.op == "call_function"] == [node]
        passes = user.op == "call_function" and alone and (packet_of(user) in _NORMS or _is_pointwise(user))
        if passes and _leads_to_tap(user):
            return True
    return False


def _only(rank: int, dim: int, size: int) -> Shape:
    return tuple(size if place == dim else 1 for place in range(rank))


def _channels_only(units: Shape, dim: int, size: int) -> Shape:
    return tuple(size if place == dim else unit for place, unit in enumerate(units))


def _first(node: fx.Node) -> Tensor | None:
    value = node.meta["val"]
    first: Tensor | None = value[0] if isinstance(value, tuple | list) else value
    return first


def _spatial_dims(packet: str, node: fx.Node) -> int:
    """How many of the last axes an operation works along; 0 if that is not known."""
    name = packet.removeprefix("_")
    for prefix in _SPATIAL:
        if packet.startswith(prefix) or name.startswith(prefix):
            if packet in ("pad", "constant_pad_nd"):
                return len(argument(node, "pad")) // 2
            digits = [int(letter) for letter, after in pairwise(name) if letter in "123" and after == "d"]
            return digits[-1] if digits else 0
    return 0


def _projects(node: fx.Node, parameters: Sequence[fx.Node], biases: bool) -> bool:
    """Whether an LSTM has projections, a further weight a layer."""
    layers = int(argument(node, "num_layers")) * (2 if argument(node, "bidirectional") else 1)
    return len(parameters) == layers * (5 if biases else 3)
