// The module moda_kernels._autograd: ReLU with pooling as a node of PyTorch's autograd in C++. A node in Python costs several times
// what a small kernel does. Alone in this project it includes PyTorch's headers, and so it runs beside the PyTorch only that it was
// built with; moda_kernels/_native_calls.py looks, and moda_kernels/native.py does the same in Python.
//
// Only the plainest case is here: dense tensors on the CPU, with nobody looking on. Everything else is None, or is asked of Python.
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <utility>

#include "build_info.h"
#include "cpu/kernels.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const moda::CpuKernels* const* kernels = nullptr;  // where moda_kernels._native keeps its choice
PyObject* gradient_in_python = nullptr;            // a function of (y, dy, dpooled)
PyObject* pooled_mark = nullptr;                   // the attribute that pooled rows have

c10::DispatchKeySet plain_tensor;  // keys of a tensor of the CPU without a peculiarity

// No dispatch mode, function transform or tracer is at work.
bool nobody_looks_on() { return c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set; }

// Has memory of its own, in which its numbers are: it is neither fake, wrapped, negated, sparse, made in inference mode nor freed.
bool is_plain(const Tensor& x) { return x.key_set() == plain_tensor && x.numel() > 0 && x.const_data_ptr() != nullptr; }

std::optional<moda::Dtype> dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return moda::Dtype::kFloat32;
    case at::kDouble: return moda::Dtype::kFloat64;
    case at::kHalf: return moda::Dtype::kFloat16;
    case at::kBFloat16: return moda::Dtype::kBfloat16;
    default: return std::nullopt;
  }
}

std::optional<moda::Layout> layout_of(const Tensor& x) {
  if (x.is_contiguous()) return moda::Layout::kPositionsLast;
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) return moda::Layout::kNeuronsLast;
  return std::nullopt;
}

at::ScalarType accumulation(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// For tensors that passed `is_plain` and have a dtype and a layout.
moda::Layer layer_of(const Tensor& x, const Tensor& rows, const Tensor& out) {
  const std::int64_t samples = x.size(0), neurons = x.size(1);
  void* written = out.data_ptr();  // first: this moves the memory of a lazy copy, which `x` may be
  return {x.const_data_ptr(), *dtype_of(x),    *layout_of(x), samples, neurons, x.numel() / (samples * neurons),
          rows.data_ptr(),    written};
}

Tensor memory_like(const Tensor& x) { return Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type())); }

Tensor memory_of_rows(const Tensor& x) { return Tensor(at::detail::empty_cpu({x.size(0), x.size(1)}, accumulation(x))); }

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

Tensor gradient_of_python(const Tensor& y, const Tensor& dy, const Tensor& dpooled) {
  pybind11::gil_scoped_acquire acquire;
  const auto wrapped = [](const Tensor& x) { return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(x)); };
  const auto result = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallFunctionObjArgs(
      gradient_in_python, wrapped(y).ptr(), wrapped(dy).ptr(), wrapped(dpooled).ptr(), nullptr));
  if (!result) throw_python_error();
  return THPVariable_Unpack(result.ptr());
}

struct ReluPool : torch::autograd::Function<ReluPool> {
  static variable_list forward(AutogradContext* context, const Tensor& x, bool inplace) {
    context->set_materialize_grads(false);
    const Tensor y = inplace ? x : memory_like(x);
    const Tensor pooled = memory_of_rows(x);
    {
      pybind11::gil_scoped_release release;
      (*kernels)->relu_pool_forward(layer_of(x, pooled, y), at::get_num_threads());
    }
    if (inplace) context->mark_dirty({x});
    context->save_for_backward({y});
    return {y, pooled};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor y = context->get_saved_variables()[0];
    return {gradient(y, upstream[0], upstream[1]), Tensor()};
  }

 private:
  static Tensor gradient(const Tensor& y, const Tensor& dy, const Tensor& dpooled) {
    if (!dy.defined() && !dpooled.defined()) return {};
    const bool computable = !at::GradMode::is_enabled() && nobody_looks_on() && is_plain(y) && layout_of(y) &&
                            (!dy.defined() || (is_plain(dy) && dy.scalar_type() == y.scalar_type() && dy.strides() == y.strides())) &&
                            (!dpooled.defined() || (is_plain(dpooled) && dpooled.scalar_type() == accumulation(y)));
    if (!computable) return gradient_of_python(y, dy, dpooled);
    const Tensor dx = memory_like(y);
    const Tensor above = dy.defined() ? dy : at::zeros_like(y);
    const Tensor rows = dpooled.defined() ? dpooled.contiguous() : memory_of_rows(y).zero_();
    (*kernels)->relu_pool_backward(layer_of(y, rows, dx), above.const_data_ptr(), at::get_num_threads());
    return dx;
  }
};

bool takes(const Tensor& x, bool inplace) {
  if (!nobody_looks_on() || !is_plain(x) || x.dim() < 3 || !dtype_of(x) || !layout_of(x)) return false;
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) return false;
  return !(inplace && (x.is_view() || (x.is_leaf() && x.requires_grad())));  // autograd may forbid that, or be told first
}

constexpr char kReluPoolDoc[] =
    "relu_pool(x, inplace, dims=0) -> (relu(x), pooled activation) as moda_kernels.relu_pool gives them, or None where x or the\n"
    "moment is not plain. With `dims`, x has to have so many axes, and gradients have to be enabled.";

PyObject* relu_pool(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 2 || count > 3) {
    PyErr_SetString(PyExc_TypeError, "relu_pool: expected (x, inplace) or (x, inplace, dims)");
    return nullptr;
  }
  if (kernels == nullptr || !THPVariable_CheckExact(arguments[0])) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(arguments[0]);
  const bool inplace = arguments[1] == Py_True;
  if (count == 3 && (x.dim() != PyLong_AsLong(arguments[2]) || !at::GradMode::is_enabled())) Py_RETURN_NONE;
  if (!takes(x, inplace)) Py_RETURN_NONE;
  variable_list results = ReluPool::apply(x, inplace);
  const auto y = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(results[0])));
  const auto pooled = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(results[1])));
  if (PyObject_SetAttr(pooled.ptr(), pooled_mark, Py_True) < 0) return nullptr;
  return PyTuple_Pack(2, y.ptr(), pooled.ptr());
  END_HANDLE_TH_ERRORS
}

PyObject* use(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* capsule = nullptr;
  PyObject* gradient = nullptr;
  PyObject* mark = nullptr;
  if (!PyArg_ParseTuple(arguments, "OOU", &capsule, &gradient, &mark)) return nullptr;
  void* found = PyCapsule_GetPointer(capsule, MODA_SOURCE_DIGEST);
  if (found == nullptr) return nullptr;
  const c10::InferenceMode guard(false);
  plain_tensor = at::detail::empty_cpu({0}, at::kFloat).key_set();
  kernels = static_cast<const moda::CpuKernels* const*>(found);
  Py_INCREF(gradient);
  Py_XSETREF(gradient_in_python, gradient);
  Py_INCREF(mark);
  Py_XSETREF(pooled_mark, mark);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    // A function pointer of another type, as CPython's own modules cast it.
    {"relu_pool", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(relu_pool)), METH_FASTCALL, kReluPoolDoc},
    {"use", use, METH_VARARGS, "use(kernels, gradient, mark): what relu_pool runs on, a capsule of moda_kernels._native; what it asks; and an attribute\n"
     "that pooled rows get"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_autograd", "ReLU with pooling as a node of autograd; called through moda_kernels.native only.", -1,
    functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Calls nothing of PyTorch, so that it may run beside another one, and tell for which it was built.
PyMODINIT_FUNC PyInit__autograd() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "torch_version", MODA_TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "source_digest", MODA_SOURCE_DIGEST) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
