"""Uses an installed package as a user would: `python tests/use_package.py [FOLDER]`.

It prints whether the native kernels can run and why not, and fails where a number is wrong. With FOLDER the packages must come
from there. The tests of the build run it, and so does cibuildwheel, with nothing but the wheel installed.
"""

import pathlib
import sys

# An editable install of this environment would lend its extension to a package that has none.
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__name__", "").startswith("_Editable")]
sys.path = [entry for entry in sys.path if pathlib.Path(entry).resolve() != pathlib.Path(__file__).resolve().parent]

import torch  # noqa: E402

import moda  # noqa: E402
import moda_kernels  # noqa: E402

for package in (moda, moda_kernels):
    assert len(sys.argv) == 1 or pathlib.Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__

x = torch.rand(4, 3, 2, 2)
y, pooled = moda_kernels.relu_pool(x)
torch.testing.assert_close(pooled, x.mean((2, 3)))
labels = torch.tensor([0, 0, 1, 1])
published = moda_kernels.modular_losses([x], labels, backend="reference")
torch.testing.assert_close(tuple(moda_kernels.modular_losses([x], labels)), tuple(published))
counter = moda_kernels.FiringCounter(2)
counter.update([x], labels)
assert counter.counts[0].tolist() == [[2, 2, 2], [2, 2, 2]]
native = moda_kernels.backends()["native"]
print(bool(native), native)
