// The autograd function of function.py, for tensors that lie as a plan says.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
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

// What a backward pass knows besides tensors.
struct Context {
  std::shared_ptr<Plan> plan;
  std::shared_ptr<const Python> python;
  py::object call;

  // Return a tensor that owns a context: of what autograd keeps for a node, tensors alone are
  // known to compiled autograd.
  static Tensor keep(Context&& context) {
    auto* kept = new Context(std::move(context));
    return at::from_blob(kept, {1}, &Context::end, at::kByte);
  }

  static const Context& of(const Tensor& keeper) {
    return *static_cast<const Context*>(keeper.const_data_ptr());
  }

 private:
  // Nodes may end in any thread; and when nobody counts references any more.
  static void end(void* kept) {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    delete static_cast<Context*>(kept);
  }
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

// New memory may have to be waited for, and by others who need Python.
struct Allocating {
  const py::gil_scoped_release released;
  const at::AutoDispatchBelowADInplaceOrView below;
};

inline Tensor new_numbers(int64_t size, at::ScalarType dtype, const Tensor& x) {
  return at::empty({size}, x.options().dtype(dtype));
}

// forward() of function.py: what it saves, and the running averages moved.
inline Computed compute(const Given& given, const Plan& plan, const Python& python,
                        py::handle call) {
  const at::NoGradGuard no_grad;
  const Tensor& x = given.x;
  const int64_t size = 2 * x.size(1) + 1;
  Computed found;
  Tensor message;
  {
    const Allocating here;
    found.y = at::empty_like(x);
    found.statistics = new_numbers(size, at::kDouble, x);
    if (plan.gate_bytes >= 0) found.gate = new_numbers(plan.gate_bytes, at::kByte, x);
    if (!plan.is_alone) message = new_numbers(size, at::kDouble, x);
  }
  if (!plan.is_alone) {
    plan.forward->front()({&x, &message});
    message = python.exchange(message, x, call, "forward");
  }
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
         dy.storage().resizable();
}

// Where gradients are written, and the message. What comes through a gate is the residual's.
struct Written {
  Tensor dx, dweight, dbias, through, sums;

  variable_list gradients(const Tensor& dy, const Tensor& gate, Wanted wanted) const {
    return {dx, dweight, dbias, !wanted.residual ? NONE : gate.defined() ? through : dy};
  }
};

// Return new memory, and that of dy, if it may be overwritten.
inline Written new_gradients(const Tensor& dy, const Saved& saved, Wanted wanted,
                             bool may_overwrite, bool is_alone) {
  const Allocating here;
  Written to;
  if (!is_alone) to.sums = new_numbers(2 * saved.x.size(1), at::kDouble, saved.x);
  if (wanted.weight) to.dweight = at::empty_like(saved.weight);
  if (wanted.bias) to.dbias = at::empty_like(saved.bias);
  const auto ours = [&] { return may_overwrite ? dy : at::empty_like(saved.x); };
  if (saved.gate.defined()) to.through = ours();
  if (wanted.residual) {
    to.dx = at::empty_like(saved.x);
  } else {
    to.dx = saved.gate.defined() ? to.through : ours();
  }
  return to;
}

// first_order() of backward.py, in a group of one.
inline variable_list differentiate_alone(const Tensor& dy, const Saved& saved,
                                         std::vector<Launches>& launches, Wanted wanted,
                                         bool may_overwrite) {
  const auto& [x, weight, bias, statistics, gate] = saved;
  const Written to = new_gradients(dy, saved, wanted, may_overwrite, true);
  launches.front()({&x, &NONE, &dy, &gate, &to.through, &to.dx, &statistics, &weight, &bias,
                    &to.dweight, &to.dbias});
  return to.gradients(dy, gate, wanted);
}

// The same in a larger group. With three launches, what comes through a gate is written beside the
// message, to memory of its own.
inline variable_list differentiate_together(const Tensor& dy, const Saved& saved,
                                            std::vector<Launches>& launches, Wanted wanted,
                                            bool may_overwrite, const Context& context) {
  const auto& [x, weight, bias, statistics, gate] = saved;
  const bool is_beside = launches.size() == 3;
  const Written to = new_gradients(dy, saved, wanted, may_overwrite && !is_beside, false);
  Tensor sums = to.sums;
  launches.front()({&x, &sums, &dy, &gate, is_beside ? &NONE : &to.through, &NONE, &statistics,
                    &weight, &bias, &to.dweight, &to.dbias});
  if (is_beside) {
    const py::object message = context.python->steps.attr("begin")(sums, x, context.call);
    launches[1]({&dy, &gate, &to.through});
    sums = py::cast<Tensor>(message.attr("wait")());
  } else {
    sums = context.python->exchange(sums, x, context.call, "backward");
  }
  const Tensor& last = gate.defined() ? to.through : dy;
  launches.back()(
      {&x, &sums, &last, &NONE, &NONE, &to.dx, &statistics, &weight, &bias, &NONE, &NONE});
  return to.gradients(dy, gate, wanted);
}

// SyncBatchNormFunction of function.py, whose docstring is the derivation. What a forward pass
// gives has been computed before; a backward pass asks Python for what plans are not made for.
struct SyncBatchNorm : torch::autograd::Function<SyncBatchNorm> {
  using Maybe = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight,
                        const Maybe& bias, const Maybe& residual, const Computed& found,
                        Context&& context) {
    ctx->save_for_backward(
        {x, weight.value_or(NONE), bias.value_or(NONE), found.statistics, found.gate});
    ctx->saved_data["has"] = weight.has_value() + 2 * bias.has_value() + 4 * residual.has_value();
    ctx->saved_data["context"] = Context::keep(std::move(context));
    return found.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const variable_list tensors = ctx->get_saved_variables();
    const Saved saved{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]};
    const Tensor keeper = ctx->saved_data.at("context").toTensor();
    const Needs needs = needs_of(*ctx);
    const py::gil_scoped_acquire gil;
    try {
      auto found = differentiate(given[0], saved, Context::of(keeper), needs);
      // One for each argument of forward().
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

  static variable_list differentiate(const Tensor& dy, const Saved& saved, const Context& context,
                                     const Needs& needs) {
    Plan& plan = *context.plan;
    // Captured by name: older compilers cannot capture what a structured binding names.
    const auto asked = [&context, &saved, &needs](const char* name, auto&&... more) {
      return context.python->steps.attr(name)(
          py::make_tuple(saved.x, saved.weight, saved.bias, saved.statistics, saved.gate),
          context.call, py::make_tuple(needs[0], needs[1], needs[2], needs[3]), more...);
    };
    if (!needs[0] || at::GradMode::is_enabled() || !fits(dy, saved, plan))
      return gradients_of(asked("gradients", dy, plan.view));
    const Wanted wanted{needs[1], needs[2], needs[3]};
    // Other threads may come while this one launches.
    auto launches = plan.backward[wanted.index()];
    if (!launches) {
      launches = make_launches(asked("backward"), plan.current);
      plan.backward[wanted.index()] = launches;
    }
    const bool may_overwrite = is_unshared(dy, context.python->least_bytes);
    if (plan.is_alone) return differentiate_alone(dy, saved, *launches, wanted, may_overwrite);
    return differentiate_together(dy, saved, *launches, wanted, may_overwrite, context);
  }

  static variable_list gradients_of(const py::iterable& gradients) {
    variable_list found;
    for (const py::handle gradient : gradients)
      found.push_back(gradient.is_none() ? NONE : py::cast<Tensor>(gradient));
    return found;
  }

  // Hooks of saved tensors may have changed what they are, and how they lie.
  static bool fits(const Tensor& dy, const Saved& saved, const Plan& plan) {
    const auto& [x, weight, bias, statistics, gate] = saved;
    const int64_t channels = x.size(1);
    return is_plain(dy) && plan.fits(dy) && dy.device() == x.device() && is_plain(x) &&
           plan.fits(x) && are_numbers(weight, channels, plan.of_weight, x) &&
           are_numbers(bias, channels, plan.of_bias, x) &&
           are_numbers(statistics, 2 * channels + 1, at::kDouble, x) &&
           are_numbers(gate, plan.gate_bytes, at::kByte, x);
  }
};

}  // namespace syncbn
