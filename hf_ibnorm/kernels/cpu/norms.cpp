// Forward and backward of IBNorm and LayerNormalNorm for the CPU, each one pass over a row from memory's point of view.
//
// Plain C++ with the vector extensions of GCC and Clang behind a C interface: no headers of torch or Python, so it
// compiles in seconds, and one source serves every instruction set, which the flags choose. Everything is computed in
// float32. The formulas and the names are those of hf_ibnorm/functional.py and of the derivations beside each function.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int W = BYTES / 4;   // lanes of a vector
constexpr int PAD = 64;        // row buffers are whole numbers of these, the elements one call of `draw` fills

typedef float vf __attribute__((vector_size(BYTES)));
typedef int32_t vi __attribute__((vector_size(BYTES)));
typedef uint32_t vu __attribute__((vector_size(BYTES)));
typedef uint16_t vh __attribute__((vector_size(BYTES / 2)));

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Variant { LINEAR, LOG, TANH };
enum Flags { MEAN_ABS = 1, RMS = 2, STANDARDIZE_FIRST = 4 };
enum NoiseMode { NONE, SCALED, UNSCALED, DROPOUT };
constexpr int STATS = 4;       // floats kept for each row

#define INLINE inline __attribute__((always_inline))
// The body of `each`: i is a vector's place in the row, k counts modulo the unrolling, `left` elements are in the row.
#define BODY [&](int64_t i, [[maybe_unused]] int k, [[maybe_unused]] auto left) __attribute__((always_inline))

INLINE vf fill(float value) { return vf{} + value; }
INLINE vf as_float(vi v) { return reinterpret_cast<vf>(v); }
INLINE vi bits(vf v) { return reinterpret_cast<vi>(v); }
INLINE vf magnitude(vf v) { return as_float(bits(v) & 0x7fffffff); }
INLINE vf with_sign_of(vf v, vf s) { return as_float(bits(v) | (bits(s) & int32_t(0x80000000))); }  // v >= 0
INLINE vf flipped(vf v, vf s) { return as_float(bits(v) ^ (bits(s) & int32_t(0x80000000))); }       // v·sign(s)
INLINE vf at_most(vf v, float top) { return v > top ? fill(top) : v; }    // NaN stays
INLINE vf at_least(vf v, float low) { return v < low ? fill(low) : v; }

// Rows in memory.

// n elements (at most W) from p, zeros behind them.
template <class Vector, class Element> INLINE Vector take(const Element* p, int64_t n) {
  Vector v{};
  if (n >= W) std::memcpy(&v, p, sizeof v);
  else std::memcpy(&v, p, n * sizeof(Element));
  return v;
}

INLINE vf load(const float* p, int64_t n) { return take<vf>(p, n); }

struct bf16 { uint16_t bits; };
INLINE vf load(const bf16* p, int64_t n) {
  return as_float(reinterpret_cast<vi>(__builtin_convertvector(take<vh>(p, n), vu) << 16));
}

template <class Vector, class Element> INLINE void put(Element* p, Vector v, int64_t n) {
  if (n >= W) std::memcpy(p, &v, sizeof v);
  else std::memcpy(p, &v, n * sizeof(Element));
}

INLINE void store(float* p, vf v, int64_t n) { put(p, v, n); }
INLINE void store(bf16* p, vf v, int64_t n) {
  vu u = reinterpret_cast<vu>(bits(v));
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = v == v ? rounded : vu{} + 0x7fc0;         // the sum above takes some NaNs for numbers
  put(p, __builtin_convertvector(rounded, vh), n);
}

struct f16 { uint16_t bits; };
#if defined(__F16C__)
#if defined(__AVX512F__)
INLINE vf load(const f16* p, int64_t n) { return vf(_mm512_cvtph_ps(__m256i(take<vh>(p, n)))); }
INLINE vh halved(vf v) { return vh(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE vf load(const f16* p, int64_t n) { return vf(_mm256_cvtph_ps(__m128i(take<vh>(p, n)))); }
INLINE vh halved(vf v) { return vh(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }
#endif
INLINE void store(f16* p, vf v, int64_t n) { put(p, halved(v), n); }
constexpr bool HAS_FLOAT16 = true;
#elif defined(__FLT16_MAX__)
typedef _Float16 vf16 __attribute__((vector_size(BYTES / 2)));
INLINE vf load(const f16* p, int64_t n) { return __builtin_convertvector(take<vf16>(p, n), vf); }
INLINE void store(f16* p, vf v, int64_t n) { put(p, __builtin_convertvector(v, vf16), n); }
constexpr bool HAS_FLOAT16 = true;
#else
INLINE vf load(const f16*, int64_t) { return vf{}; }  // never called: HAS_FLOAT16 says so
INLINE void store(f16*, vf, int64_t) {}
constexpr bool HAS_FLOAT16 = false;
#endif

// Sums over a row.

INLINE float total(vf v) {  // pairwise: lane i with lane i + half
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1));
#else
  __m256 half = __m256(v);
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float lanes[W];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Sums of K terms over a row, in U independent partial sums each: shorter chains of additions are faster and rounder.
template <int K, int U> struct Sums {
  vf part[K][U] = {};
  INLINE void add(int k, int64_t i, vf v) { part[k][i % U] += v; }
  INLINE float get(int k) const {
    vf sum = part[k][0];
    for (int u = 1; u < U; u++) sum += part[k][u];
    return total(sum);
  }
};

// BODY for every vector of a row. `left` is the constant W in whole ones. Buffers are padded: they are read whole.
template <int U, class Body> INLINE void each(int64_t n, Body body) {
  constexpr std::integral_constant<int64_t, W> whole;
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) {
#pragma GCC unroll 8
    for (int k = 0; k < U; k++) body(i + k * W, k, whole);
  }
  for (; i + W <= n; i += W) body(i, 0, whole);
  if (i < n) body(i, 0, n - i);
}

// `v` with zeros behind the row's end.
INLINE vf inside(vf v, int64_t left) {
  if (left >= W) return v;
  vi lane;
  for (int k = 0; k < W; k++) lane[k] = k;
  return lane < int32_t(left) ? v : vf{};
}

// Elementary functions, float32, to 2 units in the last place (tests/hf_ibnorm/test_kernels.py).

template <int N> INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf p = fill(c[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; k--) p = p * x + c[k];
  return p;
}

// 1/v of positive, finite v: a division takes the processor as long as some ten other operations.
INLINE vf inverse_of(vf v) {
#if defined(__AVX512F__)
  vf near = vf(_mm512_rcp14_ps(__m512(v)));
  return near + near * (1.0f - v * near);  // one step of Newton's: 14 bits become 28
#else
  return 1.0f / v;
#endif
}

// k·log(2) + log(1 + m), where k counts in units of a float's exponent and 1 + m is in [0.75, 1.5]. Coefficients: minimax
// of (log1p(m) - m)/m².
INLINE vf scaled_log(vi k, vf m) {
  static const float c[] = {-0.5000005960464478f, 0.3333354890346527f, -0.24993441998958588f, 0.19977077841758728f,
                            -0.1682281196117401f, 0.14983916282653809f, -0.12067364156246185f, 0.05413243919610977f};
  return __builtin_convertvector(k >> 23, vf) * 0.6931471805599453f + (m * m * polynomial(m, c) + m);
}

INLINE vi exponent(vf v) { return (bits(v) - 0x3f400000) & int32_t(0xff800000); }  // v·2^-exponent is in [0.75, 1.5]

// log(1 + u), u >= 0: m = u·2^-k + (2^-k - 1).
INLINE vf log1p_positive(vf u) {
  vi k = exponent(u + 1.0f);
  vf m = as_float(bits(u) - k) + (as_float(0x40800000 - k) * 0.25f - 1.0f);
  return scaled_log(k, m) + u * 0.0f;  // the last term keeps NaN, and makes it of infinity, as the norms do anyway
}

INLINE vf log_normal(vf v) {  // v > 0, no denormal
  vi k = exponent(v);
  return scaled_log(k, as_float(bits(v) - k) - 1.0f);
}

// exp(q) as 2^j·(1 + p), |log(1 + p)| <= log(2)/2. Coefficients: minimax of (expm1(f) - f)/f².
struct Reduced { vi j; vf p; };
INLINE Reduced reduced_exp(vf q) {
  static const float c[] = {0.5f, 0.1666666567325592f, 0.04166635870933533f, 0.008333389647305012f,
                            0.0013940727803856134f, 0.0001984588598133996f};
  const float shift = 12582912.0f;                              // 1.5·2^23: adding it rounds to an integer
  vf rounded = q * 1.4426950408889634f + shift, whole = rounded - shift;
  vf f = q - whole * 0.693145751953125f - whole * 1.428606765330187e-06f;
  return {bits(rounded) - bits(fill(shift)), f * f * polynomial(f, c) + f};
}

// exp(q) - 1, 0 <= q <= 80.
INLINE vf expm1_small(vf q) {
  const Reduced e = reduced_exp(q);
  vf scale = as_float((e.j + 127) << 23);
  return scale * e.p + (scale - 1.0f);
}

// exp(q) - 1 and exp(q).
struct Exp { vf minus_one, value; };
INLINE Exp exponential(vf q) {
  const Reduced e = reduced_exp(at_least(at_most(q, 89.0f), -87.0f));
  vf half = as_float((e.j + 126) << 23);                        // 2^(j-1): 2^128 is no float32
  vf value = half * e.p + half, minus_one = half * e.p + (half - 0.5f);
  return {minus_one + minus_one, value + value};
}

// Noise: Philox 4x32-10 (Salmon et al., SC 2011), then Box and Muller.

// a·b as high and low 32 bits.
INLINE void multiply(vu a, uint32_t b, vu& high, vu& low) {
#if defined(__AVX512F__) || defined(__AVX2__)
  typedef uint64_t vl __attribute__((vector_size(BYTES)));
  const vu factor = vu{} + b, odd_lanes = reinterpret_cast<vu>(vl{} + 0xffffffff00000000u);
  vu shifted = reinterpret_cast<vu>(reinterpret_cast<vl>(a) >> 32);
#if defined(__AVX512F__)
  vu even = vu(_mm512_mul_epu32(__m512i(a), __m512i(factor)));
  vu odd = vu(_mm512_mul_epu32(__m512i(shifted), __m512i(factor)));
#else
  vu even = vu(_mm256_mul_epu32(__m256i(a), __m256i(factor)));
  vu odd = vu(_mm256_mul_epu32(__m256i(shifted), __m256i(factor)));
#endif
  high = vu(vl(even) >> 32) | (odd & odd_lanes);
  low = (even & ~odd_lanes) | vu(vl(odd) << 32);
#else
  typedef uint64_t vl __attribute__((vector_size(2 * BYTES)));
  vl product = __builtin_convertvector(a, vl) * uint64_t(b);
  low = a * b;
  high = __builtin_convertvector(product >> 32, vu);
#endif
}

INLINE vf root(vf v) {  // v >= 0
  float lanes[W];
  std::memcpy(lanes, &v, sizeof v);
#pragma omp simd
  for (int k = 0; k < W; k++) lanes[k] = std::sqrt(lanes[k]);
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

// Standard normals for places [at, at + 64) of a row: a function of seed, row and place, whatever the vectors' width.
INLINE void draw(float* out, uint64_t seed, uint64_t row, int64_t at) {
  for (int part = 0; part < 16; part += W) {
    vu c[4];
    for (int k = 0; k < W; k++) c[0][k] = uint32_t(at / 4 + part + k);
    c[1] = vu{};
    c[2] = vu{} + uint32_t(row);
    c[3] = vu{} + uint32_t(row >> 32);
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      vu high0, low0, high1, low1;
      multiply(c[0], 0xD2511F53u, high0, low0);
      multiply(c[2], 0xCD9E8D57u, high1, low1);
      vu next0 = high1 ^ c[1] ^ key0, next2 = high0 ^ c[3] ^ key1;
      c[1] = low1;
      c[3] = low0;
      c[0] = next0;
      c[2] = next2;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    static const float sine[] = {6.2831854820251465f, -41.3416633605957f, 81.59235382080078f, -75.39356231689453f};
    static const float cosine[] = {1.0f, -19.739208221435547f, 64.9393081665039f, -85.44229888916016f,
                                   59.202796936035156f};
    for (int pair = 0; pair < 2; pair++) {
      // 31 bits for the radius, so that the tails reach 6.6 (a signed number has no more), 24 for the angle.
      vf uniform = __builtin_convertvector(reinterpret_cast<vi>(c[2 * pair] >> 1), vf) * 0x1p-31f + 0x1p-32f;
      vf turn = __builtin_convertvector(reinterpret_cast<vi>(c[2 * pair + 1]) >> 8, vf) * 0x1p-24f;  // [-1/2, 1/2)
      vf radius = root(-2.0f * log_normal(uniform));
      const float shift = 12582912.0f;
      vf rounded = turn * 4.0f + shift;
      vi quadrant = bits(rounded);
      vf rest = turn - (rounded - shift) * 0.25f;  // |rest| <= 1/8 of a turn
      vf square = rest * rest;
      vf s = rest * polynomial(square, sine), t = polynomial(square, cosine);
      vf sin_value = (quadrant & 1) != 0 ? t : s, cos_value = (quadrant & 1) != 0 ? s : t;
      sin_value = as_float(bits(sin_value) ^ ((quadrant & 2) << 30));
      cos_value = as_float(bits(cos_value) ^ (((quadrant + 1) & 2) << 30));
      vf first = radius * cos_value, second = radius * sin_value;
      std::memcpy(out + 32 * pair + part, &first, sizeof first);
      std::memcpy(out + 32 * pair + 16 + part, &second, sizeof second);
    }
  }
}

// Work: rows in blocks, gradients of weight and bias summed in a fixed order.

// The arguments that both norms share. Pointers may be null: `weight`, `bias` and what only one direction has.
struct Common {
  const void* x;
  int64_t x_stride;
  const void* grad;        // backward: of y
  int64_t grad_stride;
  void* out;               // y forward, the gradient of x backward; rows are n apart
  float* stats;            // rows × STATS, written forward, read backward
  const float *weight, *bias;
  float *dweight, *dbias;  // n each
  int64_t rows, n;
  float eps;
  int dtype, threads;
};

// Floats from one row buffer to the next: whole lines of the cache, and never a multiple of 4096 bytes, which would
// send all the buffers' elements at one place of the row to one set of the cache.
int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD + 80; }

// Row buffers of one thread, zeroed, each aligned to a cache line.
struct Scratch {
  float* base;
  int64_t width;
  Scratch(int64_t n, int64_t buffers) : width(padded(n)) {
    const size_t bytes = buffers * width * sizeof(float);
    base = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (base) std::memset(base, 0, bytes);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(base); }
  float* operator[](int64_t k) const { return base ? base + k * width : nullptr; }
};

// Blocks that the rows are cut into: a function of their number alone, so that no sum depends on the threads.
int64_t block_count(int64_t rows) { return rows < 16 ? 1 : rows < 1024 ? rows / 16 : 64; }

// work(row, scratch, dweight, dbias) for every row. False where memory ran out; then nothing is to be used.
template <class Work> bool over_rows(const Common& in, int buffers, Work work) {
  const int64_t blocks = block_count(in.rows);
  const bool sums = in.dweight || in.dbias;
  Scratch partial(in.n, sums ? 2 * blocks : 0);
  bool enough = !sums || partial.base;
#pragma omp parallel num_threads(in.threads) if (in.threads > 1 && blocks > 1) reduction(&& : enough)
  {
    Scratch scratch(in.n, buffers);
    enough = enough && scratch.base;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; block++) {
      float *dweight = in.dweight ? partial[2 * block] : nullptr, *dbias = in.dbias ? partial[2 * block + 1] : nullptr;
      for (int64_t row = in.rows * block / blocks; enough && row < in.rows * (block + 1) / blocks; row++)
        work(row, scratch, dweight, dbias);
    }
  }
  if (!enough || !sums) return enough;
  each<1>(in.n, BODY {
    vf weight{}, bias{};
    for (int64_t block = 0; block < blocks; block++) {
      weight += load(partial[2 * block] + i, W);
      bias += load(partial[2 * block + 1] + i, W);
    }
    if (in.dweight) store(in.dweight + i, weight, left);
    if (in.dbias) store(in.dbias + i, bias, left);
  });
  return true;
}

// `sum` += v, where there is a sum.
INLINE void gather(float* sum, int64_t i, vf v) {
  if (sum) store(sum + i, load(sum + i, W) + v, W);
}

// y = weight·z + bias
template <class T> INLINE void finish(const Common& in, T* y, int64_t i, vf z, int64_t left) {
  if (in.weight) z *= load(in.weight + i, left);
  if (in.bias) z += load(in.bias + i, left);
  store(y + i, z, left);
}

// Mean, and mean of what is left when it is subtracted; `c` receives x - mean, zeros behind the row's end. Only
// x - mean - rest is exact for constant rows.
template <class T> INLINE void deviation(const T* x, int64_t n, float* c, float& mean, float& rest) {
  Sums<1, 4> sum, again;
  each<4>(n, BODY {
    vf v = load(x + i, left);
    store(c + i, v, W);
    sum.add(0, k, v);
  });
  mean = sum.get(0) / n;
  each<4>(n, BODY {
    vf v = inside(load(c + i, W) - mean, left);
    store(c + i, v, W);
    again.add(0, k, v);
  });
  rest = again.get(0) / n;
}

// IBNorm.

struct Lam {
  float value, inverse;
  explicit Lam(float lam) : value(lam), inverse(1.0f / lam) {}
};

// f(c), and f'(c) into `slope`. With a = mean|c| as unit, a·f_lam(c/a) is f of lam/a: one function serves both units.
template <Variant V, bool SLOPE> INLINE vf compress(vf c, Lam lam, vf& slope) {
  if constexpr (V == LINEAR) {
    if constexpr (SLOPE) slope = fill(lam.inverse);
    return c * lam.inverse;
  } else if constexpr (V == LOG) {
    vf u = magnitude(c) * lam.value;
    if constexpr (SLOPE) slope = inverse_of(1.0f + u);
    return with_sign_of(log1p_positive(u) * lam.inverse, c);
  } else {  // tanh(v) = e/(e + 2) with e = expm1(2v); its slope is 4·(e + 1)/(e + 2)²
    vf e = expm1_small(at_most(magnitude(c) * (2.0f * lam.value), 40.0f));
    vf below = e + 2.0f, inverse = inverse_of(below);
    if constexpr (SLOPE) slope = 4.0f * (e + 1.0f) * inverse * inverse;
    // The quotient's own error, and that of rounding e + 2, would be a unit in the last place each: corrected.
    vf lost = e - (below - 2.0f);
#if defined(__FMA__)
    vf t = e * inverse;
    t += inverse * (e - t * below - t * lost);
#else
    vf t = e / below;  // e - t·below would be rounded
    t -= inverse * t * lost;
#endif
    return with_sign_of(t * lam.inverse, c);
  }
}

template <Variant V, class T> struct IBNorm {
  Common in;
  float lam;
  bool mean_abs, rms, standardize_first;

  // mean|c| where it is the unit, else 1, as where it is 0; and lam in it.
  Lam unit(const float* c, float& a) const {
    a = 1.0f;
    if (mean_abs) {
      Sums<1, 4> sum;
      each<4>(in.n, BODY { sum.add(0, k, magnitude(load(c + i, W))); });
      a = sum.get(0) / in.n;
      if (a == 0.0f) a = 1.0f;
    }
    const float each_lam = lam / a;
    return Lam(each_lam > 1e30f ? 1e30f : each_lam);
  }

  // Kept of a row: mean, rest, shift, r. Compress first: y = weight·(f - shift)·r + bias, where `shift` is mean(f), or
  // minus the mean that rms keeps. Standardize first: c is multiplied by r, and y = weight·(f - shift) + bias.
  void forward(int64_t row, const Scratch& scratch) const {
    const int64_t n = in.n;
    const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
    T* y = static_cast<T*>(in.out) + row * n;
    float *c = scratch[0], *f = scratch[1], mean, rest, a, shift, r;
    deviation(x, n, c, mean, rest);
    if (standardize_first) {
      Sums<1, 4> square;
      each<4>(n, BODY {
        vf v = inside(load(c + i, W) - rest, left), h = rms ? load(x + i, left) : v;
        store(c + i, v, W);
        square.add(0, k, h * h);
      });
      r = 1.0f / std::sqrt(square.get(0) / n + in.eps);
      shift = rms ? -mean * r : 0.0f;
      each<4>(n, BODY { store(c + i, load(c + i, W) * r, W); });
      const Lam lam_here = unit(c, a);
      each<2>(n, BODY {
        vf unused;
        finish(in, y, i, compress<V, false>(load(c + i, W), lam_here, unused) - shift, left);
      });
    } else {
      if (mean_abs) each<4>(n, BODY { store(c + i, inside(load(c + i, W) - rest, left), W); });
      const Lam lam_here = unit(c, a);
      const float more = mean_abs ? 0.0f : rest;
      Sums<1, 2> sum;
      each<2>(n, BODY {
        vf unused, v = compress<V, false>(inside(load(c + i, W) - more, left), lam_here, unused);
        store(f + i, v, W);
        sum.add(0, k, v);
      });
      shift = rms ? -mean : sum.get(0) / n;
      Sums<1, 4> square;
      each<4>(n, BODY {
        vf v = inside(load(f + i, W) - shift, left);
        square.add(0, k, v * v);
      });
      r = 1.0f / std::sqrt(square.get(0) / n + in.eps);
      each<4>(n, BODY { finish(in, y, i, (load(f + i, W) - shift) * r, left); });
    }
    const float kept[STATS] = {mean, rest, shift, r};
    std::memcpy(in.stats + STATS * row, kept, sizeof kept);
  }

  // u = g·weight, z = (y - bias)/weight and s the slope of f:
  //   compress first:     d = r·(u - [layer] mean(u) - z·mean(u·z)), dc = d·s, dx = dc - mean(dc) + [rms] mean(d)
  //   standardize first:  d = u, dc = d·s, dh = dc - mean(dc) + mean(d), dx = r·(dh - [layer] mean(dh) - h·mean(dh·h))
  // With mean|c| as unit a, dc gains sign(c)·mean(d·(f - c·s))/a before its mean is taken.
  void backward(int64_t row, const Scratch& scratch, float* dweight, float* dbias) const {
    const int64_t n = in.n;
    const T *x = static_cast<const T*>(in.x) + row * in.x_stride,
            *g = static_cast<const T*>(in.grad) + row * in.grad_stride;
    T* dx = static_cast<T*>(in.out) + row * n;
    float *f = scratch[0], *slope = scratch[1], *c = scratch[2], a;
    const float *kept = in.stats + STATS * row, mean = kept[0], rest = kept[1], shift = kept[2], r = kept[3];
    const float before = standardize_first ? r : 1.0f, after = standardize_first ? 1.0f : r;
    // Only what is read again is kept: the nearest cache holds some eight rows of width 1024.
    const bool keep_c = mean_abs || standardize_first;
    if (keep_c) each<4>(n, BODY { store(c + i, inside(load(x + i, left) - mean - rest, left) * before, W); });
    const Lam lam_here = unit(c, a);
    Sums<2, 2> sums;  // of u, u·z
    each<2>(n, BODY {
      vf v = keep_c ? load(c + i, W) : inside(load(x + i, left) - mean - rest, left);
      vf s, value = compress<V, true>(v, lam_here, s);
      vf up = load(g + i, left), z = (value - shift) * after;
      gather(dbias, i, up);
      gather(dweight, i, up * z);
      if (in.weight) up *= load(in.weight + i, left);
      store(f + i, value, W);
      store(slope + i, s, W);
      sums.add(0, k, up);
      sums.add(1, k, up * z);
    });
    const float mean_u = rms ? 0.0f : sums.get(0) / n, mean_uz = sums.get(1) / n;

    float* dc = slope;
    Sums<3, 2> more;  // of dc, d, d·(f - c·s)
    each<2>(n, BODY {
      vf d = load(g + i, left), s = load(slope + i, W), value = load(f + i, W);
      if (in.weight) d *= load(in.weight + i, left);
      if (!standardize_first) d = inside(r * (d - mean_u - (value - shift) * after * mean_uz), left);
      store(dc + i, d * s, W);
      more.add(0, k, d * s);
      more.add(1, k, d);
      if (mean_abs) more.add(2, k, d * (value - load(c + i, W) * s));
    });
    float mean_dc = more.get(0) / n;
    if (mean_abs) {
      const float path = more.get(2) / (a * n);
      Sums<1, 2> sum;
      each<2>(n, BODY {
        vf v = load(c + i, W), all = load(dc + i, W) + (v == 0.0f ? vf{} : flipped(fill(path), v));
        store(dc + i, all, W);
        sum.add(0, k, all);
      });
      mean_dc = sum.get(0) / n;
    }
    const float offset = (rms ? more.get(1) / n : 0.0f) - mean_dc;
    if (!standardize_first) {
      each<4>(n, BODY { store(dx + i, load(dc + i, W) + offset, left); });
      return;
    }
    // The h of layer has no mean, so that of dh can be left out at once; that of rms has minus `shift`.
    Sums<1, 2> sum;
    each<2>(n, BODY { sum.add(0, k, inside((load(dc + i, W) + offset) * (load(c + i, W) - shift), left)); });
    const float mean_dhh = sum.get(0) / n;
    each<4>(n, BODY { store(dx + i, r * (load(dc + i, W) + offset - (load(c + i, W) - shift) * mean_dhh), left); });
  }

  bool run(bool forwards) const {
    if (forwards) return over_rows(in, 2, [&](int64_t row, const Scratch& s, float*, float*) { forward(row, s); });
    return over_rows(in, 3, [&](int64_t row, const Scratch& s, float* w, float* b) { backward(row, s, w, b); });
  }
};

// LayerNormalNorm.

struct Noise {
  NoiseMode mode;
  float scale;             // ξ; for DROPOUT sqrt((1 - keep_prob)/keep_prob)
  uint64_t seed;
  const float* given;      // rows × n standard normals to use instead of drawn ones, or null

  const float* row(int64_t at, int64_t n, float* buffer) const {
    if (given) std::memcpy(buffer, given + at * n, n * sizeof(float));
    else for (int64_t i = 0; i < n; i += PAD) draw(buffer + i, seed, at, i);
    return buffer;
  }
};

template <class T> struct NormalNorm {
  Common in;
  float alpha;
  Noise noise;

  // With a = |h|, l = log1p(a), d = (1 + a)·l - a and d2 = sign·((1 + a)·l² - 2d), all means over the row:
  //   dvar = 2·mean(h·d), first = dvar/2 - mean(sign·l), second = mean(h·d2 + (d - mean(d))²) - dvar²/2
  struct Newton { float mean_d, dvar, first, second; };

  // h into its buffer by h_at, l and d into theirs, and the sums over them.
  template <class H> Newton newton(H h_at, float* h, float* l, float* d) const {
    const int64_t n = in.n;
    Sums<4, 2> sums;
    each<2>(n, BODY {
      vf v = h_at(i, left), a = magnitude(v), ell = log1p_positive(a);
      vf more = (1.0f + a) * ell, deviance = more - a;
      store(h + i, v, W);
      store(l + i, ell, W);
      store(d + i, deviance, W);
      sums.add(0, k, deviance);
      sums.add(1, k, v * deviance);
      sums.add(2, k, with_sign_of(ell, v));
      sums.add(3, k, a * (more * ell - 2.0f * deviance));
    });
    Newton out;
    out.mean_d = sums.get(0) / n;
    out.dvar = 2.0f * sums.get(1) / n;
    out.first = out.dvar / 2 - sums.get(2) / n;
    Sums<1, 4> square;
    each<4>(n, BODY {
      vf v = inside(load(d + i, W) - out.mean_d, left);
      square.add(0, k, v * v);
    });
    out.second = (sums.get(3) + square.get(0)) / n - out.dvar * out.dvar / 2;
    return out;
  }

  // η for h >= 0 and for h < 0, and its inverse. expm1(η·l)/η tends to l: a tiny η gives that without a branch.
  struct Eta {
    float plus, minus, plus_inverse, minus_inverse;
    explicit Eta(float lam) : plus(safe(lam)), minus(safe(2.0f - lam)) {
      plus_inverse = 1.0f / plus;
      minus_inverse = 1.0f / minus;
    }
    static float safe(float eta) { return std::fabs(eta) < 1e-30f ? 1e-30f : eta; }
    INLINE vf of(vf h) const { return h < 0.0f ? fill(minus) : fill(plus); }
    INLINE vf inverse(vf h) const { return h < 0.0f ? fill(minus_inverse) : fill(plus_inverse); }
  };

  // q = p + normals·(plain + product·p); `p` and its mean are needed where the noise is scaled by mean|p - mean(p)|.
  struct Scales { float plain, product; };
  Scales scales(const float* p, float mean) const {
    switch (noise.mode) {
      case SCALED: {
        Sums<1, 4> sum;
        each<4>(in.n, BODY { sum.add(0, k, magnitude(inside(load(p + i, W) - mean, left))); });
        return {noise.scale * sum.get(0) / in.n, 0.0f};
      }
      case UNSCALED: return {noise.scale * 0.7978845608028654f, 0.0f};  // sqrt(2/π)
      case DROPOUT: return {0.0f, noise.scale};
      default: return {0.0f, 0.0f};
    }
  }

  // Kept of a row: mean, rest, r, λ̂.
  void forward(int64_t row, const Scratch& scratch) const {
    const int64_t n = in.n;
    const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
    T* y = static_cast<T*>(in.out) + row * n;
    float *h = scratch[0], *l = scratch[1], *d = scratch[2], *normals = scratch[3], mean, rest;
    deviation(x, n, h, mean, rest);
    Sums<1, 4> square;
    each<4>(n, BODY {
      vf v = inside(load(h + i, W) - rest, left);
      store(h + i, v, W);
      square.add(0, k, v * v);
    });
    const float r = 1.0f / std::sqrt(square.get(0) / n + in.eps);
    const Newton step = newton([&](int64_t i, int64_t) { return load(h + i, W) * r; }, h, l, d);
    const float lam = 1.0f - alpha * step.first / (step.second + std::sqrt(in.eps));
    const Eta eta(lam);
    float* p = d;
    Sums<1, 2> sum;
    each<2>(n, BODY {
      vf v = load(h + i, W);
      vf value = flipped(exponential(eta.of(v) * load(l + i, W)).minus_one * eta.inverse(v), v);
      store(p + i, value, W);
      sum.add(0, k, value);  // 0 behind the row's end
    });
    const Scales by = scales(p, sum.get(0) / n);
    if (noise.mode != NONE) noise.row(row, n, normals);
    each<4>(n, BODY {
      vf q = load(p + i, W);
      if (noise.mode != NONE) q += load(normals + i, W) * (by.plain + by.product * q);
      finish(in, y, i, q, left);
    });
    const float kept[STATS] = {mean, rest, r, lam};
    std::memcpy(in.stats + STATS * row, kept, sizeof kept);
  }

  // u = g·weight·∂q/∂p, T = Σ u·∂ψ/∂λ, D = second + sqrt(eps), e = 1/(1 + a), v = d + a·l:
  //   dh = u·(1 + a)^(η - 1) + A·(v - e) + B·(d2 + h·l² - 2·dvar·v + 2·sign·l·(d - mean(d))),
  //   A = -alpha·T/(n·D), B = alpha·T·first/(n·D²), and dx = r·(dh - mean(dh) - h·mean(dh·h))
  void backward(int64_t row, const Scratch& scratch, float* dweight, float* dbias) const {
    const int64_t n = in.n;
    const T *x = static_cast<const T*>(in.x) + row * in.x_stride,
            *g = static_cast<const T*>(in.grad) + row * in.grad_stride;
    T* dx = static_cast<T*>(in.out) + row * n;
    float *h = scratch[0], *l = scratch[1], *d = scratch[2], *normals = scratch[3], *u = scratch[4], *p = scratch[5];
    const float *kept = in.stats + STATS * row, mean = kept[0], rest = kept[1], r = kept[2], lam = kept[3];
    const Newton step =
        newton([&](int64_t i, int64_t left) { return inside(load(x + i, left) - mean - rest, left) * r; }, h, l, d);
    const Eta eta(lam);
    const bool noisy = noise.mode != NONE && (dweight || noise.mode == DROPOUT);
    if (noisy) noise.row(row, n, normals);

    Sums<2, 2> sums;  // of u·∂ψ/∂λ, p
    each<2>(n, BODY {
      vf v = load(h + i, W), ell = load(l + i, W), up = load(g + i, left);
      vf q = eta.of(v) * ell, inverse = eta.inverse(v);
      const Exp e = exponential(q);
      vf value = flipped(e.minus_one * inverse, v);
      gather(dbias, i, up);
      if (noisy) store(p + i, value, W);
      else gather(dweight, i, up * value);
      if (in.weight) up *= load(in.weight + i, left);
      if (noise.mode == DROPOUT) up *= 1.0f + noise.scale * load(normals + i, W);
      // ∂ψ/∂λ = (q·e^q - expm1(q))/η², which has no digits left near q = 0: there its series
      static const float series[] = {0.5f, 1 / 3.0f, 0.125f, 1 / 30.0f, 1 / 144.0f, 1 / 840.0f, 1 / 5760.0f};
      vf near = ell * ell * polynomial(q, series), far = (q * e.value - e.minus_one) * inverse * inverse;
      sums.add(0, k, up * (magnitude(q) < 0.5f ? near : far));
      sums.add(1, k, value);
      store(u + i, up * e.value * inverse_of(1.0f + magnitude(v)), W);
    });

    if (noisy && dweight) {
      const Scales by = scales(p, sums.get(1) / n);
      each<2>(n, BODY {
        vf q = load(p + i, W);
        gather(dweight, i, load(g + i, left) * (q + load(normals + i, W) * (by.plain + by.product * q)));
      });
    }

    const float denominator = step.second + std::sqrt(in.eps);
    const float A = -alpha * sums.get(0) / (n * denominator), B = -A * step.first / denominator;
    Sums<2, 2> more;  // of dh, dh·h
    each<2>(n, BODY {
      vf v = load(h + i, W), a = magnitude(v), ell = load(l + i, W), deviance = load(d + i, W);
      vf both = deviance + a * ell;
      // sign·(d2 + h·l² + 2·sign·l·(d - mean(d)))
      vf odd = (1.0f + 2.0f * a) * ell * ell - 2.0f * deviance + 2.0f * ell * (deviance - step.mean_d);
      vf dh = load(u + i, W) + A * (both - inverse_of(1.0f + a)) + B * (flipped(odd, v) - 2.0f * step.dvar * both);
      dh = inside(dh, left);
      store(u + i, dh, W);
      more.add(0, k, dh);
      more.add(1, k, dh * v);
    });
    const float mean_dh = more.get(0) / n, mean_dhh = more.get(1) / n;
    each<4>(n, BODY { store(dx + i, r * (load(u + i, W) - mean_dh - load(h + i, W) * mean_dhh), left); });
  }

  bool run(bool forwards) const {
    if (forwards) return over_rows(in, 4, [&](int64_t row, const Scratch& s, float*, float*) { forward(row, s); });
    return over_rows(in, 6, [&](int64_t row, const Scratch& s, float* w, float* b) { backward(row, s, w, b); });
  }
};

template <class T> bool ib_norm(const Common& in, int variant, int flags, float lam, bool forwards) {
  if (lam < 1.17549435e-38f) variant = LINEAR, lam = 1.0f;  // the limit of L and T is the identity
  // A linear f is the same in every unit.
  const bool mean_abs = flags & MEAN_ABS && variant != LINEAR, rms = flags & RMS, first = flags & STANDARDIZE_FIRST;
  switch (variant) {
    case LINEAR: return IBNorm<LINEAR, T>{in, lam, mean_abs, rms, first}.run(forwards);
    case LOG: return IBNorm<LOG, T>{in, lam, mean_abs, rms, first}.run(forwards);
    default: return IBNorm<TANH, T>{in, lam, mean_abs, rms, first}.run(forwards);
  }
}

}  // namespace

// The C interface: hf_ibnorm/kernels/cpu/__init__.py declares the same. Each returns 0, or 1 where memory ran out.
extern "C" {

int hf_ibnorm_has_float16() { return HAS_FLOAT16; }

int hf_ibnorm_ib_norm(const Common* in, int variant, int flags, const float* lam, int forwards) {
  switch (in->dtype) {
    case FLOAT32: return !ib_norm<float>(*in, variant, flags, *lam, forwards);
    case BFLOAT16: return !ib_norm<bf16>(*in, variant, flags, *lam, forwards);
    default: return !ib_norm<f16>(*in, variant, flags, *lam, forwards);
  }
}

int hf_ibnorm_normal_norm(const Common* in, float alpha, int mode, float scale, const int64_t* seed, const float* given,
                          int forwards) {
  const Noise noise{NoiseMode(mode), scale, seed ? uint64_t(*seed) : 0, given};
  switch (in->dtype) {
    case FLOAT32: return !NormalNorm<float>{*in, alpha, noise}.run(forwards);
    case BFLOAT16: return !NormalNorm<bf16>{*in, alpha, noise}.run(forwards);
    default: return !NormalNorm<f16>{*in, alpha, noise}.run(forwards);
  }
}

// The standard normals that a norm draws: rows × n.
int hf_ibnorm_normals(float* out, const int64_t* seed, int64_t rows, int64_t n) {
  Scratch buffer(n, 1);
  if (!buffer.base) return 1;
  const Noise noise{UNSCALED, 1.0f, uint64_t(*seed), nullptr};
  for (int64_t row = 0; row < rows; row++) std::memcpy(out + row * n, noise.row(row, n, buffer[0]), n * sizeof(float));
  return 0;
}

// For tests: which = 0 log1p(v), v >= 0; 1 expm1(v); 2 exp(v); 3 tanh(v); 4 the slope of tanh.
void hf_ibnorm_elementary(int which, const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    vf v = load(in + i, n - i), slope, value;
    if (which == 0) value = log1p_positive(v);
    else if (which <= 2) value = which == 1 ? exponential(v).minus_one : exponential(v).value;
    else value = compress<TANH, true>(v, Lam(1.0f), slope);
    store(out + i, which == 4 ? slope : value, n - i);
  }
}

}  // extern "C"
