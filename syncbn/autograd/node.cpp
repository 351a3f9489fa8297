// The extension module of node.py: batch norm in a group of one, without Python in the way.
#include <torch/csrc/utils/pybind.h>

#include "cpp/function.h"

namespace syncbn {
namespace {

// Positions in Call of call.py, and in Running of kernels/transform.py.
enum CallField { EPS, RELU, RUNNING };
enum RunningField { MEAN, VAR, TRACKED, MOMENTUM };

PyObject* field(PyObject* tuple, int i) { return PyTuple_GET_ITEM(tuple, i); }

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
  to.momentum = PyFloat_AsDouble(momentum);
  return put(field(running, MEAN), to.mean) && put(field(running, VAR), to.var) &&
         put(field(running, TRACKED), to.tracked);
}

// Return what a pass is given, if all of it is plain.
std::optional<Given> read(py::handle x, py::handle weight, py::handle bias, py::handle residual,
                          py::handle call) {
  Given given;
  given.eps = PyFloat_AsDouble(field(call.ptr(), EPS));
  given.relu = field(call.ptr(), RELU) == Py_True;
  if (put(x.ptr(), given.x) && put(weight.ptr(), given.weight) && put(bias.ptr(), given.bias) &&
      put(residual.ptr(), given.residual) && put_running(field(call.ptr(), RUNNING), given))
    return given;
  return std::nullopt;
}

// Return whether plans are made for such tensors, of more than a value a channel.
bool is_served(const Given& given) {
  const auto& [x, weight, bias, residual, mean, var, tracked, eps, momentum, relu] = given;
  if (x.numel() <= x.size(1) || !is_dense(x)) return false;
  if (residual.defined() && residual.strides() != x.strides()) return false;
  if (tracked.defined() && (tracked.scalar_type() != at::kLong || tracked.device() != x.device()))
    return false;
  return is_dense_numbers(weight) && is_dense_numbers(bias) && is_dense_numbers(mean) &&
         is_dense_numbers(var);
}

std::optional<Tensor> maybe(const Tensor& t) {
  return t.defined() ? std::make_optional(t) : std::nullopt;
}

class Plans {
 public:
  Plans(Python python, size_t most)
      : python_(std::make_shared<const Python>(std::move(python))), most_(most) {}

  // Return what batch norm makes of x; None if a plan cannot serve it; False if one could.
  py::object normalize(py::handle x, py::handle weight, py::handle bias, py::handle residual,
                       py::handle call) const {
    const auto given = read(x, weight, bias, residual, call);
    if (!given || !is_served(*given)) return py::none();
    const auto stream = python_->stream_for(given->x);
    if (!stream) return py::none();
    const auto plan = plans_.find(Key(*given, *stream));
    if (plan == plans_.end()) return py::bool_(false);
    const auto found = compute(*given, *plan->second);
    if (!found) return py::none();
    auto kept =
        c10::make_intrusive<Kept>(plan->second, python_, py::reinterpret_borrow<py::object>(call));
    const Tensor y = SyncBatchNorm::apply(given->x, maybe(given->weight), maybe(given->bias),
                                          maybe(given->residual), *found, std::move(kept));
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
  }

  // Let tensors like these be served by launches from now on.
  void add(py::handle x, py::handle weight, py::handle bias, py::handle residual, py::handle call,
           std::shared_ptr<Launches> forward, int64_t gate_bytes, py::object view) {
    const auto given = read(x, weight, bias, residual, call);
    const auto stream = given ? python_->stream_for(given->x) : std::nullopt;
    if (!stream) return;
    if (plans_.size() >= most_) plans_.clear();
    const Tensor& like = given->x;
    plans_[Key(*given, *stream)] = std::make_shared<Plan>(
        Plan{*stream, like.scalar_type(), like.sizes().vec(), like.strides().vec(), gate_bytes,
             std::move(view), std::move(forward)});
  }

 private:
  std::shared_ptr<const Python> python_;
  size_t most_;
  std::unordered_map<Key, std::shared_ptr<Plan>, Key::Hash> plans_;
};

}  // namespace
}  // namespace syncbn

PYBIND11_MODULE(node, module) {
  using syncbn::Launches;
  using syncbn::Plans;
  using syncbn::Python;
  py::class_<Launches, std::shared_ptr<Launches>>(module, "Launches")
      .def(py::init<uintptr_t, uintptr_t, std::vector<Launches::Kernel>, std::string, py::object,
                    py::object>());
  py::class_<Plans>(module, "Plans")
      .def(py::init([](py::object device, py::object stream, py::object is_capturing,
                       py::object backward, size_t least_bytes, size_t most) {
        return Plans({device, stream, is_capturing, backward, least_bytes}, most);
      }))
      .def("normalize", torch::wrap_pybind_function(&Plans::normalize))
      .def("add", torch::wrap_pybind_function(&Plans::add));
}
