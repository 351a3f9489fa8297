// What is launched for tensors of some dtypes and sizes, on a stream.
#pragma once

#include <c10/core/DispatchKeySet.h>

#include <memory>
#include <optional>
#include <unordered_map>

#include "launches.h"

namespace syncbn {

// What a forward pass is given. Undefined, but for x, where there is none.
struct Given {
  Tensor x, weight, bias, residual, mean, var, tracked;
  double eps = 0, momentum = 0;
  bool relu = false;
};

// Which gradients a backward pass writes besides that of x.
struct Wanted {
  static constexpr size_t KINDS = 8;
  bool weight, bias, residual;

  size_t index() const { return weight + 2 * bias + 4 * residual; }
};

// How tensors that lie as x does are normalized. The launches of the backward pass are found out
// later, by the first that needs them.
struct Plan {
  int64_t stream;
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  // Of the gate; less than zero if there is none.
  int64_t gate_bytes;
  // What kernels see in x: samples.view_of(x).
  py::object view;
  std::shared_ptr<const Launches> forward;
  std::array<std::shared_ptr<const Launches>, Wanted::KINDS> backward{};

  bool fits(const Tensor& t) const {
    return t.scalar_type() == dtype && t.sizes() == sizes && t.strides() == strides;
  }
};

// Functions of Python. Of torch: the current device, its current stream, and whether that captures.
// Of node.py: the backward pass where there is no plan for it, as a function of dy, what has been
// saved, which of the four inputs need gradients, the call, and the view of a plan. It returns the
// gradients, and launches that would have done the same, if there are any.
struct Python {
  py::object device, stream, is_capturing, backward;
  // Of an input whose gradient may take the memory of dy: ownership.py.
  size_t least_bytes;

  // Return the stream for a tensor, if launches on it may be those of a plan.
  std::optional<int64_t> stream_for(const Tensor& x) const {
    const py::object index = x.is_cpu() ? py::object(py::none()) : py::int_(x.get_device());
    if (!device().equal(index) || py::cast<bool>(is_capturing())) return std::nullopt;
    return py::cast<int64_t>(stream(index));
  }
};

// Return whether a tensor is its memory and nothing else: no view of other values, of no transform.
inline bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet others{DispatchKey::Python,
                                          DispatchKey::Negative,
                                          DispatchKey::Conjugate,
                                          DispatchKey::ZeroTensor,
                                          DispatchKey::Functionalize,
                                          DispatchKey::FuncTorchBatched,
                                          DispatchKey::FuncTorchGradWrapper};
  return t.layout() == at::kStrided && !t.key_set().has_any(others);
}

// Return whether the numbers of channels follow one another, where there are any.
inline bool is_dense_numbers(const Tensor& t) {
  return !t.defined() || (is_plain(t) && t.is_contiguous());
}

// Return whether values follow one another, in an order that kernels know.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  if (x.dim() == 4) return x.is_contiguous(at::MemoryFormat::ChannelsLast);
  return x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

// What a plan depends on.
class Key {
 public:
  Key(const Given& given, int64_t stream) {
    numbers_.reserve(10 + 2 * given.x.dim());
    add(stream);
    add(given.x.get_device());
    add(given.relu);
    for (const Tensor* t : {&given.x, &given.weight, &given.bias, &given.residual, &given.mean,
                            &given.var, &given.tracked})
      add(t->defined() ? static_cast<int64_t>(t->scalar_type()) : -1);
    for (const int64_t size : given.x.sizes()) add(size);
    for (const int64_t stride : given.x.strides()) add(stride);
  }

  bool operator==(const Key& other) const { return numbers_ == other.numbers_; }

  struct Hash {
    size_t operator()(const Key& key) const { return key.hash_; }
  };

 private:
  void add(int64_t number) {
    numbers_.push_back(number);
    hash_ = (hash_ ^ static_cast<size_t>(number)) * 0x9E3779B97F4A7C15u;
    hash_ ^= hash_ >> 29;
  }

  std::vector<int64_t> numbers_;
  size_t hash_ = 0;
};

}  // namespace syncbn
