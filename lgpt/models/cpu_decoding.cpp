// One block of LatentGPT on a CPU, in one call: what lgpt/models/cpu_block.py draws pictures with.
//
// A drawn token needs every weight once, so it cannot come sooner than the weights come from memory.
// They lie here in the order in which they are read, in bf16 where the model is or in 8 bits, and
// become float32 in registers, as do the kept keys and values; all between two products stays in
// cache. Activations are float32, except that CPUs with AVX-512 BF16 round a product's left side to
// bf16, as their own instruction wants it; an 8-bit weight is a bf16 number as it is.
//
// No row's result depends on the rows beside it: each sum has one order, whatever the batch.
//
// Shapes: B pictures, n new positions of each, R = B n rows, D width, N heads, K head width,
// T text tokens. No exceptions, no allocation: the caller owns all memory.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) || defined(LGPT_EMULATE_BF16_PRODUCTS)
#define LGPT_BF16_PRODUCTS 1
#endif

namespace {

constexpr int TILE = 16;  // outputs that lie side by side in memory
#if defined(__AVX512F__)
// 16 sums and few loads for each; more rows at once were slower.
constexpr int LANES = 16, ROWS_AT_ONCE = 8, TILES_AT_ONCE = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS_AT_ONCE = 5, TILES_AT_ONCE = 1;  // 5 x 2 of 16 registers
#else
constexpr int LANES = 4, ROWS_AT_ONCE = 4, TILES_AT_ONCE = 1;
#endif
constexpr int PARTS = TILE / LANES;
// Asked from memory so many bytes before they are needed: the CPU itself looks no further than the
// end of a page.
constexpr int AHEAD = 4096;
constexpr int PACKED_LINES = 16;  // a cache line of each row

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int16_t Pairs __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t UnsignedHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Floats floats_at(const float* place) { return *reinterpret_cast<const Floats*>(place); }
inline Words words_at(const uint32_t* place) { return *reinterpret_cast<const Words*>(place); }

inline uint16_t rounded_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float widened(float value) { return value; }
inline float widened(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void put(float* place, float value) { *place = value; }
inline void put(uint16_t* place, float value) { *place = rounded_to_bf16(value); }

// exp by 2^i times a polynomial (Cephes' expf): 1e-7 of it, and a loop of these becomes vector code.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float whole = std::floor(x * 1.44269504f + 0.5f);
    const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return sum * power;
}

// ---- products ---------------------------------------------------------------------------------
// A tile is TILE rows of the matrix: float32 [inputs][TILE], or bf16 or int8 [inputs/2][TILE][2], so
// that a word of 32 or 16 bits holds two neighbouring inputs of one output.

struct Float32 {
    using Operand = float;  // what multiplies the matrix
    using Kept = float;     // keys and values in the cache
    using Word = float;     // what a tile's lines are made of
    struct Sum {
        Floats parts[PARTS];
    };
    static constexpr int INPUTS_A_LINE = 1;
    static constexpr bool IS_SCALED = false;

    template <int ROWS>
    static void add(const Word* line, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        for (int p = 0; p < PARTS; ++p) {
            const Floats w = floats_at(line + p * LANES);
            for (int r = 0; r < ROWS; ++r) sums[r].parts[p] += w * x[r * stride];
        }
    }
};

#if defined(LGPT_BF16_PRODUCTS)
typedef float Floats16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words16 __attribute__((vector_size(64), aligned(4), may_alias));

// sum + (even input x even input) + (odd x odd), lane by lane.
inline Floats16 with_pairs(Floats16 sum, Words16 left, Words16 right) {
#if defined(__AVX512BF16__) && !defined(LGPT_EMULATE_BF16_PRODUCTS)
    return (Floats16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
    sum += (Floats16)(left & 0xffff0000u) * (Floats16)(right & 0xffff0000u);
    return sum + (Floats16)(left << 16) * (Floats16)(right << 16);
#endif
}

// Pairs of 8-bit integers, as they lie in memory, in bf16, which holds them exactly.
inline Words16 bf16_pairs_at(const uint16_t* line) {
#if defined(__AVX512BF16__) && !defined(LGPT_EMULATE_BF16_PRODUCTS)
    const auto* halves = reinterpret_cast<const __m128i*>(line);
    const auto widened_half = [](const __m128i* half) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(half)));
    };
    return (Words16)_mm512_cvtne2ps_pbh(widened_half(halves + 1), widened_half(halves));
#else
    typedef int32_t Integers16 __attribute__((vector_size(64)));
    typedef int16_t Pairs16 __attribute__((vector_size(32), aligned(2), may_alias));
    const auto pairs =
        __builtin_convertvector(*reinterpret_cast<const Pairs16*>(line), Integers16);
    const auto even = __builtin_convertvector((pairs << 24) >> 24, Floats16);
    const auto odd = __builtin_convertvector(pairs >> 8, Floats16);
    return ((Words16)even >> 16) | (Words16)odd;
#endif
}

struct Bf16 {
    using Operand = uint16_t;
    using Kept = uint16_t;
    using Word = uint32_t;
    using Sum = Floats16;
    static constexpr int INPUTS_A_LINE = 2;
    static constexpr bool IS_SCALED = false;

    template <int ROWS>
    static void add(const Word* line, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        add_pairs(*reinterpret_cast<const Words16*>(line), x, stride, sums);
    }

    template <int ROWS>
    static void add_pairs(Words16 w, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        for (int r = 0; r < ROWS; ++r) {
            uint32_t pair;
            std::memcpy(&pair, x + r * stride, 4);
            sums[r] = with_pairs(sums[r], w, Words16{} + pair);
        }
    }
};

struct Int8 : Bf16 {
    using Word = uint16_t;
    static constexpr bool IS_SCALED = true;

    template <int ROWS>
    static void add(const Word* line, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        add_pairs(bf16_pairs_at(line), x, stride, sums);
    }
};
#else
struct Bf16 {
    using Operand = float;
    using Kept = uint16_t;
    using Word = uint32_t;
    using Sum = Float32::Sum;
    static constexpr int INPUTS_A_LINE = 2;
    static constexpr bool IS_SCALED = false;

    template <int ROWS>
    static void add(const Word* line, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        Words w[PARTS];
        for (int p = 0; p < PARTS; ++p) w[p] = words_at(line + p * LANES);
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < PARTS; ++p)
                sums[r].parts[p] += (Floats)(w[p] << 16) * x[r * stride];
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < PARTS; ++p)
                sums[r].parts[p] += (Floats)(w[p] & 0xffff0000u) * x[r * stride + 1];
    }
};

struct Int8 : Bf16 {
    using Word = uint16_t;
    static constexpr bool IS_SCALED = true;

    template <int ROWS>
    static void add(const Word* line, const Operand* x, int64_t stride, Sum (&sums)[ROWS]) {
        for (int p = 0; p < PARTS; ++p) {
            const auto pairs = __builtin_convertvector(
                *reinterpret_cast<const Pairs*>(line + p * LANES), Integers);
            const auto even = __builtin_convertvector((pairs << 24) >> 24, Floats);
            const auto odd = __builtin_convertvector(pairs >> 8, Floats);
            for (int r = 0; r < ROWS; ++r) {
                sums[r].parts[p] += even * x[r * stride];
                sums[r].parts[p] += odd * x[r * stride + 1];
            }
        }
    }
};
#endif

// TILES tiles, one behind the other, times ROWS rows: one behind the other too, or, if they are
// packed, beside each other, [inputs/INPUTS_A_LINE][ROWS][INPUTS_A_LINE].
template <typename Format, int ROWS, int TILES, bool IS_PACKED>
inline void products(const typename Format::Word* tile, const typename Format::Operand* x,
                     int64_t inputs, float (*out)[ROWS][TILE]) {
    const int64_t row_stride = IS_PACKED ? Format::INPUTS_A_LINE : inputs;
    const int64_t line_stride = Format::INPUTS_A_LINE * (IS_PACKED ? ROWS : 1);
    typename Format::Sum sums[TILES][ROWS] = {};
    static_assert(sizeof(typename Format::Sum) == sizeof(float) * TILE, "out is a copy of sums");
    const int64_t lines = inputs / Format::INPUTS_A_LINE;
    for (int64_t i = 0; i < lines; ++i)
        for (int t = 0; t < TILES; ++t) {
            const typename Format::Word* line = tile + (t * lines + i) * TILE;
            __builtin_prefetch(reinterpret_cast<const char*>(line) + AHEAD);
            Format::add(line, x + i * line_stride, row_stride, sums[t]);
        }
    std::memcpy(out, sums, sizeof sums);
}

}  // namespace

extern "C" {

struct LgptMatrix {
    const void* tiles;
    const float* scales;      // [outputs], of int8 alone: what 1 is
    int64_t outputs, inputs;  // inputs even, but in float32
};

enum LgptFormat : int32_t { LGPT_FLOAT32, LGPT_BF16, LGPT_INT8 };

struct LgptNorm {
    const float* weight;  // null: no norm
    const float* bias;    // null: RMSNorm, else LayerNorm
    float epsilon;
};

struct LgptBlock {
    LgptMatrix qkv, out, cross_q, cross_out, up, down;
    LgptNorm self_norm, q_norm, k_norm, cross_norm, cross_q_norm, mlp_norm;
    int64_t width, heads, inner;
    int32_t is_gated;
    LgptFormat format;  // of the matrices
};

struct LgptCall {
    float* x;  // [B, n, D], read and written
    int64_t batch, length, position;
    void *keys, *values;  // [B, positions, N, K], float32 or else bf16; written from `position` on
    int64_t positions, picture_stride, position_stride, head_stride;
    const float *cos, *sin;  // [n, K/2]; null: no rotation
    const float *text_keys, *text_values;  // [B, N, T, K]
    const float* text_mask;  // [B, T], added to the scores; null: all seen
    int64_t words;
    float* scratch;  // see lgpt_scratch_floats
    int32_t threads;
};

}  // extern "C"

namespace {

// ROWS rows times TILES tiles, the result added to or put into y [R, outputs].
template <typename Format, int ROWS, int TILES, bool IS_PACKED = false>
inline void rows_times_tiles(const LgptMatrix& m, int64_t tile, const typename Format::Operand* x,
                             float* y, bool is_added) {
    float out[TILES][ROWS][TILE];
    const auto* tiles = static_cast<const typename Format::Word*>(m.tiles);
    products<Format, ROWS, TILES, IS_PACKED>(
        tiles + tile * TILE * (m.inputs / Format::INPUTS_A_LINE), x,
                                  m.inputs, out);
    for (int t = 0; t < TILES; ++t) {
        const int64_t first = (tile + t) * TILE;
        const int64_t count = m.outputs - first < TILE ? m.outputs - first : TILE;
        for (int r = 0; r < ROWS; ++r)
            for (int64_t o = 0; o < count; ++o) {
                float* place = y + r * m.outputs + first + o;
                float value = out[t][r][o];
                if constexpr (Format::IS_SCALED) value *= m.scales[first + o];
                *place = is_added ? *place + value : value;
            }
    }
}

// The same for at most ROWS rows. With few of them two tiles run side by side, because one's
// additions alone would wait for each other.
template <typename Format, int ROWS>
inline void last_rows_times_tiles(const LgptMatrix& m, int64_t tile, int64_t tiles,
                                  const typename Format::Operand* x, float* y, int64_t rows,
                                  bool is_added) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) {
            last_rows_times_tiles<Format, ROWS - 1>(m, tile, tiles, x, y, rows, is_added);
        } else if (tiles == 2 && (ROWS <= 2 || TILES_AT_ONCE == 2)) {
            rows_times_tiles<Format, ROWS, 2>(m, tile, x, y, is_added);
        } else {
            for (int64_t t = tile; t < tile + tiles; ++t)
                rows_times_tiles<Format, ROWS, 1>(m, t, x, y, is_added);
        }
    }
}

// Rows [ROWS_AT_ONCE, inputs] as `products` takes them packed. Behind each other, what a line needs
// lies in as many cache lines, whose places in the cache are the same where inputs are a power of 2.
template <typename Format>
inline void pack(const typename Format::Operand* x, int64_t inputs, int64_t first_line,
                 int64_t lines, typename Format::Operand* packed) {
    constexpr int WIDTH = Format::INPUTS_A_LINE;
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
        for (int64_t i = first_line; i < first_line + lines; ++i)
            std::memcpy(packed + (i * ROWS_AT_ONCE + r) * WIDTH, x + r * inputs + i * WIDTH,
                        sizeof *x * WIDTH);
}

// `packed` has room for x.
template <typename Format>
inline void multiply(const LgptMatrix& m, const typename Format::Operand* x, float* y, int64_t rows,
                     bool is_added, typename Format::Operand* packed) {
    const int64_t count = (m.outputs + TILE - 1) / TILE;
    const int64_t lines = m.inputs / Format::INPUTS_A_LINE;
    if (const int64_t blocks = rows / ROWS_AT_ONCE; blocks > 0) {
        const int64_t parts = (lines + PACKED_LINES - 1) / PACKED_LINES;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks * parts; ++i) {
            const int64_t start = i / parts * ROWS_AT_ONCE * m.inputs;
            const int64_t line = i % parts * PACKED_LINES;
            const int64_t left = lines - line < PACKED_LINES ? lines - line : PACKED_LINES;
            pack<Format>(x + start, m.inputs, line, left, packed + start);
        }
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < count; tile += 2) {
        const int64_t tiles = tile + 1 < count ? 2 : 1;
        int64_t row = 0;
        for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE) {
            const auto* here = packed + row * m.inputs;
            float* there = y + row * m.outputs;
            if (tiles == TILES_AT_ONCE) {
                rows_times_tiles<Format, ROWS_AT_ONCE, TILES_AT_ONCE, true>(m, tile, here, there,
                                                                            is_added);
            } else {
                for (int64_t t = tile; t < tile + tiles; ++t)
                    rows_times_tiles<Format, ROWS_AT_ONCE, 1, true>(m, t, here, there, is_added);
            }
        }
        last_rows_times_tiles<Format, ROWS_AT_ONCE - 1>(
            m, tile, tiles, x + row * m.inputs, y + row * m.outputs, rows - row, is_added);
    }
}

// ---- norms ------------------------------------------------------------------------------------

template <typename Out>
inline void normalise(const LgptNorm& norm, const float* x, Out* out, int64_t width) {
    if (norm.weight == nullptr) {
        for (int64_t i = 0; i < width; ++i) put(out + i, x[i]);
        return;
    }
    float mean = 0, squares = 0;
    if (norm.bias != nullptr) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < width; ++i) mean += x[i];
        mean /= width;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / width + norm.epsilon);
    for (int64_t i = 0; i < width; ++i) {
        const float shift = norm.bias == nullptr ? 0.0f : norm.bias[i];
        put(out + i, (x[i] - mean) * scale * norm.weight[i] + shift);
    }
}

template <typename Out>
inline void normalise_rows(const LgptNorm& norm, const float* x, Out* out, int64_t rows,
                           int64_t width) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        normalise(norm, x + row * width, out + row * width, width);
}

// ---- attention --------------------------------------------------------------------------------

inline Floats widened_at(const float* place) { return floats_at(place); }
inline Floats widened_at(const uint16_t* bf16) {
    const auto halves = *reinterpret_cast<const UnsignedHalves*>(bf16);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// Of two vectors `width` long. WIDTH, where it is not 0, is the width: then all stays in registers.
template <int WIDTH, typename Kept>
inline float dot_product(const float* q, const Kept* key, int64_t width) {
    float score = 0;
    if constexpr (WIDTH % LANES == 0 && WIDTH > 0) {
        Floats sums = {};
        for (int i = 0; i < WIDTH; i += LANES) sums += floats_at(q + i) * widened_at(key + i);
        float parts[LANES];
        std::memcpy(parts, &sums, sizeof sums);
#pragma omp simd reduction(+ : score)
        for (int i = 0; i < LANES; ++i) score += parts[i];
    } else {
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < width; ++i) score += q[i] * widened(key[i]);
    }
    return score;
}

// The values, each times its weight, added up; `sums` has room for `width`.
template <int WIDTH, typename Kept>
inline void weighted_sum(const float* weights, const Kept* values, int64_t stride, int64_t count,
                         int64_t width, float* sums) {
    if constexpr (WIDTH % LANES == 0 && WIDTH > 0) {
        Floats parts[WIDTH / LANES] = {};
        for (int64_t s = 0; s < count; ++s)
            for (int i = 0; i < WIDTH / LANES; ++i)
                parts[i] += widened_at(values + s * stride + i * LANES) * weights[s];
        std::memcpy(sums, parts, sizeof parts);
    } else {
        std::memset(sums, 0, sizeof(float) * width);
        for (int64_t s = 0; s < count; ++s) {
            const Kept* value = values + s * stride;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) sums[i] += weights[s] * widened(value[i]);
        }
    }
}

// softmax(q k^T + mask) v of one query of one head; `scores` has room for `count`.
template <int WIDTH, typename Kept, typename Out>
inline void attend_at_width(const float* q, const Kept* keys, const Kept* values, int64_t stride,
                            int64_t count, const float* mask, int64_t head_width, float* scores,
                            float* sums, Out* out) {
    float largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < count; ++s) {
        const float score = dot_product<WIDTH>(q, keys + s * stride, head_width);
        scores[s] = mask == nullptr ? score : score + mask[s];
        largest = scores[s] > largest ? scores[s] : largest;
    }
#pragma omp simd
    for (int64_t s = 0; s < count; ++s)
        scores[s] = scores[s] == -INFINITY ? 0.0f : exponential(scores[s] - largest);
    for (int64_t s = 0; s < count; ++s) total += scores[s];
    weighted_sum<WIDTH>(scores, values, stride, count, head_width, sums);
    for (int64_t i = 0; i < head_width; ++i) put(out + i, sums[i] / total);
}

template <typename... Arguments>
inline void attend(int64_t head_width, Arguments... arguments) {
    if (head_width == 64) attend_at_width<64>(arguments...);
    else attend_at_width<0>(arguments...);
}

// Turn the pairs (x_j, x_{j+K/2}) by their angles.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// One picture and head: queries and keys normalised and turned, keys and values kept, then attended.
template <typename Kept, typename Out>
inline void self_attention(const LgptBlock& b, const LgptCall& c, int64_t picture, int64_t head,
                           float* qkv, Out* attended, float* room) {
    const int64_t K = b.width / b.heads, half = K / 2;
    const float shrink = 1.0f / std::sqrt(static_cast<float>(K));
    const int64_t start = picture * c.picture_stride + head * c.head_stride;
    Kept *keys = static_cast<Kept*>(c.keys) + start, *values = static_cast<Kept*>(c.values) + start;
    for (int64_t j = 0; j < c.length; ++j) {
        float* q = qkv + (picture * c.length + j) * 3 * b.width + head * K;
        float *k = q + b.width, *v = k + b.width;
        normalise(b.q_norm, q, q, K);
        normalise(b.k_norm, k, k, K);
        if (c.cos != nullptr) {
            rotate(q, c.cos + j * half, c.sin + j * half, half);
            rotate(k, c.cos + j * half, c.sin + j * half, half);
        }
        const int64_t place = (c.position + j) * c.position_stride;
        for (int64_t i = 0; i < K; ++i) {
            q[i] *= shrink;
            put(keys + place + i, k[i]);
            put(values + place + i, v[i]);
        }
    }
    for (int64_t j = 0; j < c.length; ++j) {
        const int64_t row = picture * c.length + j;
        attend(K, qkv + row * 3 * b.width + head * K, keys, values, c.position_stride,
               c.position + j + 1, nullptr, K, room + K, room, attended + row * b.width + head * K);
    }
}

template <typename Out>
inline void cross_attention(const LgptBlock& b, const LgptCall& c, int64_t row, int64_t head,
                            float* queries, Out* attended, float* room) {
    const int64_t K = b.width / b.heads, picture = row / c.length;
    const float shrink = 1.0f / std::sqrt(static_cast<float>(K));
    float* q = queries + row * b.width + head * K;
    normalise(b.cross_q_norm, q, q, K);
    for (int64_t i = 0; i < K; ++i) q[i] *= shrink;
    const int64_t first = (picture * b.heads + head) * c.words * K;
    attend(K, q, c.text_keys + first, c.text_values + first, K, c.words,
           c.text_mask == nullptr ? nullptr : c.text_mask + picture * c.words, K, room + K, room,
           attended + row * b.width + head * K);
}

// ---- the block --------------------------------------------------------------------------------

template <typename Out>
inline void activate(const LgptBlock& b, const float* up, Out* out, int64_t rows) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* gate = up + row * (b.is_gated ? 2 * b.inner : b.inner);
        Out* inner = out + row * b.inner;
        if (b.is_gated) {
#pragma omp simd
            for (int64_t i = 0; i < b.inner; ++i)
                put(inner + i, gate[i] / (1.0f + exponential(-gate[i])) * gate[i + b.inner]);
        } else {
            for (int64_t i = 0; i < b.inner; ++i)
                put(inner + i, 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)));
        }
    }
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t room_of_a_head(const LgptBlock& b, int64_t positions, int64_t words) {
    return b.width / b.heads + larger(positions, words);
}

// Of a row of what a product gives, and of what goes into one.
int64_t wide_floats(const LgptBlock& b) {
    return larger(b.is_gated ? 2 * b.inner : b.inner, 3 * b.width);
}
int64_t left_floats(const LgptBlock& b) { return larger(b.inner, b.width); }

template <typename Format>
void run(const LgptBlock& b, const LgptCall& c) {
    using Operand = typename Format::Operand;
    const int64_t rows = c.batch * c.length;
    float* wide = c.scratch;
    Operand* left = reinterpret_cast<Operand*>(wide + rows * wide_floats(b));
    Operand* packed = left + rows * left_floats(b);
    float* rooms = wide + rows * (wide_floats(b) + 2 * left_floats(b));
    const int64_t room_size = room_of_a_head(b, c.positions, c.words);
#pragma omp parallel num_threads(c.threads)
    {
        normalise_rows(b.self_norm, c.x, left, rows, b.width);
        multiply<Format>(b.qkv, left, wide, rows, false, packed);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < c.batch * b.heads; ++i)
            self_attention<typename Format::Kept>(b, c, i / b.heads, i % b.heads, wide, left,
                                                  rooms + i * room_size);
        multiply<Format>(b.out, left, c.x, rows, true, packed);

        normalise_rows(b.cross_norm, c.x, left, rows, b.width);
        multiply<Format>(b.cross_q, left, wide, rows, false, packed);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < c.batch * b.heads; ++i)
            for (int64_t j = 0; j < c.length; ++j)
                cross_attention(b, c, i / b.heads * c.length + j, i % b.heads, wide, left,
                                rooms + i * room_size);
        multiply<Format>(b.cross_out, left, c.x, rows, true, packed);

        normalise_rows(b.mlp_norm, c.x, left, rows, b.width);
        multiply<Format>(b.up, left, wide, rows, false, packed);
        activate(b, wide, left, rows);
        multiply<Format>(b.down, left, c.x, rows, true, packed);
    }
}

template <typename Format>
void run_linear(const LgptMatrix& m, const float* x, float* y, int64_t rows, void* scratch,
                int32_t threads) {
    using Operand = typename Format::Operand;
    Operand* left = static_cast<Operand*>(scratch);
#pragma omp parallel num_threads(threads)
    {
        normalise_rows(LgptNorm{nullptr, nullptr, 0}, x, left, rows, m.inputs);
        multiply<Format>(m, left, y, rows, false, left + rows * m.inputs);
    }
}

}  // namespace

extern "C" {

// Floats of scratch that lgpt_block needs.
int64_t lgpt_scratch_floats(const LgptBlock* b, int64_t batch, int64_t length, int64_t positions,
                            int64_t words) {
    return batch * length * (wide_floats(*b) + 2 * left_floats(*b)) +
           batch * b->heads * room_of_a_head(*b, positions, words);
}

void lgpt_block(const LgptBlock* b, const LgptCall* c) {
    switch (b->format) {
        case LGPT_FLOAT32: return run<Float32>(*b, *c);
        case LGPT_BF16: return run<Bf16>(*b, *c);
        case LGPT_INT8: return run<Int8>(*b, *c);
    }
}

// x [R, inputs] times the matrix: y [R, outputs]; `scratch` has room for x twice.
void lgpt_linear(const LgptMatrix* m, LgptFormat format, const float* x, float* y, int64_t rows,
                 float* scratch, int32_t threads) {
    switch (format) {
        case LGPT_FLOAT32: return run_linear<Float32>(*m, x, y, rows, scratch, threads);
        case LGPT_BF16: return run_linear<Bf16>(*m, x, y, rows, scratch, threads);
        case LGPT_INT8: return run_linear<Int8>(*m, x, y, rows, scratch, threads);
    }
}

}  // extern "C"
