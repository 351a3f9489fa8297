// The launches of a pass: Launch of kernels/triton_launch.py, without Python where it keeps them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace syncbn {

using at::Tensor;
// In the order of a pass; undefined where there is none.
using Tensors = std::initializer_list<const Tensor*>;
using Floats = std::initializer_list<double>;

// Functions of torch: the current device, its current stream, and whether that captures a graph.
// None, where kernels are interpreted.
struct Current {
  py::object device, stream, is_capturing;

  // Return the stream for a tensor, if launches may be those that are kept for it.
  std::optional<int64_t> stream_for(const Tensor& x) const {
    if (device.is_none()) return std::nullopt;
    // As torch.device has it.
    const py::object index = x.is_cpu() ? py::object(py::none()) : py::int_(x.get_device());
    if (!device().equal(index) || py::cast<bool>(is_capturing())) return std::nullopt;
    return py::cast<int64_t>(stream(index));
  }
};

// Calls of kernels/triton_driver.py, which own all of this.
class Calls {
 public:
  explicit Calls(py::object owner) : owner_(std::move(owner)) {
    py::object lock;
    uintptr_t launch, arguments;
    std::tie(launch, arguments, kernels_, floats_, lock) = py::cast<Parts>(owner_.attr("parts"));
    launch_ = reinterpret_cast<Launch>(launch);
    arguments_ = reinterpret_cast<char*>(arguments);
    acquire_ = lock.attr("acquire");
    release_ = lock.attr("release");
  }

  // Launch; return whether all of it has been.
  bool operator()(const std::vector<uint64_t>& addresses, Floats floats) const {
    const Held held(*this);
    // CUDA's queue may be full, and what empties it may need Python.
    const py::gil_scoped_release released;
    std::memcpy(arguments_, addresses.data(), addresses.size() * SLOT);
    char* next = arguments_ + addresses.size() * SLOT;
    for (size_t i = 0; i < floats_.size(); ++i, next += SLOT)
      write(next, floats_[i], floats.begin()[i]);
    for (const auto& [config, function, arguments] : kernels_) {
      const int error =
          launch_(reinterpret_cast<const void*>(config), reinterpret_cast<void*>(function),
                  reinterpret_cast<void**>(arguments), nullptr);
      if (error != 0) return false;
    }
    return true;
  }

 private:
  // Bytes of an argument.
  static constexpr size_t SLOT = 8;
  // cuLaunchKernelEx: configuration, function, addresses of arguments, nothing.
  using Launch = int (*)(const void*, void*, void**, void**);
  using Kernel = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
  using Parts = std::tuple<uintptr_t, uintptr_t, std::vector<Kernel>, std::string, py::object>;

  struct Held {
    explicit Held(const Calls& calls) : release(calls.release_) { calls.acquire_(); }
    ~Held() { Py_XDECREF(PyObject_CallNoArgs(release.ptr())); }
    const py::object& release;
  };

  static void write(char* to, char kind, double value) {
    if (kind == 'f') {
      const auto rounded = static_cast<float>(value);
      std::memcpy(to, &rounded, sizeof rounded);
    } else {
      std::memcpy(to, &value, sizeof value);
    }
  }

  py::object owner_, acquire_, release_;
  std::vector<Kernel> kernels_;
  std::string floats_;
  Launch launch_;
  char* arguments_;
};

// Whoever makes or calls these holds the GIL.
class Launches {
 public:
  Launches(py::object launch, std::shared_ptr<const Current> current)
      : launch_(std::move(launch)), current_(std::move(current)) {}

  // Launch on the current stream. The first of the tensors is on its device.
  void operator()(Tensors tensors, Floats floats = {}) {
    if (!by_calls(tensors, floats)) by_python(tensors, floats);
  }

 private:
  // Of addresses that kept calls are for, and streams that are kept: _ALIGNMENT and _KEPT there.
  static constexpr uint64_t ALIGNMENT = 16;
  static constexpr size_t MOST = 128;

  bool by_calls(Tensors tensors, Floats floats) {
    const auto stream = current_->stream_for(**tensors.begin());
    if (!stream) return false;
    std::vector<uint64_t> addresses;
    addresses.reserve(tensors.size());
    uint64_t all = 0;
    for (const Tensor* t : tensors) {
      if (!t->defined()) continue;
      addresses.push_back(reinterpret_cast<uint64_t>(t->data_ptr()));
      all |= addresses.back();
    }
    if (all % ALIGNMENT != 0) return false;
    // Another thread may come while this one launches.
    const std::shared_ptr<const Calls> calls = calls_on(*stream);
    return calls && (*calls)(addresses, floats);
  }

  std::shared_ptr<const Calls> calls_on(int64_t stream) {
    const auto found = calls_.find(stream);
    if (found != calls_.end()) return found->second;
    py::object kept = launch_.attr("kept")();
    if (kept.is_none()) return nullptr;
    if (calls_.size() >= MOST) calls_.clear();
    return calls_[stream] = std::make_shared<const Calls>(std::move(kept));
  }

  // It says what is wrong, too, where CUDA has refused.
  void by_python(Tensors tensors, Floats floats) const {
    py::list given, numbers;
    for (const Tensor* t : tensors) {
      if (t->defined()) {
        given.append(py::cast(*t));
      } else {
        given.append(py::none());
      }
    }
    for (const double number : floats) numbers.append(number);
    launch_(py::tuple(given), py::tuple(numbers));
  }

  py::object launch_;
  std::shared_ptr<const Current> current_;
  std::unordered_map<int64_t, std::shared_ptr<const Calls>> calls_;
};

}  // namespace syncbn
