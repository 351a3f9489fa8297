// Launches of kernels that have been compiled, as kernels/triton_driver.py keeps them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

namespace syncbn {

using at::Tensor;

// Those of a pass, in the order of FORWARD or BACKWARD of kernels/triton_passes.py.
constexpr size_t TENSORS = 11;
using Tensors = std::array<const Tensor*, TENSORS>;

// cuLaunchKernelEx: configuration, function, addresses of arguments, nothing.
using Launch = int (*)(const void*, void*, void**, void**);

// The kernels of a pass, one after the other. Whoever calls this holds the GIL.
class Launches {
 public:
  // Addresses of the function that launches, of the memory that it reads arguments from, and of
  // its own arguments for each kernel; a letter of Python's struct for each float that follows the
  // tensors in that memory; the lock for this memory; and what all of it belongs to.
  using Kernel = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
  Launches(uintptr_t launch, uintptr_t arguments, std::vector<Kernel> kernels, std::string floats,
           py::object lock, py::object owner)
      : launch_(reinterpret_cast<Launch>(launch)),
        arguments_(reinterpret_cast<char*>(arguments)),
        kernels_(std::move(kernels)),
        floats_(std::move(floats)),
        acquire_(lock.attr("acquire")),
        release_(lock.attr("release")),
        owner_(std::move(owner)) {}

  // Launch with the addresses of those tensors that are defined; return zero, or CUDA's error, or
  // less if their memory is not aligned.
  int operator()(const Tensors& tensors, std::array<double, 2> floats) const {
    std::array<uint64_t, TENSORS> addresses;
    size_t number = 0;
    for (const Tensor* t : tensors)
      if (t->defined()) addresses[number++] = reinterpret_cast<uint64_t>(t->const_data_ptr());
    for (size_t i = 0; i < number; ++i)
      if (addresses[i] % ALIGNMENT != 0) return NOT_ALIGNED;
    const Held held(*this);
    // CUDA's queue may be full, and what empties it may need Python.
    const py::gil_scoped_release released;
    std::memcpy(arguments_, addresses.data(), number * SLOT);
    char* next = arguments_ + number * SLOT;
    for (size_t i = 0; i < floats_.size(); ++i, next += SLOT) write(next, floats_[i], floats[i]);
    for (const auto& [config, function, arguments] : kernels_) {
      const int error =
          launch_(reinterpret_cast<const void*>(config), reinterpret_cast<void*>(function),
                  reinterpret_cast<void**>(arguments), nullptr);
      if (error != 0) return error;
    }
    return 0;
  }

 private:
  // Bytes of an argument; and what addresses are multiples of, for which kernels were compiled.
  static constexpr size_t SLOT = 8, ALIGNMENT = 16;
  static constexpr int NOT_ALIGNED = -1;

  struct Held {
    explicit Held(const Launches& launches) : release(launches.release_) { launches.acquire_(); }
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

  Launch launch_;
  char* arguments_;
  std::vector<Kernel> kernels_;
  std::string floats_;
  py::object acquire_, release_, owner_;
};

}  // namespace syncbn
