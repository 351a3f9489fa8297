// Vectors of the compute type A (float or double), loaded from and stored to any storage type.
//
// GCC's and Clang's vector extension, so that one source serves every processor. Each instruction
// set has its vector width; intrinsics are used only for operations that the extension lacks.
// Everything is in an unnamed namespace: the file is compiled once per instruction set, and a
// linker that merged equal names would run new instructions on old processors.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class A>
constexpr int LANES = VECTOR_BYTES / sizeof(A);

template <class A>
using Vector __attribute__((vector_size(VECTOR_BYTES))) = A;
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Words = Vector<uint32_t>;
using Halves __attribute__((vector_size(VECTOR_BYTES / 2))) = uint16_t;

// The compute type of a storage type.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;
template <class T>
using vector_t = Vector<compute_t<T>>;

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// --- bfloat16: the upper half of a float; rounded to nearest, ties to even ---

inline Floats widen(Halves h, bfloat16) {
  return bits_of<Floats>(__builtin_convertvector(h, Words) << 16);
}

// The results are the upper halves; callers drop the lower ones.
inline Words rounded(Floats v) {
  Words w = bits_of<Words>(v);
  // Rounding could turn a NaN into infinity.
  return v != v ? w | 0x400000u : w + 0x7fffu + ((w >> 16) & 1u);
}

inline Halves narrow(Floats v, bfloat16) {
  return __builtin_convertvector(rounded(v) >> 16, Halves);
}

// --- float16 ---

#if defined(__AVX512F__)
inline Floats widen(Halves h, float16) {
  return bits_of<Floats>(_mm512_cvtph_ps(bits_of<__m256i>(h)));
}
inline Halves narrow(Floats v, float16) {
  return bits_of<Halves>(_mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Floats widen(Halves h, float16) {
  return bits_of<Floats>(_mm256_cvtph_ps(bits_of<__m128i>(h)));
}
inline Halves narrow(Floats v, float16) {
  return bits_of<Halves>(_mm256_cvtps_ph(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Floats widen(Halves h, float16) {
  Words w = __builtin_convertvector(h, Words);
  Words sign = (w & 0x8000u) << 16, magnitude = (w & 0x7fffu) << 13;
  // An addition rebiases the exponents of normal values. Subnormal values have no exponent; a
  // subtraction of floats rebiases them, exactly even with subnormal floats switched off.
  Words normal = magnitude + ((127u - 15u) << 23);
  Words infinite = magnitude | (0xffu << 23);
  Floats subnormal = bits_of<Floats>(magnitude + ((127u - 14u) << 23)) - 0x1p-14f;
  Words large = magnitude >= (0x1fu << 23) ? infinite : normal;
  return bits_of<Floats>(sign | (magnitude < (1u << 23) ? bits_of<Words>(subnormal) : large));
}
inline Halves narrow(Floats v, float16) {
  Words w = bits_of<Words>(v), sign = (w >> 16) & 0x8000u, magnitude = w & 0x7fffffffu;
  Words normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // An addition of floats that moves the digits of a subnormal half into the lowest bits.
  Words subnormal = bits_of<Words>(bits_of<Floats>(magnitude) + 0.5f) - (126u << 23);
  Words half = magnitude < ((127u - 14u) << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? (magnitude >> 13 & 0x3ffu) | 0x7e00u : half;
  return __builtin_convertvector(half | sign, Halves);
}
#endif

// --- whole vectors ---

template <class T>
inline vector_t<T> load(const T* p) {
  if constexpr (sizeof(T) == 2)
    return widen(read<Halves>(p), T{});
  else
    return read<vector_t<T>>(p);
}

template <class T>
inline void store(T* p, vector_t<T> v) {
  if constexpr (sizeof(T) == 2) {
    Halves h = narrow(v, T{});
    std::memcpy(p, &h, sizeof h);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// --- pairs of vectors, loaded from adjacent values; pair_lane() is the order of the values ---

template <class T>
struct VectorPair {
  vector_t<T> a, b;
};

// Lane of the i-th of these values; the lanes of b follow the ones of a.
template <class T>
constexpr int pair_lane(int i) {
  return i;
}

template <class T>
inline VectorPair<T> load_pair(const T* p) {
  return {load(p), load(p + LANES<compute_t<T>>)};
}
template <class T>
inline void store_pair(T* p, VectorPair<T> v) {
  store(p, v.a);
  store(p + LANES<compute_t<T>>, v.b);
}
// A float is the upper half of a word, or the lower half shifted: no value changes its lane.
template <>
constexpr int pair_lane<bfloat16>(int i) {
  return i / 2 + i % 2 * LANES<float>;
}
inline VectorPair<bfloat16> load_pair(const bfloat16* p) {
  Words w = read<Words>(p);
  return {bits_of<Floats>(w << 16), bits_of<Floats>(w & 0xffff0000u)};
}
inline Words pack_words(VectorPair<bfloat16> v) {
  return (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u);
}
inline void store_pair(bfloat16* p, VectorPair<bfloat16> v) {
  Words w = pack_words(v);
  std::memcpy(p, &w, sizeof w);
}

// Non-temporal store to an address that is aligned for a whole vector.
inline void stream(void* p, Words w) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), bits_of<__m512i>(w));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), bits_of<__m256i>(w));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), bits_of<__m128i>(w));
#else
  std::memcpy(p, &w, sizeof w);
#endif
}

template <class T>
inline void stream_pair(T* p, VectorPair<T> v) {
  if constexpr (sizeof(T) == 2) {
    T values[2 * LANES<float>];
    store_pair(values, v);
    stream(p, read<Words>(values));
  } else {
    stream(p, bits_of<Words>(v.a));
    stream(p + LANES<T>, bits_of<Words>(v.b));
  }
}
inline void stream_pair(bfloat16* p, VectorPair<bfloat16> v) { stream(p, pack_words(v)); }

inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- the first k lanes of a vector; memory behind them is neither read nor written ---

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Floats load(const float* p, int k) {
  return bits_of<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << k) - 1), p));
}
inline Doubles load(const double* p, int k) {
  return bits_of<Doubles>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << k) - 1), p));
}
inline void store(float* p, Floats v, int k) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << k) - 1), bits_of<__m512>(v));
}
inline void store(double* p, Doubles v, int k) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << k) - 1), bits_of<__m512d>(v));
}
template <class T>
inline Floats load(const T* p, int k) {
  auto mask = static_cast<__mmask16>((1u << k) - 1);
  return widen(bits_of<Halves>(_mm256_maskz_loadu_epi16(mask, p)), T{});
}
template <class T>
inline void store(T* p, Floats v, int k) {
  auto mask = static_cast<__mmask16>((1u << k) - 1);
  _mm256_mask_storeu_epi16(p, mask, bits_of<__m256i>(narrow(v, T{})));
}
#else
template <class T>
inline vector_t<T> load(const T* p, int k) {
  T values[LANES<compute_t<T>>] = {};
  for (int i = 0; i < k; ++i) values[i] = p[i];
  return load(values);
}
template <class T>
inline void store(T* p, vector_t<T> v, int k) {
  T values[LANES<compute_t<T>>];
  store(values, v);
  for (int i = 0; i < k; ++i) p[i] = values[i];
}
#endif

// Truncated to 8 binary digits; zero for values that are not finite.
inline Floats coarse(Floats v) {
  return v - v == 0 ? bits_of<Floats>(bits_of<Words>(v) & 0xffff0000u) : Floats{};
}
inline Doubles coarse(Doubles v) {
  using Longs = Vector<uint64_t>;
  return v - v == 0 ? bits_of<Doubles>(bits_of<Longs>(v) & ~0ull << 45) : Doubles{};
}

// The first k lanes of v, then lanes of `behind`.
inline Floats first(int k, Floats v, Floats behind) {
#if defined(__AVX512F__)
  auto mask = static_cast<__mmask16>((1u << k) - 1);
  return bits_of<Floats>(_mm512_mask_mov_ps(bits_of<__m512>(behind), mask, bits_of<__m512>(v)));
#else
  Vector<int32_t> lane;
  for (int i = 0; i < LANES<float>; ++i) lane[i] = i;
  return lane < k ? v : behind;
#endif
}
inline Doubles first(int k, Doubles v, Doubles behind) {
  Vector<int64_t> lane;
  for (int i = 0; i < LANES<double>; ++i) lane[i] = i;
  return lane < static_cast<int64_t>(k) ? v : behind;
}

// The sum of all lanes, by halves: a running sum would make each addition wait for the last one.
template <class V>
inline double total(V v) {
  constexpr int L = sizeof v / sizeof v[0];
  double sums[L];
  for (int i = 0; i < L; ++i) sums[i] = v[i];
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

}  // namespace
