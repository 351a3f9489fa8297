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

// What a node asks Python for: Steps of node.py.
struct Python {
  py::object steps;
  // Of an input whose gradient may take the memory of dy: ownership.py.
  size_t least_bytes;

  Tensor exchange(const Tensor& message, const Tensor& x, py::handle call,
                  const char* direction) const {
    return py::cast<Tensor>(steps.attr("exchange")(message, x, call, direction));
  }
};

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

// What autograd has saved: undefined where there is none.
struct Saved {
  Tensor x, weight, bias, statistics, gate;
};

// What a forward pass has computed.
struct Computed {
  Tensor y, statistics, gate;
};

using Needs = std::array<bool, 4>;
inline const Tensor NONE;

inline Tensor new_like(const Tensor& t) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::empty_like(t);
}

inline Tensor new_numbers(int64_t size, at::ScalarType dtype, const Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::empty({size}, x.options().dtype(dtype));
}

inline Computed compute(const Given& given, const Plan& plan, const Python& python,
                        py::handle call) {
  const at::NoGradGuard no_grad;
  const Tensor& x = given.x;
  const int64_t size = 2 * x.size(1) + 1;
  Tensor message;
  if (!plan.is_alone) {
    message = new_numbers(size, at::kDouble, x);
    plan.forward->front()({&x, &message});
    message = python.exchange(message, x, call, "forward");
  }
  Computed found{new_like(x), new_numbers(size, at::kDouble, x), {}};
  if (plan.gate_bytes >= 0) found.gate = new_numbers(plan.gate_bytes, at::kByte, x);
  plan.forward->back()({&x, &message, &given.residual, &found.y, &found.gate, &found.statistics,
                        &given.weight, &given.bias, &given.mean, &given.var, &given.tracked},
                       {given.eps, given.momentum});
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

// first_order() of backward.py, in a group of one.
inline variable_list differentiate_alone(const Tensor& dy, const Saved& saved,
                                         std::vector<Launches>& launches, Wanted wanted,
                                         bool may_overwrite) {
  const auto& [x, weight, bias, statistics, gate] = saved;
  const Tensor dweight = wanted.weight ? new_like(weight) : NONE;
  const Tensor dbias = wanted.bias ? new_like(bias) : NONE;
  Tensor gated, dx;
  if (gate.defined()) {
    gated = may_overwrite ? dy : new_like(x);
    dx = wanted.residual ? new_like(x) : gated;
  } else {
    dx = may_overwrite && !wanted.residual ? dy : new_like(x);
  }
  launches.front()(
      {&x, &NONE, &dy, &gate, &gated, &dx, &statistics, &weight, &bias, &dweight, &dbias});
  return {dx, dweight, dbias, !wanted.residual ? NONE : gate.defined() ? gated : dy};
}

// The same in a larger group: what comes through a gate may be written beside the message.
inline variable_list differentiate_together(const Tensor& dy, const Saved& saved,
                                            std::vector<Launches>& launches, Wanted wanted,
                                            bool may_overwrite, const Kept& kept) {
  const auto& [x, weight, bias, statistics, gate] = saved;
  const Tensor dweight = wanted.weight ? new_like(weight) : NONE;
  const Tensor dbias = wanted.bias ? new_like(bias) : NONE;
  const bool is_beside = launches.size() == 3;
  Tensor sums = new_numbers(2 * x.size(1), at::kDouble, x), through;
  if (gate.defined() && !is_beside) through = may_overwrite ? dy : new_like(x);
  launches.front()(
      {&x, &sums, &dy, &gate, &through, &NONE, &statistics, &weight, &bias, &dweight, &dbias});
  if (is_beside) {
    const py::object message = kept.python->steps.attr("begin")(sums, x, kept.call);
    through = new_like(x);
    launches[1]({&dy, &gate, &through});
    sums = py::cast<Tensor>(message.attr("wait")());
  } else {
    sums = kept.python->exchange(sums, x, kept.call, "backward");
  }
  const Tensor& last = gate.defined() ? through : dy;
  const bool is_over = !wanted.residual && (gate.defined() || may_overwrite);
  const Tensor dx = is_over ? last : new_like(x);
  launches.back()({&x, &sums, &last, &NONE, &NONE, &dx, &statistics, &weight, &bias, &NONE, &NONE});
  return {dx, dweight, dbias, wanted.residual ? last : NONE};
}

struct SyncBatchNorm : torch::autograd::Function<SyncBatchNorm> {
  using Maybe = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight,
                        const Maybe& bias, const Maybe& residual, const Computed& found,
                        c10::intrusive_ptr<Kept> kept) {
    ctx->save_for_backward(
        {x, weight.value_or(NONE), bias.value_or(NONE), found.statistics, found.gate});
    ctx->saved_data["has"] = weight.has_value() + 2 * bias.has_value() + 4 * residual.has_value();
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return found.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const variable_list tensors = ctx->get_saved_variables();
    const Saved saved{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]};
    const auto capsule = ctx->saved_data.at("kept").toCapsule();
    const Needs needs = needs_of(*ctx);
    const py::gil_scoped_acquire gil;
    try {
      auto found = differentiate(given[0], saved, static_cast<const Kept&>(*capsule), needs);
      found.resize(6);
      return found;
    } catch (py::error_already_set& error) {
      error.restore();
    }
    python_error error;
    error.persist();
    throw std::move(error);
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

  static variable_list differentiate(const Tensor& dy, const Saved& saved, const Kept& kept,
                                     const Needs& needs) {
    const py::object& steps = kept.python->steps;
    Plan& plan = *kept.plan;
    const auto [of_x, of_weight, of_bias, of_residual] = needs;
    const auto& [x, weight, bias, statistics, gate] = saved;
    const auto asked = [&](const char* name, auto&&... more) {
      return steps.attr(name)(py::make_tuple(x, weight, bias, statistics, gate), kept.call,
                              py::make_tuple(of_x, of_weight, of_bias, of_residual), more...);
    };
    if (!of_x || at::GradMode::is_enabled() || !fits(dy, saved, plan))
      return read(asked("gradients", dy, plan.view));
    const Wanted wanted{of_weight, of_bias, of_residual};
    // Other threads may come while this one launches.
    auto launches = plan.backward[wanted.index()];
    if (!launches) {
      launches = make_launches(asked("backward"), plan.current);
      plan.backward[wanted.index()] = launches;
    }
    const bool may_overwrite = is_unshared(dy, kept.python->least_bytes);
    if (plan.is_alone) return differentiate_alone(dy, saved, *launches, wanted, may_overwrite);
    return differentiate_together(dy, saved, *launches, wanted, may_overwrite, kept);
  }

  static variable_list read(const py::iterable& gradients) {
    variable_list found;
    for (const py::handle gradient : gradients)
      found.push_back(gradient.is_none() ? NONE : py::cast<Tensor>(gradient));
    return found;
  }

  // Hooks of saved tensors may have changed how they lie.
  static bool fits(const Tensor& dy, const Saved& saved, const Plan& plan) {
    const auto& [x, weight, bias, statistics, gate] = saved;
    return is_plain(dy) && plan.fits(dy) && dy.device() == x.device() && is_plain(x) &&
           plan.fits(x) && are_dense_numbers(weight) && are_dense_numbers(bias) &&
           are_dense_numbers(statistics) && are_dense_numbers(gate);
  }
};

}  // namespace syncbn
