// What is launched for inputs of some dtypes and sizes.
#pragma once

#include <c10/core/DispatchKeySet.h>

#include <array>

#include "launches.h"

namespace syncbn {

// What a forward pass is given. Undefined, but for x, where there is none.
struct Given {
  Tensor x, weight, bias, residual, mean, var, tracked;
  double eps = 0, momentum = 0;
  bool relu = false, is_alone = true;
};

// Which gradients a backward pass writes besides that of x.
struct Wanted {
  static constexpr size_t KINDS = 8;
  bool weight, bias, residual;

  size_t index() const { return weight + 2 * bias + 4 * residual; }
};

// How inputs that lie alike are normalized: in a group of one, both kernels of a pass are one call;
// else a message is between them.
struct Plan {
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  // Of weight and bias, where there are any.
  at::ScalarType of_weight, of_bias;
  bool is_alone;
  // Of the gate; less than zero if there is none.
  int64_t gate_bytes;
  // What kernels see in x: samples.view_of(x).
  py::object view;
  std::shared_ptr<const Current> current;
  // moments, in a larger group; normalize.
  std::shared_ptr<std::vector<Launches>> forward;
  // backward_reduce; through_gate, where that is beside the message; backward_elemt. Told when the
  // first pass wants these gradients.
  std::array<std::shared_ptr<std::vector<Launches>>, Wanted::KINDS> backward;

  bool fits(const Tensor& t) const {
    return t.scalar_type() == dtype && t.sizes() == sizes && t.strides() == strides;
  }
};

// Return launches of Python's.
inline std::shared_ptr<std::vector<Launches>> make_launches(
    const py::iterable& launches, const std::shared_ptr<const Current>& current) {
  auto found = std::make_shared<std::vector<Launches>>();
  for (const py::handle launch : launches)
    found->emplace_back(py::reinterpret_borrow<py::object>(launch), current);
  return found;
}

// Return whether a tensor is its memory and nothing else: no view of other values, of no transform.
inline bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet others{DispatchKey::Python,
                                          DispatchKey::Negative,
                                          DispatchKey::Conjugate,
                                          DispatchKey::ZeroTensor,
                                          DispatchKey::Functionalize,
                                          DispatchKey::FuncTorchBatched,
                                          DispatchKey::FuncTorchGradWrapper,
                                          DispatchKey::Batched,
                                          DispatchKey::NestedTensor};
  return t.layout() == at::kStrided && !t.key_set().has_any(others);
}

// Return whether numbers follow one another, where there are any.
inline bool are_dense_numbers(const Tensor& t) {
  return !t.defined() || (is_plain(t) && t.is_contiguous());
}

// Return whether numbers are so, and as many, of a dtype, where x is.
inline bool are_numbers(const Tensor& t, int64_t size, at::ScalarType dtype, const Tensor& x) {
  return !t.defined() || (are_dense_numbers(t) && t.numel() == size && t.scalar_type() == dtype &&
                          t.device() == x.device());
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
  explicit Key(const Given& given) {
    numbers_.reserve(10 + 2 * given.x.dim());
    add(given.x.get_device());
    add(given.relu + 2 * given.is_alone);
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
