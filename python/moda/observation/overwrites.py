"""What may be overwritten: not the record of a tap by the model, and by a tap only what nobody else sees.

A model may change an activation in place after its tap has seen it (`x += y`, `nn.Dropout(inplace=True)`). Such
a value is cloned first and the clone takes its place from there on. Where the model goes on to use the
overwritten memory by another name (a view made before), no clone can stand in for it: that is refused.

Later uses of an overwritten value become uses of what overwrote it: the same tensor, but now the graph says so, and
who rewrites it (dead code elimination, composition) cannot overlook the change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn.modules.module import _global_forward_hooks

from moda.observation.calls import has_hooks, is_inplace, may_view, module_of, overwritten, source_of, subject
from moda.observation.tracing import refusal

# Modules whose output is a new tensor whatever the input. Exact classes: a subclass may do anything.
_MAKERS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)


def protect(graph: fx.Graph, modules: nn.Module, is_record: Callable[[fx.Node], bool]) -> None:
    """Clone before it is overwritten whatever shares memory with the output of a node that `is_record`."""
    memory: dict[fx.Node, fx.Node] = {}  # node -> the first node whose memory it may share
    recorded: set[fx.Node] = set()
    for node in list(graph.nodes):
        target = overwritten(node) if is_inplace(node, modules) else None
        if target is not None and memory[target] in recorded:
            target = _overwrite_a_clone(node, target, memory)
        if target is not None and node.target is not operator.setitem:  # which gives nothing back
            for user in users_after(target, node):
                user.replace_input_with(target, node)
        shared = target or (subject(node) if may_view(node, modules) else None)
        memory[node] = memory[shared] if shared is not None else node
        if is_record(node):
            recorded.add(memory[node])


def _overwrite_a_clone(node: fx.Node, value: fx.Node, memory: dict[fx.Node, fx.Node]) -> fx.Node:
    others = [other for other in memory if other is not value and memory[other] is memory[value]]
    for user in (user for other in others for user in other.users if node < user):
        raise refusal(
            f"an activation is overwritten in place here, and its memory is used again at {source_of(user)}",
            source_of(node),
        )
    with node.graph.inserting_before(node):
        clone = node.graph.call_method("clone", (value,))
    clone.meta = dict(node.meta)
    memory[clone] = clone
    for user in [node, *users_after(value, node)]:
        user.replace_input_with(value, clone)
    return clone


def users_after(value: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Users of `value` that run after `node`."""
    return [user for user in value.users if node < user]


def is_spare(value: fx.Node, user: fx.Node, modules: nn.Module) -> bool:
    """Whether `user` may overwrite `value`: newly made, seen by no hook, and used by nobody else."""
    if set(value.users) != {user} or is_inplace(value, modules):
        return False
    if value.op == "call_function":
        return value.target in (operator.add, torch.add)
    module = module_of(value, modules)
    if module is None or type(module) not in _MAKERS or "forward" in vars(module):  # in the place of the class's
        return False
    return not (has_hooks(module) or _global_forward_hooks)
