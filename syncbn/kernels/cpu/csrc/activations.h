// Activations after the normalization: value(z), and gradient(dy, z), the gradient of z. Formulas
// and results for NaN and infinities are the same as in torch.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

struct Identity {
  template <class V>
  V value(V z) const {
    return z;
  }
  template <class V>
  V gradient(V dy, V) const {
    return dy;
  }
};

struct Relu {
  template <class V>
  V value(V z) const {
    return z < 0 ? V{} : z;
  }
  template <class V>
  V gradient(V dy, V z) const {
    return z <= 0 ? V{} : dy;
  }
};

struct LeakyRelu {
  double negative_slope;

  template <class V>
  V value(V z) const {
    return z > 0 ? z : z * slope<V>();
  }
  template <class V>
  V gradient(V dy, V z) const {
    return z > 0 ? dy : dy * slope<V>();
  }

 private:
  template <class V>
  auto slope() const {
    return static_cast<std::decay_t<decltype(V{}[0])>>(negative_slope);
  }
};

// exp(x), within two units of the last place: 2^n exp(r) with |r| <= ln(2) / 2, and the Taylor
// series of exp(r). Results below 2^-126 are zero.
inline Floats exp(Floats x) {
  constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  // Adding this number rounds to an integer, which is then in the lowest bits.
  constexpr float ROUND = 12582912.0f;
  Floats shifted = x * LOG2E + ROUND, n = shifted - ROUND;
  Floats r = x - n * LN2_HIGH - n * LN2_LOW;
  Floats series = r * (1.0f / 720) + (1.0f / 120);
  series = series * r + (1.0f / 24);
  series = series * r + (1.0f / 6);
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  // 2^(n - 1), then doubled: 2^128 is not a float.
  Words power = (bits_of<Words>(shifted) - (bits_of<uint32_t>(ROUND) - 126u)) << 23;
  Floats result = series * bits_of<Floats>(power) * 2.0f;
  result = x > 88.7228394f ? Floats{} + INFINITY : result;
  return x < -86.6f ? Floats{} : result;
}
inline Doubles exp(Doubles x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
inline V sigmoid(V z) {
  return 1 / (1 + exp(-z));
}

template <class V>
struct Normal {
  V cdf, density;
};

// The standard normal distribution, within 2e-7. The tail is exp(-z^2 / 2) t P(t), t = 1 / (1 + p
// |z|); p and P minimize the largest relative error for |z| <= 14.
inline Normal<Floats> standard_normal(Floats z) {
  constexpr float P[] = {0.0837115742f, 0.0850688819f, 0.0691920095f, 0.124873315f,  -0.0939264862f,
                         0.349402702f,  -0.330254701f, 0.283589110f,  -0.0716563974f};
  Floats u = z < 0 ? -z : z, t = 1 / (1 + 0.21f * u), kernel = exp(-0.5f * z * z), sum{};
  for (int k = 8; k >= 0; --k) sum = sum * t + P[k];
  Floats tail = kernel * t * sum;
  return {z < 0 ? tail : 1 - tail, 0.398942280f * kernel};
}
inline Normal<Doubles> standard_normal(Doubles z) {
  Doubles cdf;
  for (int i = 0; i < LANES<double>; ++i) cdf[i] = 0.5 * (1 + std::erf(z[i] * 0.70710678118654752));
  return {cdf, 0.39894228040143268 * exp(-0.5 * z * z)};
}

// An activation that is selected at run time. A class for each would double the time that the
// library takes to compile, and the branch, the same for all vectors, costs less than the memory.
struct OtherActivation {
  ActivationKind kind;

  template <class V>
  V value(V z) const {
    switch (kind) {
      case ActivationKind::relu6: return z < 0 ? V{} : z > 6 ? V{} + 6 : z;
      case ActivationKind::silu: return z / (1 + exp(-z));
      case ActivationKind::hardswish: return z * clamp(z + 3) / 6;
      case ActivationKind::gelu: return z * standard_normal(z).cdf;
      default: return z;
    }
  }

  template <class V>
  V gradient(V dy, V z) const {
    switch (kind) {
      case ActivationKind::relu6: return z > 0 ? z < 6 ? dy : V{} : V{};
      case ActivationKind::silu: {
        V s = sigmoid(z);
        return dy * s * (1 + z * (1 - s));
      }
      case ActivationKind::hardswish: return z <= -3 ? V{} : z >= 3 ? dy : dy * (z / 3 + 0.5f);
      case ActivationKind::gelu: {
        Normal<V> normal = standard_normal(z);
        return dy * (normal.cdf + z * normal.density);
      }
      default: return dy;
    }
  }

 private:
  template <class V>
  static V clamp(V z) {
    return z < 0 ? V{} : z > 6 ? V{} + 6 : z;
  }
};

}  // namespace
