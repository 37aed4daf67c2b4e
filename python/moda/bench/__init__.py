"""How fast it is on this machine: the suites behind `moda bench`.

The suites live in the package and not in the repository's `benchmarks/` folder, so that a user of an installed wheel
can measure with one command. `benchmarks/` holds what only the repository needs: the same cases for pytest-benchmark,
committed results and the renderer of docs/benchmarks.md.

A *case* is one question (how long do the losses take at the shapes of VGG16?), its *contenders* are the answers that
are compared (the published formulas, PyTorch, our kernels). For every case the results of each contender are checked
first, and one that is wrong is not timed; the others are timed in turn, A B C A B C, so that whatever else the machine
does hits all of them alike, and ratios are taken round by round.
"""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
