// The autograd function of function.py, for tensors that lie as a plan says.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "plans.h"

namespace syncbn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a backward pass knows besides tensors. Nodes may end in any thread.
struct Kept : torch::CustomClassHolder {
  Kept(std::shared_ptr<Plan> plan, std::shared_ptr<const Python> python, py::object call)
      : plan(std::move(plan)), python(std::move(python)), call(std::move(call)) {}

  ~Kept() override {
    if (Py_IsInitialized()) {
      const py::gil_scoped_acquire gil;
      plan.reset();
      python.reset();
      call = py::object();
    } else {
      // Nobody counts references any more.
      new std::shared_ptr(std::move(plan));
      new std::shared_ptr(std::move(python));
      call.release();
    }
  }

  std::shared_ptr<Plan> plan;
  std::shared_ptr<const Python> python;
  py::object call;
};

// What a forward pass has computed.
struct Computed {
  Tensor y, statistics, gate;
};

using Needs = std::array<bool, 4>;

// Return what a plan's launches make of tensors; nothing if the driver refuses them.
inline std::optional<Computed> compute(const Given& given, const Plan& plan) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor &x = given.x, none;
  Computed found;
  found.y = at::empty_like(x);
  found.statistics = at::empty({2 * x.size(1) + 1}, x.options().dtype(at::kDouble));
  if (plan.gate_bytes >= 0) found.gate = at::empty({plan.gate_bytes}, x.options().dtype(at::kByte));
  const Tensors tensors{&x,
                        &none,
                        &given.residual,
                        &found.y,
                        &found.gate,
                        &found.statistics,
                        &given.weight,
                        &given.bias,
                        &given.mean,
                        &given.var,
                        &given.tracked};
  if ((*plan.forward)(tensors, {given.eps, given.momentum}) != 0) return std::nullopt;
  for (const Tensor* t : {&given.mean, &given.var, &given.tracked})
    if (t->defined() && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  return found;
}

// Return whether nobody but a backward pass will look at a gradient again, and it is large enough
// to ask: ownership.py, which counts Python's references, too. Here they are among the tensor's
// own.
inline bool is_unshared(const Tensor& dy, size_t least_bytes) {
  return dy.nbytes() >= least_bytes && dy.use_count() == 1 && dy.storage().use_count() == 1 &&
         dy.storage().resizable() && !dy.requires_grad() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Return gradients by launches; nothing if the driver refuses them.
inline std::optional<variable_list> differentiate(const Tensor& dy, const variable_list& saved,
                                                  const Launches& launches, Wanted wanted,
                                                  bool may_overwrite) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &statistics = saved[3];
  const Tensor &gate = saved[4], none;
  const Tensor dweight = wanted.weight ? at::empty_like(weight) : none;
  const Tensor dbias = wanted.bias ? at::empty_like(bias) : none;
  Tensor dx, gated, dresidual;
  if (gate.defined()) {
    gated = may_overwrite ? dy : at::empty_like(x);
    dx = wanted.residual ? at::empty_like(x) : gated;
    dresidual = wanted.residual ? gated : none;
  } else {
    dx = may_overwrite && !wanted.residual ? dy : at::empty_like(x);
    dresidual = wanted.residual ? dy : none;
  }
  const Tensors tensors{&x,          &none,   &dy,   &gate,    &gated, &dx,
                        &statistics, &weight, &bias, &dweight, &dbias};
  if (launches(tensors, {}) != 0) return std::nullopt;
  return variable_list{dx, dweight, dbias, dresidual};
}

[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// Return gradients by Python; and launches that would have done the same, if there are any.
inline std::pair<variable_list, std::shared_ptr<const Launches>> differentiate_otherwise(
    const Tensor& dy, const variable_list& saved, const Kept& kept, const Needs& needs) {
  try {
    const auto [x, weight, bias, residual] = needs;
    const py::tuple found = kept.python->backward(dy, py::tuple(py::cast(saved)),
                                                  py::make_tuple(x, weight, bias, residual),
                                                  kept.call, kept.plan->view);
    variable_list gradients;
    for (const py::handle gradient : found[0].cast<py::tuple>())
      gradients.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
    if (found[1].is_none()) return {std::move(gradients), nullptr};
    return {std::move(gradients), found[1].cast<std::shared_ptr<Launches>>()};
  } catch (py::error_already_set& error) {
    error.restore();
  }
  throw_python_error();
}

struct SyncBatchNorm : torch::autograd::Function<SyncBatchNorm> {
  using Maybe = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight,
                        const Maybe& bias, const Maybe& residual, const Computed& found,
                        c10::intrusive_ptr<Kept> kept) {
    ctx->save_for_backward(
        {x, weight.value_or(Tensor()), bias.value_or(Tensor()), found.statistics, found.gate});
    ctx->saved_data["has"] = weight.has_value() + 2 * bias.has_value() + 4 * residual.has_value();
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return found.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const Tensor& dy = given[0];
    const variable_list saved = ctx->get_saved_variables();
    const auto capsule = ctx->saved_data.at("kept").toCapsule();
    const auto& kept = static_cast<const Kept&>(*capsule);
    const Needs needs = needs_of(*ctx);
    const Wanted wanted{needs[1], needs[2], needs[3]};
    const py::gil_scoped_acquire gil;
    // Other threads may come while this one launches.
    const std::shared_ptr<const Launches> launches = kept.plan->backward[wanted.index()];
    const bool is_served = needs[0] && !at::GradMode::is_enabled() && fits(dy, saved, kept);
    std::optional<variable_list> found;
    if (is_served && launches) {
      const bool may_overwrite = is_unshared(dy, kept.python->least_bytes);
      found = differentiate(dy, saved, *launches, wanted, may_overwrite);
    }
    if (!found) {
      auto otherwise = differentiate_otherwise(dy, saved, kept, needs);
      found = std::move(otherwise.first);
      if (is_served) kept.plan->backward[wanted.index()] = std::move(otherwise.second);
    }
    found->resize(6);
    return *found;
  }

 private:
  // Return whether the four tensors of forward() need gradients; edges are of those that are there.
  static Needs needs_of(const AutogradContext& ctx) {
    const int64_t has = ctx.saved_data.at("has").toInt();
    Needs needs{ctx.needs_input_grad(0)};
    for (size_t i = 1, edge = 1; i < needs.size(); ++i)
      if (has >> (i - 1) & 1) needs[i] = ctx.needs_input_grad(edge++);
    return needs;
  }

  // Hooks of saved tensors may have changed how they lie, and the stream may be another.
  static bool fits(const Tensor& dy, const variable_list& saved, const Kept& kept) {
    const Tensor& x = saved[0];
    const Plan& plan = *kept.plan;
    return is_plain(dy) && plan.fits(dy) && dy.device() == x.device() && is_plain(x) &&
           plan.fits(x) && std::all_of(saved.begin() + 1, saved.end(), is_dense_numbers) &&
           kept.python->stream_for(x) == plan.stream;
  }
};

}  // namespace syncbn
