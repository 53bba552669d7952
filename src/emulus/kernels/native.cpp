// Kernels for decoding on the CPU: few tokens, so that every weight is read once and memory bandwidth is the limit.
//
// Rule kept everywhere: what is computed for one token is added up in an order that depends on neither the number of
// tokens, nor its neighbours, nor the number of threads. A product therefore has one accumulator of 16 lanes for each
// (token, row), run through from the first input to the last, whatever block of tokens and rows it is part of.
// -ffp-contract=off keeps the compiler from fusing what is not written as fma.
//
// V is 16 floats: one AVX-512 register, two AVX2 registers, or whatever the compiler makes of a vector.
// EMULUS_AVX2 and EMULUS_PORTABLE choose the lesser ones on a machine that has more.

#include <type_traits>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    !defined(EMULUS_AVX2) && !defined(EMULUS_PORTABLE)
#define LEVEL_512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && !defined(EMULUS_PORTABLE)
#define LEVEL_256
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------------------------------------- 16 floats

#if defined(LEVEL_512)

using V = __m512;
#define KEEP(x) asm("" : "+v"(x))

INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V all(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE V load(const float* p, int count) { return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE void store(float* p, V x, int count) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V power_of_two(V n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE V from_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE float sum(V x) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#elif defined(LEVEL_256)

struct V {
    __m256 low, high;
};

INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, V x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
INLINE V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V div(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V max(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE V min(V a, V b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE V round(V x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE V power_of_two(V n) { return {power_of_two(n.low), power_of_two(n.high)}; }
INLINE __m256 eight_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE V from_bf16(const uint16_t* p) { return {eight_bf16(p), eight_bf16(p + 8)}; }
INLINE float sum(V x) {
    __m256 a = _mm256_add_ps(x.low, x.high);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#else

// Vectors as GCC and Clang have them for every machine.
typedef float V __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class T>
INLINE T take(const void* p) {
    T result;
    std::memcpy(&result, p, sizeof(T));
    return result;
}
INLINE V zero() { return V{}; }
INLINE V all(float x) { return V{} + x; }
INLINE V load(const float* p) { return take<V>(p); }
INLINE void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
INLINE V add(V a, V b) { return a + b; }
INLINE V sub(V a, V b) { return a - b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V div(V a, V b) { return a / b; }
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V min(V a, V b) { return a < b ? a : b; }
INLINE V fma(V a, V b, V c) {
#if defined(__clang__) && __has_builtin(__builtin_elementwise_fma)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c;
#endif
}
INLINE V round(V x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2**23 leaves no room for a fraction
INLINE V power_of_two(V n) { return (V)((__builtin_convertvector(n, Ints) + 127) << 23); }
INLINE V from_bf16(const uint16_t* p) { return (V)(__builtin_convertvector(take<Halves>(p), Bits) << 16); }
INLINE float sum(V x) {
    float part[16];
    store(part, x);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] + part[i + half];
    return part[0];
}

#endif

#if !defined(LEVEL_512)
#define KEEP(x)
INLINE V load(const float* p, int count) {
    float part[16] = {};
    std::memcpy(part, p, count * sizeof(float));
    return load(part);
}
INLINE void store(float* p, V x, int count) {
    float part[16];
    store(part, x);
    std::memcpy(p, part, count * sizeof(float));
}
#endif

INLINE V from_bf16(const uint16_t* p, int count) {
#if defined(LEVEL_512)
    const __m256i bits = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
    uint16_t part[16] = {};
    std::memcpy(part, p, count * sizeof(uint16_t));
    return from_bf16(part);
#endif
}
INLINE V load(const uint16_t* p) { return from_bf16(p); }
INLINE V load(const uint16_t* p, int count) { return from_bf16(p, count); }

#if defined(LEVEL_256)
INLINE V split(float low, float high) { return {_mm256_set1_ps(low), _mm256_set1_ps(high)}; }
#elif !defined(LEVEL_512)
INLINE V split(float low, float high) {
    return V{low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
}
#endif

INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even; not a number stays so
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(uint16_t* p, float x) { *p = to_bf16(x); }

INLINE float largest(V x) {
    float part[16];
    store(part, x);
    return *std::max_element(part, part + 16);
}

// e**x to about one unit in the last place, for x in [-87, 88]; smaller and larger x give the ends' values.
INLINE V exp(V x) {
    x = min(max(x, all(-87.0f)), all(88.0f));
    const V n = round(mul(x, all(1.44269504f)));
    V r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, all(1.0f)));
    return mul(p, power_of_two(n));
}

// The sums of 16 vectors in one.
INLINE V sums(const V* a) {
#if defined(LEVEL_512)
    V four[4];
    for (int i = 0; i < 4; i++) {
        const V *b = a + 4 * i;
        const V x = add(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
        const V y = add(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3]));
        const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
        four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)), _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
    }
    V two[2];
    for (int i = 0; i < 2; i++)
        two[i] = add(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                     _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return add(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
#else
    float part[16];
    for (int i = 0; i < 16; i++) part[i] = sum(a[i]);
    return load(part);
#endif
}

// ---------------------------------------------------------------------------------------------- memory, threads

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Memory that is kept between calls, for each thread that calls.
class Scratch {
  public:
    float* floats(int64_t count) {
        const size_t bytes = (size_t)count * sizeof(float) + 64;
        if (bytes > size_) {
            memory_.reset(new char[bytes]);
            size_ = bytes;
        }
        float* const floats = (float*)(((uintptr_t)memory_.get() + 63) & ~(uintptr_t)63);
#ifdef FILL_UNINITIALIZED  // for tests: whoever reads what it has not written gets NaN
        std::fill(floats, floats + count, std::numeric_limits<float>::quiet_NaN());
#endif
        return floats;
    }

  private:
    std::unique_ptr<char[]> memory_;
    size_t size_ = 0;
};
thread_local Scratch scratch;

template <class F>
void parallel(int64_t tasks, int threads, const F& run) {
#ifdef _OPENMP
    if (threads > 1 && tasks > 1) {
        const int used = (int)std::min<int64_t>(threads, tasks);
#pragma omp parallel for num_threads(used) schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) run(task);
        return;
    }
#endif
    (void)threads;
    for (int64_t task = 0; task < tasks; task++) run(task);
}

// ---------------------------------------------------------------------------------------------- weights
//
// Weights are read in lines of 64 bytes. A format says how many vectors of 16 inputs a line gives, which inputs these
// are (so that activations can be laid out alike), and how to get them from a line.

#if defined(LEVEL_512)
struct Line {
    __m512i bits;
};
INLINE Line line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE Line line(const uint8_t* p, int bytes) { return {_mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), p)}; }
#else
struct Line {
    alignas(64) uint8_t bytes[64];
};
INLINE Line line(const uint8_t* p) {
    Line result;
    std::memcpy(result.bytes, p, 64);
    return result;
}
INLINE Line line(const uint8_t* p, int bytes) {
    Line result = {};
    std::memcpy(result.bytes, p, bytes);
    return result;
}
#endif

struct Float32 {
    static constexpr int vectors = 1;
    static constexpr bool grouped = false, rounded = false;
    const uint8_t* rows;
    int64_t row_bytes;
    static constexpr int input(int, int lane) { return lane; }
    static INLINE V get(const Line& w, int) {
#if defined(LEVEL_512)
        return _mm512_castsi512_ps(w.bits);
#else
        return load((const float*)w.bytes);
#endif
    }
    INLINE float finish(int64_t, float total) const { return total; }
    INLINE void prefetch_scales(int64_t) const {}
};

// Two neighbours share 32 bits: the first vector of a line holds the even inputs, the second the odd ones.
struct BFloat16 {
    static constexpr int vectors = 2;
    static constexpr bool grouped = false, rounded = false;
    const uint8_t* rows;
    int64_t row_bytes;
    static constexpr int input(int vector, int lane) { return 2 * lane + vector; }
    static INLINE V get(const Line& w, int vector) {
#if defined(LEVEL_512)
        return _mm512_castsi512_ps(vector ? _mm512_and_si512(w.bits, _mm512_set1_epi32((int)0xffff0000))
                                          : _mm512_slli_epi32(w.bits, 16));
#elif defined(LEVEL_256)
        __m256i low = _mm256_load_si256((const __m256i*)w.bytes), high = _mm256_load_si256((const __m256i*)w.bytes + 1);
        const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
        low = vector ? _mm256_and_si256(low, mask) : _mm256_slli_epi32(low, 16);
        high = vector ? _mm256_and_si256(high, mask) : _mm256_slli_epi32(high, 16);
        return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
#else
        const Bits pairs = take<Bits>(w.bytes);
        return (V)(vector ? pairs & 0xffff0000u : pairs << 16);
#endif
    }
    INLINE float finish(int64_t, float total) const { return total; }
    INLINE void prefetch_scales(int64_t) const {}
};

struct Int8 {
    static constexpr int vectors = 4;
    static constexpr bool grouped = false, rounded = false;
    const uint8_t* rows;
    int64_t row_bytes;
    const float* scale;
    static constexpr int input(int vector, int lane) { return 16 * vector + lane; }
    static INLINE V get(const Line& w, int vector) {
#if defined(LEVEL_512)
        __m128i part = _mm512_castsi512_si128(w.bits);
        if (vector == 1) part = _mm512_extracti32x4_epi32(w.bits, 1);
        if (vector == 2) part = _mm512_extracti32x4_epi32(w.bits, 2);
        if (vector == 3) part = _mm512_extracti32x4_epi32(w.bits, 3);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part));
#elif defined(LEVEL_256)
        const __m128i part = _mm_load_si128((const __m128i*)w.bytes + vector);
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(part, 8)))};
#else
        return __builtin_convertvector(take<Bytes>(w.bytes + 16 * vector), V);
#endif
    }
    INLINE float finish(int64_t row, float total) const { return total * scale[row]; }
    INLINE void prefetch_scales(int64_t row) const { prefetch(scale + row); }
};

// A lane holds 8 neighbours in 32 bits; lanes 0-7 are one group of 64 inputs, lanes 8-15 the next.
// weight = low + scale * q, so a group adds scale * sum(q * x) + low * sum(x).
struct Int4 {
    static constexpr int vectors = 8;
    static constexpr bool grouped = true, rounded = false;
    const uint8_t* rows;
    int64_t row_bytes;
    const uint16_t *scale, *low;
    int64_t groups;
    static constexpr int input(int vector, int lane) { return 8 * lane + vector; }
    static INLINE V get(const Line& w, int vector) {
#if defined(LEVEL_512)
        const V table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(w.bits, 4 * vector), table);
#elif defined(LEVEL_256)
        const __m256i low = _mm256_load_si256((const __m256i*)w.bytes), mask = _mm256_set1_epi32(15);
        const __m256i high = _mm256_load_si256((const __m256i*)w.bytes + 1);
        return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(low, 4 * vector), mask)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(high, 4 * vector), mask))};
#else
        return __builtin_convertvector((take<Bits>(w.bytes) >> (4 * vector)) & 15u, V);
#endif
    }
    // The values of two neighbouring groups, each in its lanes.
    static INLINE V two(const uint16_t* p, bool both) {
        uint32_t bits = p[0];
        if (both) std::memcpy(&bits, p, 4);
#if defined(LEVEL_512)
        const __m512i shifts = _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m512i moved = _mm512_sllv_epi32(_mm512_set1_epi32((int)bits), shifts);
        return _mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32((int)0xffff0000)));
#else
        const uint32_t first = bits << 16, second = bits & 0xffff0000;
        float a, b;
        std::memcpy(&a, &first, 4);
        std::memcpy(&b, &second, 4);
        return split(a, b);
#endif
    }
    INLINE float finish(int64_t, float total) const { return total; }
    INLINE void prefetch_scales(int64_t row) const {
        for (int64_t i = 0; i < 4 * groups; i += 32) {
            prefetch(scale + row * groups + i);
            prefetch(low + row * groups + i);
        }
    }
};

// The same weights for activations that are rounded to 8 bits, in groups of 64 as well: sums of whole numbers, which
// are exact, so that all that is lost is in the rounding.
struct Rounded4 : Int4 {
    static constexpr bool rounded = true;
    struct Halves {
        Line even, odd;
    };
    static INLINE Halves halves(const Line& w) {
#if defined(LEVEL_512)
        const __m512i mask = _mm512_set1_epi8(15);
        return {{_mm512_and_si512(w.bits, mask)}, {_mm512_and_si512(_mm512_srli_epi16(w.bits, 4), mask)}};
#else
        Halves result;
        for (int i = 0; i < 64; i++) {
            result.even.bytes[i] = w.bytes[i] & 15;
            result.odd.bytes[i] = w.bytes[i] >> 4;
        }
        return result;
#endif
    }
    // The scales or low ends of a row's 16 groups from `group` on, or of as many as there are.
    INLINE V of_groups(const uint16_t* values, int64_t row, int64_t group) const {
        return from_bf16(values + row * groups + group, (int)std::min<int64_t>(16, groups - group));
    }
    // Two neighbours of them, each in the lanes of its group.
    static INLINE V spread(V values, int pair) {
#if defined(LEVEL_512)
        const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        return _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(2 * pair)), values);
#else
        float part[16];
        store(part, values);
        return split(part[2 * pair], part[2 * pair + 1]);
#endif
    }
    // Each lane's sum of 8 products, as a float.
    static INLINE V dot(const Halves& w, const Line& even, const Line& odd) {
#if defined(LEVEL_512)
#if defined(__AVX512VNNI__)
        const __m512i first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.even.bits, even.bits);
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(first, w.odd.bits, odd.bits));
#else
        // Two products of at most 15 * 127, and two of those, fit 16 bits.
        const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(w.even.bits, even.bits),
                                               _mm512_maddubs_epi16(w.odd.bits, odd.bits));
        return _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
#elif defined(LEVEL_256)
        __m256 parts[2];
        for (int i = 0; i < 2; i++) {
            const auto part = [i](const Line& x) { return _mm256_load_si256((const __m256i*)x.bytes + i); };
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(part(w.even), part(even)),
                                                   _mm256_maddubs_epi16(part(w.odd), part(odd)));
            parts[i] = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        return {parts[0], parts[1]};
#else
        Ints total{};
        for (int shift = 24; shift >= 0; shift -= 8) {
            // The byte's sign comes with it from the left.
            total += ((take<Ints>(even.bytes) << shift) >> 24) * ((take<Ints>(w.even.bytes) << shift) >> 24);
            total += ((take<Ints>(odd.bytes) << shift) >> 24) * ((take<Ints>(w.odd.bytes) << shift) >> 24);
        }
        return __builtin_convertvector(total, V);
#endif
    }
};

// ---------------------------------------------------------------------------------------------- products

// Tokens of a block at most, and rows of a block: as many as have room for their totals in the registers.
#if defined(LEVEL_512)
template <class W>
constexpr int most_tokens = W::grouped && !W::rounded ? 6 : 8;
constexpr int USUAL_TOKENS = 6;
template <class W>
constexpr int block_rows(int tokens) {
    return tokens > (W::rounded ? 4 : W::grouped ? 2 : 6) ? 2 : 4;
}
#else
template <class W>
constexpr int most_tokens = 3;
constexpr int USUAL_TOKENS = 3;
template <class W>
constexpr int block_rows(int tokens) {
    return tokens == 1 && !W::grouped ? 4 : 2;
}
#endif

// Vectors of packed activations that a token has in each line; grouped weights need the sums of the others as well.
template <class W>
constexpr int packed_vectors = W::vectors + (W::grouped ? 1 : 0);

// Floats of packed activations that a token has.
template <class W>
int64_t packed_size(const W&, int64_t lines) {
    return lines * packed_vectors<W> * 16;
}

// Lay activations out as a block of tokens reads them: line by line, vector by vector, token by token.
template <class W>
void pack(const W&, const float* x, int64_t x_stride, int64_t in, int64_t lines, int64_t tokens, float* packed) {
    constexpr int per_line = 16 * W::vectors;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t l = 0; l < lines; l++) {
            float part[per_line] = {};
            const float* inputs = x + t * x_stride + l * per_line;
            const int64_t left = in - l * per_line;
            if (left < per_line) inputs = (const float*)std::memcpy(part, inputs, left * sizeof(float));
            float* to = packed + (l * packed_vectors<W> * tokens + t) * 16;
            for (int v = 0; v < W::vectors; v++)
                for (int i = 0; i < 16; i++) to[v * tokens * 16 + i] = inputs[W::input(v, i)];
            if constexpr (W::grouped) {
                V total = zero();
                for (int v = 0; v < W::vectors; v++) total = add(total, load(to + v * tokens * 16));
                store(to + W::vectors * tokens * 16, total);
            }
        }
}

// Rounded activations: for every 8 lines the sums of their 16 groups, then line by line, of each token, 64 even and 64
// odd inputs as bytes and the scales of the two groups.
constexpr int ROUNDED_FLOATS = 48;

int64_t packed_size(const Rounded4&, int64_t lines) { return lines * ROUNDED_FLOATS + (lines + 7) / 8 * 16; }

// Round a group of 64; gives the sum of what it was rounded to.
INLINE float round_group(const float* group, int8_t* even, int8_t* odd, float* scales) {
    V most = zero();
    for (int i = 0; i < 64; i += 16) most = max(max(load(group + i), sub(zero(), load(group + i))), most);
    const float size = largest(most), scale = size / 127.0f;
    const V by = all(size > 0 ? 127.0f / size : 0.0f);
    float rounded[64];
    V total = zero();
    for (int i = 0; i < 64; i += 16) {
        const V whole = round(mul(load(group + i), by));
        store(rounded + i, whole);
        total = add(total, whole);
    }
    for (int i = 0; i < 32; i++) {
        even[i] = (int8_t)rounded[2 * i];
        odd[i] = (int8_t)rounded[2 * i + 1];
    }
    std::fill(scales, scales + 8, scale);
    return scale * sum(total);
}

void pack(const Rounded4&, const float* x, int64_t x_stride, int64_t in, int64_t lines, int64_t tokens, float* packed) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t l = 0; l < lines; l++) {
            float* sums = packed + (l / 8 * (8 * ROUNDED_FLOATS + 16) * tokens) + t * 16;
            float* to = packed + ((l / 8 + 1) * 16 + l * ROUNDED_FLOATS) * tokens + t * ROUNDED_FLOATS;
            if (l % 8 == 0) std::fill(sums, sums + 16, 0.0f);
            for (int half = 0; half < 2; half++) {
                const int64_t begin = l * 128 + half * 64;
                float part[64] = {};
                const float* group = x + t * x_stride + begin;
                if (in - begin < 64)
                    group = (const float*)std::memcpy(part, group, std::max<int64_t>(in - begin, 0) * sizeof(float));
                int8_t* bytes = (int8_t*)to + half * 32;
                sums[l % 8 * 2 + half] = round_group(group, bytes, bytes + 64, to + 32 + half * 8);
            }
        }
}

// A loop that is unrolled whatever the optimiser thinks, so that arrays of vectors stay in registers.
template <class F, int... I>
INLINE void unroll(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class F>
INLINE void each(const F& f) {
    unroll(f, std::make_integer_sequence<int, COUNT>());
}

template <int ROWS, int TOKENS>
struct Totals {
    V of[ROWS][TOKENS];
};

// The part of a block's activations that is multiplied: all its tokens, or one by itself, where few rows are left over.
template <int TOKENS>
struct Share {
    int64_t all, first;
    INLINE int64_t tokens() const { return TOKENS == 1 ? all : TOKENS; }
    INLINE int64_t begin() const { return TOKENS == 1 ? first : 0; }
};

// Rows times tokens for one vector of inputs. Each vector is loaded once and kept in its register: compilers would put
// the load into every multiplication, and so many loads leave the cache no time to take in new lines.
template <class W, int ROWS, int TOKENS, class F>
INLINE void add_vector(const Line* lines, const float* x, Share<TOKENS> share, int vector, const F& add_product) {
    V weights[ROWS];
    each<ROWS>([&](auto r) INLINE_LAMBDA { weights[r] = W::get(lines[r], vector); });
    each<TOKENS>([&](auto t) INLINE_LAMBDA {
        V inputs = load(x + (vector * share.tokens() + t) * 16);
        KEEP(inputs);
        each<ROWS>([&](auto r) INLINE_LAMBDA { add_product(r, t, weights[r], inputs); });
    });
}

template <class W, int ROWS, int TOKENS>
INLINE void add_lines(const W& w, int64_t row, int64_t l, const Line* lines, const float* x, Share<TOKENS> share,
                      Totals<ROWS, TOKENS>& totals) {
    if constexpr (W::grouped) {
        Totals<ROWS, TOKENS> parts;
        each<W::vectors>([&](auto v) INLINE_LAMBDA {
            add_vector<W, ROWS, TOKENS>(lines, x, share, v, [&](auto r, auto t, V weights, V inputs) INLINE_LAMBDA {
                parts.of[r][t] = v == 0 ? mul(weights, inputs) : fma(weights, inputs, parts.of[r][t]);
            });
        });
        const bool both = 2 * l + 1 < w.groups;
        each<ROWS>([&](auto r) INLINE_LAMBDA {
            const int64_t group = (row + r) * w.groups + 2 * l;
            const V scale = W::two(w.scale + group, both), low = W::two(w.low + group, both);
            each<TOKENS>([&](auto t) INLINE_LAMBDA {
                V& total = totals.of[r][t];
                const V inputs = load(x + (W::vectors * share.tokens() + t) * 16);
                total = fma(inputs, low, fma(parts.of[r][t], scale, total));
            });
        });
    } else {
        each<W::vectors>([&](auto v) INLINE_LAMBDA {
            add_vector<W, ROWS, TOKENS>(lines, x, share, v, [&](auto r, auto t, V weights, V inputs) INLINE_LAMBDA {
                totals.of[r][t] = fma(weights, inputs, totals.of[r][t]);
            });
        });
    }
}

// A block of rows times a block of tokens. `ahead`: the part of the next rows to be fetched meanwhile.
template <class W, int ROWS, int TOKENS>
void block(const W& w, int64_t row, const float* x, Share<TOKENS> share, float* y, int64_t y_stride,
           const uint8_t* ahead, int fetches) {
    x += share.begin() * 16;
    Totals<ROWS, TOKENS> totals;
    each<ROWS>([&](auto r) INLINE_LAMBDA {
        each<TOKENS>([&](auto t) INLINE_LAMBDA { totals.of[r][t] = zero(); });
    });
    const uint8_t* rows = w.rows + row * w.row_bytes;
    const int64_t whole = w.row_bytes / 64;
    Line lines[ROWS];
    for (int64_t l = 0; l < whole; l++) {
        for (int i = 0; i < fetches; i++, ahead += 64) prefetch(ahead);
        each<ROWS>([&](auto r) INLINE_LAMBDA { lines[r] = line(rows + r * w.row_bytes + l * 64); });
        add_lines<W, ROWS, TOKENS>(w, row, l, lines, x, share, totals);
        x += packed_vectors<W> * share.tokens() * 16;
    }
    if (const int rest = (int)(w.row_bytes % 64)) {
        each<ROWS>([&](auto r) INLINE_LAMBDA { lines[r] = line(rows + r * w.row_bytes + whole * 64, rest); });
        add_lines<W, ROWS, TOKENS>(w, row, whole, lines, x, share, totals);
    }
    each<ROWS>([&](auto r) INLINE_LAMBDA {
        each<TOKENS>([&](auto t) INLINE_LAMBDA {
            y[t * y_stride + row + r] = w.finish(row + r, sum(totals.of[r][t]));
        });
    });
}

template <class W, int ROWS, int TOKENS>
void block(const Rounded4& w, int64_t row, const float* x, Share<TOKENS> share, float* y, int64_t y_stride,
           const uint8_t* ahead, int fetches) {
    Totals<ROWS, TOKENS> totals;
    each<ROWS>([&](auto r) INLINE_LAMBDA {
        each<TOKENS>([&](auto t) INLINE_LAMBDA { totals.of[r][t] = zero(); });
    });
    const uint8_t* rows = w.rows + row * w.row_bytes;
    for (int64_t group = 0; group < w.groups; group += 16) {
        V scales[ROWS];
        each<ROWS>([&](auto r) INLINE_LAMBDA {
            scales[r] = w.of_groups(w.scale, row + r, group);
            const V low = w.of_groups(w.low, row + r, group);
            each<TOKENS>([&](auto t) INLINE_LAMBDA {
                totals.of[r][t] = fma(low, load(x + (share.begin() + t) * 16), totals.of[r][t]);
            });
        });
        x += share.tokens() * 16;
        const int some = (int)std::min<int64_t>(16, w.groups - group);
        for (int pair = 0; 2 * pair < some; pair++, x += share.tokens() * ROUNDED_FLOATS) {
            for (int i = 0; i < fetches; i++, ahead += 64) prefetch(ahead);
            Rounded4::Halves weights[ROWS];
            V scale[ROWS];
            each<ROWS>([&](auto r) INLINE_LAMBDA {
                const uint8_t* from = rows + r * w.row_bytes + (group / 2 + pair) * 64;
                weights[r] = Rounded4::halves(2 * pair + 1 < some ? line(from) : line(from, 32));
                scale[r] = Rounded4::spread(scales[r], pair);
            });
            each<TOKENS>([&](auto t) INLINE_LAMBDA {
                const float* inputs = x + (share.begin() + t) * ROUNDED_FLOATS;
                const Line even = line((const uint8_t*)inputs), odd = line((const uint8_t*)(inputs + 16));
                V by = load(inputs + 32);
                KEEP(by);
                each<ROWS>([&](auto r) INLINE_LAMBDA {
                    const V product = mul(Rounded4::dot(weights[r], even, odd), scale[r]);
                    totals.of[r][t] = fma(product, by, totals.of[r][t]);
                });
            });
        }
    }
    each<ROWS>([&](auto r) INLINE_LAMBDA {
        each<TOKENS>([&](auto t) INLINE_LAMBDA { y[t * y_stride + row + r] = sum(totals.of[r][t]); });
    });
}

// As many rows as fit, times all tokens.
template <class W, int TOKENS>
void block_of(int64_t tokens, const W& w, int64_t row, const float* x, float* y, int64_t y_stride,
              const uint8_t* ahead, int fetches) {
    if constexpr (TOKENS > 1)
        if (tokens < TOKENS) return block_of<W, TOKENS - 1>(tokens, w, row, x, y, y_stride, ahead, fetches);
    block<W, block_rows<W>(TOKENS), TOKENS>(w, row, x, {TOKENS, 0}, y, y_stride, ahead, fetches);
}

// Rows of weights that are gone through with all tokens before the next, so that they stay in the second cache.
constexpr int64_t CHUNK_BYTES = 192 * 1024;
// Tokens that go through a chunk together, for the same reason.
constexpr int64_t TOGETHER = 48;

// How far ahead weights are fetched, 4 rows at least: far enough for memory, but no more than stays in the first cache.
constexpr int64_t AHEAD_BYTES = 6 * 1024;
// Activations of a block of tokens, which are read again for every few rows: they shall stay there too.
constexpr int64_t INPUT_BYTES = 34 * 1024;
// Rows whose scales are fetched ahead: there are few, but each is as far away as a line of weights.
constexpr int64_t SCALES_AHEAD = 16;

template <class W>
void product(const W& w, const float* x, int64_t n, int64_t x_stride, int64_t in, int64_t out, float* y, int threads) {
    const int64_t lines = (w.row_bytes + 63) / 64, size = packed_size(w, lines);
    if (in == 0) return (void)std::fill(y, y + n * out, 0.0f);
    const int64_t fit = std::max<int64_t>(INPUT_BYTES / (size * 4), 4);
    const int64_t most = std::min<int64_t>(most_tokens<W>, fit), usual = std::min<int64_t>(USUAL_TOKENS, fit);
    const int64_t blocks = n <= most ? std::min<int64_t>(n, 1) : (n + usual - 1) / usual;
    // Blocks of nearly equal size: 7 tokens as 4 and 3, not 6 and 1.
    const auto first = [=](int64_t b) { return b * n / blocks; };
    float* packed = scratch.floats(n * size);
    for (int64_t b = 0; b < blocks; b++)
        pack(w, x + first(b) * x_stride, x_stride, in, lines, first(b + 1) - first(b), packed + first(b) * size);

    int64_t chunk = std::max<int64_t>(CHUNK_BYTES / w.row_bytes, 4);
    chunk = std::min(chunk, std::max<int64_t>(out / (4 * (int64_t)threads), 16)) / 4 * 4;
    const int64_t distance = std::max<int64_t>(AHEAD_BYTES / (4 * w.row_bytes), 1) * 4;
    parallel((out + chunk - 1) / chunk, threads, [&](int64_t task) {
        const int64_t begin = task * chunk, end = std::min(out, begin + chunk);
        const int64_t step = TOGETHER / usual;
        for (int64_t b0 = 0; b0 < blocks; b0 += step) {
            const int64_t b1 = std::min(blocks, b0 + step);
            for (int64_t row = begin; row < end;) {
                const int64_t rows = std::min<int64_t>(4, end - row);
                // The rows after these are fetched meanwhile, a share of them in each block of tokens.
                if (b0 == 0) w.prefetch_scales(row + SCALES_AHEAD);
                const int64_t share = (rows * lines + b1 - b0 - 1) / (b1 - b0);
                for (int64_t b = b0; b < b1; b++) {
                    const int64_t tokens = first(b + 1) - first(b);
                    const int at_once = block_rows<W>((int)tokens);
                    const int64_t steps = lines * ((rows + at_once - 1) / at_once);
                    const int fetches = b0 ? 0 : (int)((share + steps - 1) / steps);
                    const float* from = packed + first(b) * size;
                    float* to = y + first(b) * out;
                    const uint8_t* ahead = w.rows + (row + distance) * w.row_bytes + (b - b0) * share * 64;
                    int64_t r = row;
                    for (; r + at_once <= row + rows; r += at_once, ahead += fetches * lines * 64)
                        block_of<W, most_tokens<W>>(tokens, w, r, from, to, out, ahead, fetches);
                    for (; r < row + rows; r++)
                        for (int64_t t = 0; t < tokens; t++)
                            block<W, 1, 1>(w, r, from, {tokens, t}, to + t * out, out, ahead, 0);
                }
                row += rows;
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------- attention

// Slots whose weights are taken relative to one maximum. Their parts are put together in order, so that it does not
// matter who computed them.
constexpr int64_t SPAN = 512;
constexpr int64_t SLOTS_AHEAD = 6144;  // bytes of keys or values that are on their way
constexpr int MOST_HEADS = 8;
constexpr int MOST_WIDTH = 256;

struct Lanes {
    const int64_t *base, *capacity, *position, *ready;
    int64_t kv_heads, width, layer;
    template <class T>
    INLINE T* values(int64_t token, int64_t kind, int64_t head) const {
        return (T*)base[token] + ((layer * 2 + kind) * kv_heads + head) * capacity[token] * width;
    }
};

// Of some slots: the largest score, the sum of weights relative to it, and the weighted sum of the values.
struct Part {
    float largest, total;
    float* values;
};

INLINE void merge(Part& into, const Part& from, int64_t width) {
    if (from.largest == MINUS_INFINITY) return;  // nothing there that may be seen
    const float both = std::max(into.largest, from.largest);
    float scale[16] = {into.largest - both, from.largest - both};
    const bool first = into.largest == MINUS_INFINITY;
    store(scale, exp(load(scale)));
    const V a = all(first ? 0.0f : scale[0]), b = all(scale[1]);
    into.largest = both;
    into.total = first ? from.total * scale[1] : into.total * scale[0] + from.total * scale[1];
    for (int64_t i = 0; i < width; i += 16)
        store(into.values + i, fma(load(into.values + i), a, mul(load(from.values + i), b)));
}

// Scores of 16 slots for HEADS heads, whose rows lie SPAN apart. VECTORS: of a head; 0 where that is known only now.
template <class T, int VECTORS, int HEADS>
INLINE void score(const T* keys, int64_t width, int64_t vectors, const float* q, int count, float* scores) {
    if constexpr (VECTORS > 0) vectors = VECTORS;
    V totals[HEADS][16];
    for (int s = 0; s < 16; s++) {
        const T* key = keys + std::min(s, count - 1) * width;
        for (int64_t at = 0; at < width * (int64_t)sizeof(T); at += 64) prefetch((const uint8_t*)key + SLOTS_AHEAD + at);
        V total[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) total[h] = zero();
#pragma GCC unroll 8
        for (int64_t i = 0; i < vectors; i++) {
            const int left = VECTORS > 0 ? 16 : (int)std::min<int64_t>(16, width - i * 16);
            // Each key is read, and made wide, once for all heads.
            const V part = left < 16 ? load(key + i * 16, left) : load(key + i * 16);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) total[h] = fma(load(q + (h * vectors + i) * 16), part, total[h]);
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) totals[h][s] = total[h];
    }
    for (int h = 0; h < HEADS; h++) store(scores + h * SPAN, sums(totals[h]));
}

template <class T, int VECTORS, int HEADS>
INLINE void weigh(const T* values, int64_t width, int64_t vectors, const float* weights, int64_t count,
                  const uint8_t* seen, Part* parts) {
    if constexpr (VECTORS > 0) {
        V totals[HEADS][VECTORS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) totals[h][i] = load(parts[h].values + i * 16);
        for (int64_t s = 0; s < count; s++) {
            if (seen && !seen[s]) continue;  // what lies there may be anything
            const uint8_t* ahead = (const uint8_t*)(values + s * width) + SLOTS_AHEAD;
            for (int64_t at = 0; at < width * (int64_t)sizeof(T); at += 64) prefetch(ahead + at);
            V value[VECTORS];
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) value[i] = load(values + s * width + i * 16);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                const V weight = all(weights[h * SPAN + s]);
#pragma GCC unroll 8
                for (int i = 0; i < VECTORS; i++) totals[h][i] = fma(weight, value[i], totals[h][i]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) store(parts[h].values + i * 16, totals[h][i]);
    } else {
        for (int64_t s = 0; s < count; s++) {
            if (seen && !seen[s]) continue;
            for (int h = 0; h < HEADS; h++) {
                const V weight = all(weights[h * SPAN + s]);
                float* result = parts[h].values;
                for (int64_t i = 0; i < vectors; i++) {
                    const T* p = values + s * width + i * 16;
                    const int left = (int)std::min<int64_t>(16, width - i * 16);
                    const V value = left < 16 ? load(p, left) : load(p);
                    store(result + i * 16, fma(weight, value, load(result + i * 16)));
                }
            }
        }
    }
}

// Calls run(first head, how many) for heads in sets whose sums fit the registers.
template <int VECTORS, class F>
INLINE void in_sets(int heads, const F& run) {
    constexpr int MOST = VECTORS == 4 ? 4 : VECTORS == 8 ? 2 : 1;
    int h = 0;
    if constexpr (MOST >= 4)
        for (; h + 4 <= heads; h += 4) run(h, std::integral_constant<int, 4>());
    if constexpr (MOST >= 4)
        for (; h + 3 <= heads; h += 3) run(h, std::integral_constant<int, 3>());
    if constexpr (MOST >= 2)
        for (; h + 2 <= heads; h += 2) run(h, std::integral_constant<int, 2>());
    for (; h < heads; h++) run(h, std::integral_constant<int, 1>());
}

// Attention of some query heads, which share keys and values, over the slots from `begin` to before `end`.
template <class T, int VECTORS>
void attend_span(const Lanes& lanes, int64_t token, int64_t kv_head, const float* q, int heads, int64_t begin,
                 int64_t end, Part* parts) {
    const int64_t width = lanes.width, vectors = (width + 15) / 16, padded = vectors * 16, count = end - begin;
    const T* keys = lanes.values<T>(token, 0, kv_head) + begin * width;
    const T* values = lanes.values<T>(token, 1, kv_head) + begin * width;
    alignas(64) float scores[MOST_HEADS][SPAN];
    uint8_t seen[SPAN];
    const bool watched = lanes.ready && lanes.ready[token];
    if (watched) {
        std::memcpy(seen, (const uint8_t*)lanes.ready[token] + begin, count);
        if (lanes.position[token] < end) seen[lanes.position[token] - begin] = 1;
    }
    for (int64_t s = 0; s < count; s += 16) {
        const int some = (int)std::min<int64_t>(16, count - s);
        in_sets<VECTORS>(heads, [&](int h, auto set) {
            score<T, VECTORS, set.value>(keys + s * width, width, vectors, q + h * padded, some, scores[h] + s);
        });
    }
    const int64_t filled = (count + 15) / 16 * 16;
    for (int h = 0; h < heads; h++) {
        for (int64_t s = count; s < filled; s++) scores[h][s] = MINUS_INFINITY;
        if (watched)
            for (int64_t s = 0; s < count; s++)
                if (!seen[s]) scores[h][s] = MINUS_INFINITY;
        V most = all(MINUS_INFINITY);
        for (int64_t s = 0; s < filled; s += 16) most = max(most, load(scores[h] + s));
        parts[h].largest = largest(most);
        std::fill(parts[h].values, parts[h].values + padded, 0.0f);
        if (parts[h].largest == MINUS_INFINITY) continue;
        const V by = all(parts[h].largest);
        V total = zero();
        for (int64_t s = 0; s < filled; s += 16) {
            const V weights = exp(sub(load(scores[h] + s), by));
            store(scores[h] + s, weights);
        }
        for (int64_t s = count; s < filled; s++) scores[h][s] = 0;
        if (watched)
            for (int64_t s = 0; s < count; s++)
                if (!seen[s]) scores[h][s] = 0;
        for (int64_t s = 0; s < filled; s += 16) total = add(total, load(scores[h] + s));
        parts[h].total = sum(total);
    }
    if (parts[0].largest == MINUS_INFINITY) return;  // nothing is seen here, by any head
    for (int64_t s = 0; s < count; s += 64)
        in_sets<VECTORS>(heads, [&](int h, auto set) {
            weigh<T, VECTORS, set.value>(values + s * width, width, vectors, scores[h] + s,
                                         std::min<int64_t>(64, count - s), watched ? seen + s : nullptr, parts + h);
        });
}

template <class T, int VECTORS>
void attend(const Lanes& lanes, const float* q, int64_t q_stride, int64_t n, int64_t heads, float* y, int threads) {
    const int64_t width = lanes.width, padded = (width + 15) / 16 * 16, group = heads / lanes.kv_heads;
    const int64_t sets = (group + MOST_HEADS - 1) / MOST_HEADS, pairs = n * lanes.kv_heads * sets;
    const float root = (float)(1.0 / std::sqrt((double)width));
    int64_t spans = 1;
    for (int64_t t = 0; t < n; t++) spans = std::max(spans, lanes.position[t] / SPAN + 1);

    // The heads of one (token, kv head), at most MOST_HEADS at a time.
    struct Heads {
        int64_t token, kv_head, first;
        int count;
    };
    const auto heads_of = [=](int64_t pair) {
        const int64_t set = pair % sets, kv_head = pair / sets % lanes.kv_heads;
        const int64_t first = set * MOST_HEADS;
        return Heads{pair / sets / lanes.kv_heads, kv_head, kv_head * group + first,
                     (int)std::min<int64_t>(MOST_HEADS, group - first)};
    };
    const auto run_span = [=](const Heads& h, int64_t span, Part* parts) {
        alignas(64) float scaled[MOST_HEADS * MOST_WIDTH];
        for (int i = 0; i < h.count; i++)
            for (int64_t d = 0; d < padded; d++)
                scaled[i * padded + d] = d < width ? q[h.token * q_stride + (h.first + i) * width + d] * root : 0.0f;
        const int64_t end = std::min(lanes.position[h.token] + 1, (span + 1) * SPAN);
        attend_span<T, VECTORS>(lanes, h.token, h.kv_head, scaled, h.count, span * SPAN, end, parts);
    };
    const auto finish = [=](const Heads& h, const Part* parts) {
        for (int i = 0; i < h.count; i++) {
            const float by = 1.0f / parts[i].total;
            float* to = y + (h.token * heads + h.first + i) * width;
            for (int64_t d = 0; d < width; d++) to[d] = parts[i].values[d] * by;
        }
    };

    if (threads <= 1 || spans == 1 || pairs >= 4 * (int64_t)threads) {
        parallel(pairs, threads, [&](int64_t pair) {
            const Heads h = heads_of(pair);
            alignas(64) float sums[MOST_HEADS * MOST_WIDTH] = {}, values[MOST_HEADS * MOST_WIDTH];
            Part whole[MOST_HEADS], parts[MOST_HEADS];
            for (int i = 0; i < h.count; i++) {
                whole[i] = {MINUS_INFINITY, 0, sums + i * padded};
                parts[i] = {MINUS_INFINITY, 0, values + i * padded};
            }
            for (int64_t span = 0; span <= lanes.position[h.token] / SPAN; span++) {
                run_span(h, span, parts);
                for (int i = 0; i < h.count; i++) merge(whole[i], parts[i], padded);
            }
            finish(h, whole);
        });
        return;
    }
    // Few heads and many threads: the spans of a head are computed apart, then put together in the same order.
    const int64_t size = padded + 16;
    float* memory = scratch.floats(pairs * spans * MOST_HEADS * size);
    const auto part = [=](int64_t pair, int64_t span, int i) {
        return memory + ((pair * spans + span) * MOST_HEADS + i) * size;
    };
    parallel(pairs * spans, threads, [&](int64_t task) {
        const int64_t pair = task / spans, span = task % spans;
        const Heads h = heads_of(pair);
        if (span > lanes.position[h.token] / SPAN) return;
        Part parts[MOST_HEADS];
        for (int i = 0; i < h.count; i++) parts[i] = {MINUS_INFINITY, 0, part(pair, span, i)};
        run_span(h, span, parts);
        for (int i = 0; i < h.count; i++) {
            parts[i].values[padded] = parts[i].largest;
            parts[i].values[padded + 1] = parts[i].total;
        }
    });
    parallel(pairs, threads, [&](int64_t pair) {
        const Heads h = heads_of(pair);
        alignas(64) float sums[MOST_HEADS * MOST_WIDTH] = {};
        Part whole[MOST_HEADS];
        for (int i = 0; i < h.count; i++) {
            whole[i] = {MINUS_INFINITY, 0, sums + i * padded};
            for (int64_t span = 0; span <= lanes.position[h.token] / SPAN; span++) {
                float* values = part(pair, span, i);
                merge(whole[i], Part{values[padded], values[padded + 1], values}, padded);
            }
        }
        finish(h, whole);
    });
}

// Turn each pair (i, i + width / 2) by its angle. Rounded after each step, as PyTorch does it.
template <class T>
INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t width, T* to) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        put(to + i, x[i] * cos[i] + -x[i + half] * sin[i]);
        put(to + i + half, x[i + half] * cos[i + half] + x[i] * sin[i + half]);
    }
}

template <class T>
void rotate_and_store(const Lanes& lanes, const float* const* qkv, const int64_t* strides, int64_t n, int64_t heads,
                      const float* cos, const float* sin, float* rotated) {
    const int64_t width = lanes.width;
    for (int64_t t = 0; t < n; t++) {
        const float *c = cos + t * width, *s = sin + t * width;
        for (int64_t h = 0; h < heads; h++)
            rotate(qkv[0] + t * strides[0] + h * width, c, s, width, rotated + (t * heads + h) * width);
        for (int64_t h = 0; h < lanes.kv_heads; h++) {
            const float* v = qkv[2] + t * strides[2] + h * width;
            rotate(qkv[1] + t * strides[1] + h * width, c, s, width,
                   lanes.values<T>(t, 0, h) + lanes.position[t] * width);
            T* to = lanes.values<T>(t, 1, h) + lanes.position[t] * width;
            for (int64_t i = 0; i < width; i++) put(to + i, v[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------- choosing

constexpr uint64_t STEP = 0x9E3779B97F4A7C15ull;

INLINE uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

INLINE float uniform(uint64_t key, int64_t id) {
    const uint32_t bits = (uint32_t)(mix(key + (uint64_t)id * STEP) >> 32);
    return std::min((float)(((double)bits + 0.5) / 4294967296.0), 1.0f - 0x1p-24f);
}

INLINE int32_t ordered(float x) {  // integers that compare as the floats do
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// A value that exactly the k largest reach (with what ties with the last of them): halve the range, and count.
float kth_largest(const float* x, int64_t size, int64_t k) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < size; i++) {
        low = std::min(low, ordered(x[i]));
        high = std::max(high, ordered(x[i]));
    }
    while (low < high) {  // `low` is reached by at least k, what lies above `high` by fewer
        const int32_t middle = (int32_t)(((int64_t)low + high + 1) >> 1);
        int32_t count = 0;
        for (int64_t i = 0; i < size; i++) count += ordered(x[i]) >= middle;
        if (count >= k) low = middle;
        else high = middle - 1;
        if (count == k) break;
    }
    const int32_t bits = low ^ ((low >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The column whose value plus noise is largest. -log(u) is never below the noise of a uniform u, and the bits of u give
// a bound of it; the few columns that could still win are computed exactly.
int64_t noised(const float* x, const int32_t* columns, int64_t size, uint64_t key, int64_t first_id) {
    constexpr int64_t SOME = 256;
    float best = MINUS_INFINITY, bounds[SOME], uniforms[SOME];
    int64_t chosen = columns ? columns[0] : 0;
    for (int64_t begin = 0; begin < size; begin += SOME) {
        const int64_t count = std::min(SOME, size - begin);
        if (columns)
            for (int64_t i = 0; i < count; i++) uniforms[i] = uniform(key, first_id + columns[begin + i]);
        else
            for (int64_t i = 0; i < count; i++) uniforms[i] = uniform(key, first_id + begin + i);
        for (int64_t i = 0; i < count; i++) {
            int32_t bits;
            std::memcpy(&bits, &uniforms[i], 4);
            bounds[i] = x[begin + i] + (0.6931473f * (127.0f - (float)bits * 0x1p-23f) + 1e-4f);
        }
        for (int64_t i = 0; i < count; i++) {
            if (bounds[i] < best) continue;
            const float value = x[begin + i] + -std::log(-std::log1p(-uniforms[i]));
            if (value > best) {
                best = value;
                chosen = columns ? columns[begin + i] : begin + i;
            }
        }
    }
    return chosen;
}

struct Choice {
    const float *cond, *null;
    int64_t cond_stride, null_stride, size;
    float scale, temperature;
    int64_t k;
    const int64_t *seeds, *positions;
    int64_t first_id;
};

int64_t choose(const Choice& c, int64_t row, float* memory) {
    const float *cond = c.cond + row * c.cond_stride, *null = c.null ? c.null + row * c.null_stride : nullptr;
    const float* x = cond;
    if (null) {
        for (int64_t i = 0; i < c.size; i++) memory[i] = null[i] + c.scale * (cond[i] - null[i]);
        x = memory;
    }
    if (c.temperature == 0) return std::max_element(x, x + c.size) - x;
    for (int64_t i = 0; i < c.size; i++) memory[i] = x[i] / c.temperature;
    const uint64_t key = mix(mix((uint64_t)c.seeds[row] + STEP) ^ (uint64_t)c.positions[row]);
    if (c.k <= 0 || c.k >= c.size) return noised(memory, nullptr, c.size, key, c.first_id);
    const float least = kth_largest(memory, c.size, c.k);
    int32_t* columns = (int32_t*)(memory + c.size);
    int64_t kept = 0;
    for (int64_t i = 0; i < c.size; i++) {
        const float value = memory[i];
        columns[kept] = (int32_t)i;
        memory[kept] = value;
        kept += value >= least;
    }
    return noised(memory, columns, kept, key, c.first_id);
}

// Memory that cannot be had is the one thing that can go wrong in here.
template <class F>
int guard(const F& run) {
    try {
        run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------- what Python calls

namespace {

// A matrix as Python lists it, in whole numbers: kind, addresses, sizes.
struct Matrix {
    int64_t kind, data, scale, low, out, in, groups;
};

// A decoder's block: addresses of its norms (bfloat16 or not), and its matrices.
struct Block {
    int64_t norm, mlp_norm, q_norm, k_norm, bf16;
    Matrix q, k, v, o, gate, up, down;
};

void multiply(const Matrix& m, const float* x, int64_t n, float* y, int threads) {
    const uint8_t* rows = (const uint8_t*)m.data;
    const Int4 w{rows, m.groups * 32, (const uint16_t*)m.scale, (const uint16_t*)m.low, m.groups};
    switch (m.kind) {
        case 0: return product(Float32{rows, m.in * 4}, x, n, m.in, m.in, m.out, y, threads);
        case 1: return product(BFloat16{rows, m.in * 2}, x, n, m.in, m.in, m.out, y, threads);
        case 2: return product(Int8{rows, m.in, (const float*)m.scale}, x, n, m.in, m.in, m.out, y, threads);
        case 3: return product(w, x, n, m.in, m.in, m.out, y, threads);
        default: return product(Rounded4{w}, x, n, m.in, m.in, m.out, y, threads);
    }
}

}  // namespace

extern "C" {

int emulus_interface() { return 3; }

int emulus_linear(const float* x, int64_t n, int64_t x_stride, int64_t in, const void* weight, int bf16, int64_t out,
                  float* y, int threads) {
    const uint8_t* rows = (const uint8_t*)weight;
    return guard([=] {
        if (bf16) product(BFloat16{rows, in * 2}, x, n, x_stride, in, out, y, threads);
        else product(Float32{rows, in * 4}, x, n, x_stride, in, out, y, threads);
    });
}

int emulus_linear_int8(const float* x, int64_t n, int64_t x_stride, int64_t in, const void* q, const float* scale,
                       int64_t out, float* y, int threads) {
    return guard([=] { product(Int8{(const uint8_t*)q, in, scale}, x, n, x_stride, in, out, y, threads); });
}

int emulus_linear_int4(const float* x, int64_t n, int64_t x_stride, int64_t in, const void* q, const uint16_t* scale,
                       const uint16_t* low, int64_t groups, int rounded, int64_t out, float* y, int threads) {
    const Int4 w{(const uint8_t*)q, groups * 32, scale, low, groups};
    return guard([=] {
        if (rounded) product(Rounded4{w}, x, n, x_stride, in, out, y, threads);
        else product(w, x, n, x_stride, in, out, y, threads);
    });
}

void emulus_rms_norm(const float* x, int64_t n, int64_t x_stride, int64_t size, const void* weight, int bf16, float eps,
                     float* y) {
    for (int64_t t = 0; t < n; t++) {
        const float* from = x + t * x_stride;
        float* to = y + t * size;
        const int64_t whole = size / 16 * 16;
        const int rest = (int)(size - whole);
        V squares = zero();
        for (int64_t i = 0; i < whole; i += 16) squares = fma(load(from + i), load(from + i), squares);
        if (rest) squares = fma(load(from + whole, rest), load(from + whole, rest), squares);
        const V by = all(1.0f / std::sqrt(sum(squares) / (float)size + eps));
        const auto weights = [=](int64_t i, int count) {
            if (bf16) return from_bf16((const uint16_t*)weight + i, count);
            return load((const float*)weight + i, count);
        };
        for (int64_t i = 0; i < whole; i += 16) store(to + i, mul(weights(i, 16), mul(load(from + i), by)));
        if (rest) store(to + whole, mul(weights(whole, rest), mul(load(from + whole, rest), by)), rest);
    }
}

void emulus_silu_mul(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t n,
                     int64_t size, float* y) {
    for (int64_t t = 0; t < n; t++) {
        const float *g = gate + t * gate_stride, *u = up + t * up_stride;
        float* to = y + t * size;
        for (int64_t i = 0; i < size; i += 16) {
            const int count = (int)std::min<int64_t>(16, size - i);
            const V x = load(g + i, count);
            store(to + i, mul(div(x, add(all(1.0f), exp(sub(zero(), x)))), load(u + i, count)), count);
        }
    }
}

void emulus_rotate_and_store(const float* q, const float* k, const float* v, const int64_t* strides, int64_t n,
                             int64_t heads, const float* cos, const float* sin, const int64_t* base,
                             const int64_t* capacity, const int64_t* position, int bf16, int64_t kv_heads,
                             int64_t width, int64_t layer, float* rotated) {
    const Lanes lanes{base, capacity, position, nullptr, kv_heads, width, layer};
    const float* qkv[3] = {q, k, v};
    if (bf16) rotate_and_store<uint16_t>(lanes, qkv, strides, n, heads, cos, sin, rotated);
    else rotate_and_store<float>(lanes, qkv, strides, n, heads, cos, sin, rotated);
}

int emulus_attend(const float* q, int64_t q_stride, int64_t n, int64_t heads, const int64_t* base,
                  const int64_t* capacity, const int64_t* position, const int64_t* ready, int bf16, int64_t kv_heads,
                  int64_t width, int64_t layer, float* y, int threads) {
    const Lanes lanes{base, capacity, position, ready, kv_heads, width, layer};
    return guard([=] {
        const auto run = bf16 ? width == 64    ? attend<uint16_t, 4>
                                : width == 128 ? attend<uint16_t, 8>
                                               : attend<uint16_t, 0>
                         : width == 64  ? attend<float, 4>
                         : width == 128 ? attend<float, 8>
                                        : attend<float, 0>;
        run(lanes, q, q_stride, n, heads, y, threads);
    });
}

int emulus_choose(const float* cond, int64_t cond_stride, const float* null, int64_t null_stride, int64_t n,
                  int64_t size, float scale, float temperature, int64_t k, const int64_t* seeds,
                  const int64_t* positions, int64_t first_id, int64_t* columns, int threads) {
    const Choice choice{cond,        null, cond_stride, null_stride, size,    scale,
                        temperature, k,    seeds,       positions,   first_id};
    return guard([=] {
        const int64_t each = 2 * size + 16;
        float* memory = scratch.floats(n * each);
        parallel(n, threads, [&](int64_t row) { columns[row] = choose(choice, row, memory + row * each); });
    });
}

int emulus_blocks(const Block* blocks, int64_t count, float* x, int64_t n, int64_t hidden, int64_t inner, int64_t heads,
                  const float* cos, const float* sin, const int64_t* base, const int64_t* capacity,
                  const int64_t* position, const int64_t* ready, int lanes_bf16, int64_t kv_heads, int64_t width,
                  float eps, int threads) {
    return guard([=] {
        static thread_local Scratch work;
        const int64_t queries = heads * width, keys = kv_heads * width, wide = std::max(hidden, queries);
        float* normed = work.floats(n * (wide + 3 * queries + 2 * keys + 2 * inner));
        float *q = normed + n * wide, *turned = q + n * queries, *seen = turned + n * queries, *k = seen + n * queries;
        float *v = k + n * keys, *gate = v + n * keys, *up = gate + n * inner;
        const int64_t strides[3] = {queries, keys, keys};
        for (int64_t layer = 0; layer < count; layer++) {
            const Block& b = blocks[layer];
            const int bf16 = (int)b.bf16;
            emulus_rms_norm(x, n, hidden, hidden, (const void*)b.norm, bf16, eps, normed);
            multiply(b.q, normed, n, q, threads);
            multiply(b.k, normed, n, k, threads);
            multiply(b.v, normed, n, v, threads);
            if (b.q_norm) {
                emulus_rms_norm(q, n * heads, width, width, (const void*)b.q_norm, bf16, eps, q);
                emulus_rms_norm(k, n * kv_heads, width, width, (const void*)b.k_norm, bf16, eps, k);
            }
            emulus_rotate_and_store(q, k, v, strides, n, heads, cos, sin, base, capacity, position, lanes_bf16,
                                    kv_heads, width, layer, turned);
            emulus_attend(turned, queries, n, heads, base, capacity, position, ready, lanes_bf16, kv_heads, width,
                          layer, seen, threads);
            multiply(b.o, seen, n, normed, threads);
            for (int64_t i = 0; i < n * hidden; i++) x[i] += normed[i];
            emulus_rms_norm(x, n, hidden, hidden, (const void*)b.mlp_norm, bf16, eps, normed);
            multiply(b.gate, normed, n, gate, threads);
            multiply(b.up, normed, n, up, threads);
            emulus_silu_mul(gate, inner, up, inner, n, inner, gate);
            multiply(b.down, gate, n, normed, threads);
            for (int64_t i = 0; i < n * hidden; i++) x[i] += normed[i];
        }
    });
}

}  // extern "C"
