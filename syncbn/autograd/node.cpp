// The extension module of node.py: batch norm with the kernels of Triton, without Python in the
// way.
#include <torch/csrc/utils/pybind.h>

#include "cpp/function.h"

namespace syncbn {
namespace {

// Positions in Call of call.py, and in Running of kernels/transform.py.
enum CallField { EPS, RELU, RUNNING, GROUP };
enum RunningField { MEAN, VAR, TRACKED, MOMENTUM };

PyObject* field(PyObject* tuple, int i) { return PyTuple_GET_ITEM(tuple, i); }

double number(PyObject* object) {
  const double found = PyFloat_AsDouble(object);
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// Put what an object is, a plain tensor or nothing; return whether it is.
bool put(PyObject* object, Tensor& to) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  to = THPVariable_Unpack(object);
  return is_plain(to);
}

// Put the averages of Running; return whether kernels can move them.
bool put_running(PyObject* running, Given& to) {
  if (running == Py_None) return true;
  PyObject* momentum = field(running, MOMENTUM);
  // A cumulative average takes a launch more.
  if (momentum == Py_None) return false;
  to.momentum = number(momentum);
  return put(field(running, MEAN), to.mean) && put(field(running, VAR), to.var) &&
         put(field(running, TRACKED), to.tracked);
}

// Return what a pass is given, if all of it is plain.
std::optional<Given> read(py::handle x, py::handle weight, py::handle bias, py::handle residual,
                          py::handle call) {
  Given given;
  given.eps = number(field(call.ptr(), EPS));
  given.relu = field(call.ptr(), RELU) == Py_True;
  given.is_alone = field(call.ptr(), GROUP) == Py_None;
  if (put(x.ptr(), given.x) && put(weight.ptr(), given.weight) && put(bias.ptr(), given.bias) &&
      put(residual.ptr(), given.residual) && put_running(field(call.ptr(), RUNNING), given))
    return given;
  return std::nullopt;
}

// Return whether plans are made for such tensors, of more than a value a channel.
bool is_served(const Given& given) {
  const auto& [x, weight, bias, residual, mean, var, tracked, eps, momentum, relu, is_alone] =
      given;
  // torch.jit sees what is called, and launches are not.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer)) return false;
  if (x.numel() <= x.size(1) || !is_dense(x)) return false;
  if (residual.defined() && residual.strides() != x.strides()) return false;
  if (tracked.defined() && (tracked.scalar_type() != at::kLong || tracked.device() != x.device()))
    return false;
  return are_dense_numbers(weight) && are_dense_numbers(bias) && are_dense_numbers(mean) &&
         are_dense_numbers(var);
}

std::optional<Tensor> maybe(const Tensor& t) {
  return t.defined() ? std::make_optional(t) : std::nullopt;
}

at::ScalarType dtype_of(const Tensor& t) {
  return t.defined() ? t.scalar_type() : at::ScalarType::Undefined;
}

class Plans {
 public:
  Plans(py::object steps, Current current, size_t least_bytes, size_t most)
      : python_(std::make_shared<const Python>(Python{std::move(steps), least_bytes})),
        current_(std::make_shared<const Current>(std::move(current))),
        most_(most) {}

  // Return what batch norm makes of x; None for tensors that it is not for.
  py::object normalize(py::handle x, py::handle weight, py::handle bias, py::handle residual,
                       py::handle call) {
    const auto given = read(x, weight, bias, residual, call);
    if (!given || !is_served(*given)) return py::none();
    Key key(*given);
    const auto known = plans_.find(key);
    const std::shared_ptr<Plan> plan =
        known != plans_.end() ? known->second
                              : add(std::move(key), *given,
                                    python_->steps.attr("plan")(x, weight, bias, residual, call));
    const Computed found = compute(*given, *plan, *python_, call);
    const Tensor y = SyncBatchNorm::apply(
        given->x, maybe(given->weight), maybe(given->bias), maybe(given->residual), found,
        Context{plan, python_, py::reinterpret_borrow<py::object>(call)});
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
  }

 private:
  // Keep a plan: launches of the forward pass, bytes of the gate, view.
  std::shared_ptr<Plan> add(Key key, const Given& given, const py::tuple& told) {
    const Tensor& x = given.x;
    Plan plan{.dtype = x.scalar_type(),
              .sizes = x.sizes().vec(),
              .strides = x.strides().vec(),
              .of_weight = dtype_of(given.weight),
              .of_bias = dtype_of(given.bias),
              .is_alone = given.is_alone,
              .gate_bytes = py::cast<int64_t>(told[1]),
              .view = told[2],
              .current = current_,
              .forward = make_launches(told[0], current_),
              .backward = {}};
    if (plans_.size() >= most_) plans_.clear();
    // Another thread may have been faster.
    return plans_.try_emplace(std::move(key), std::make_shared<Plan>(std::move(plan)))
        .first->second;
  }

  std::shared_ptr<const Python> python_;
  std::shared_ptr<const Current> current_;
  size_t most_;
  std::unordered_map<Key, std::shared_ptr<Plan>, Key::Hash> plans_;
};

}  // namespace
}  // namespace syncbn

PYBIND11_MODULE(node, module) {
  using syncbn::Plans;
  py::class_<Plans>(module, "Plans", py::module_local())
      .def(py::init([](py::object steps, py::object device, py::object stream,
                       py::object is_capturing, size_t least_bytes, size_t most) {
        return Plans(steps, {device, stream, is_capturing}, least_bytes, most);
      }))
      .def("normalize", torch::wrap_pybind_function(&Plans::normalize));
}
