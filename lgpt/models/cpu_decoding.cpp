// One block of LatentGPT on a CPU, in one call: what lgpt/models/cpu_block.py draws pictures with.
//
// A drawn token needs every weight, and every key and value that is kept, once, so it cannot come
// sooner than they come from memory. They lie here in the order in which they are read, in bf16 where
// the model is (or its weights in 8 bits), and become float32 in registers; all between two products
// stays in cache. Activations are float32, except that CPUs with AVX-512 BF16 round a product's left
// side to bf16, as their own instruction wants it: queries and attention's weights too. An 8-bit
// weight is a bf16 number as it is.
//
// No row's result depends on the rows beside it: each sum has one order, whatever the batch.
//
// Shapes: B pictures, n new positions of each, R = B n rows, D width, N heads, K head width,
// T text tokens. No exceptions, no allocation: the caller owns all memory.

#include <atomic>
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
constexpr int ROW_TILES = LANES < 8 ? 2 : 4;  // side by side where there is one row
// Asked from memory so many bytes before they are needed: the CPU itself looks no further than the
// end of a page.
constexpr int AHEAD = 4096;
constexpr int PACKED_LINES = 16;  // a cache line of each row

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int16_t Pairs __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Floats floats_at(const float* place) { return *reinterpret_cast<const Floats*>(place); }
inline Words words_at(const uint32_t* place) { return *reinterpret_cast<const Words*>(place); }

inline uint16_t rounded_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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
    using Word = float;     // what a tile's lines are made of
    using Cache = Float32;  // the format of keys and values, and of one number of them
    using Kept = float;
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
    using Word = uint32_t;
    using Cache = Bf16;
    using Kept = uint16_t;
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
    using Word = uint32_t;
    using Cache = Bf16;
    using Kept = uint16_t;
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

// TILES tiles of `count` lines each times ROWS rows. `ahead(i, t)` asks memory for what is needed
// some time after line i of tile t.
template <typename Format, int ROWS, int TILES, typename Ahead>
inline void products(const typename Format::Word* lines, int64_t count, int64_t line_words,
                     int64_t tile_words, const typename Format::Operand* x, int64_t x_line,
                     int64_t x_row, const Ahead& ahead, float (*out)[ROWS][TILE]) {
    typename Format::Sum sums[TILES][ROWS] = {};
    static_assert(sizeof(typename Format::Sum) == sizeof(float) * TILE, "out is a copy of sums");
    for (int64_t i = 0; i < count; ++i)
        for (int t = 0; t < TILES; ++t) {
            ahead(i, t);
            Format::add(lines + i * line_words + t * tile_words, x + i * x_line, x_row, sums[t]);
        }
    std::memcpy(out, sums, sizeof sums);
}

// Inlined or not at all: GCC takes a function that only asks for memory for one that does nothing,
// and drops its calls.
#define ALWAYS_INLINE inline __attribute__((always_inline))

ALWAYS_INLINE void ask_for(uintptr_t address) {
    __builtin_prefetch(reinterpret_cast<const void*>(address));
}

// What is read from front to back, and what after it.
class Reading {
  public:
    Reading(const void* here, int64_t bytes, const void* next, int64_t ahead)
        : here_(reinterpret_cast<uintptr_t>(here)),
          next_(reinterpret_cast<uintptr_t>(next) - bytes),
          bytes_(bytes),
          ahead_(ahead) {}
    // Ask memory for what comes `ahead` bytes after the one at `offset`.
    ALWAYS_INLINE void ask(int64_t offset) const {
        offset += ahead_;
        ask_for((offset < bytes_ ? here_ : next_) + offset);
    }

  private:
    uintptr_t here_, next_;
    int64_t bytes_, ahead_;
};

// ---- threads ----------------------------------------------------------------------------------

// A thread among those of a call. All of them are there once the first loop is shared.
struct Worker {
    int64_t number;
    const std::atomic<int64_t>& team;
};

// Share the items 0 .. count among the threads, each told its next one along with the one at hand:
// so that memory can be asked for it in time. Thread k starts with item k.
template <typename Work>
inline void share(const Worker& worker, std::atomic<int64_t>& taken, int64_t count,
                  const Work& work) {
    for (int64_t item = worker.number; item < count;) {
        const int64_t next = worker.team + taken++;
        work(item, next < count ? next : item);
        item = next;
    }
#pragma omp barrier
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
    void *keys, *values;  // [B, N] heads of `positions`, at first 0; written from `position` on
    int64_t positions;
    const float *cos, *sin;  // [n, K/2]; null: no rotation
    const void *text_keys, *text_values;  // [B, N] heads of T positions
    const float* text_mask;  // [B, T], added to the scores; null: all seen
    int64_t words;
    float* scratch;  // see lgpt_scratch_floats
    int32_t threads;
};

}  // extern "C"

namespace {

// What memory is asked for while a pair of tiles is multiplied: what comes AHEAD bytes later in
// each, behind its end that of the `next` pair; and where rows take several passes over the pair,
// which but for the first find it in the cache, also a part of the next one in each.
class Lines {
  public:
    Lines(const char* here, const char* next, int64_t lines, int64_t line_bytes, int64_t pass,
          int64_t passes)
        : line_bytes_(line_bytes),
          tile_bytes_(lines * line_bytes),
          here_(reinterpret_cast<uintptr_t>(here) + AHEAD),
          next_(reinterpret_cast<uintptr_t>(next) + AHEAD - tile_bytes_),
          turn_(lines - AHEAD / line_bytes) {
        // Of the pair's 2 `lines` a pass asks for one at every 1, 2, 4 .. lines that it multiplies, so
        // that the largest power of 2 of `passes` has asked for all of them.
        while (passes >> (shift_ + 2)) ++shift_;
        const bool asks = passes > 1 && pass < (int64_t{2} << shift_);
        mask_ = asks ? (int64_t{1} << shift_) - 1 : -1;  // -1: the first line alone
        part_ = reinterpret_cast<uintptr_t>(next);
        if (asks) part_ += pass * (lines >> shift_) * line_bytes;
    }
    // Of one tile of the pair alone; the first asks for the part.
    Lines of_tile(int64_t tile) const {
        Lines moved = *this;
        moved.here_ += tile * tile_bytes_;
        moved.next_ += tile * tile_bytes_;
        if (tile > 0) moved.mask_ = -1;
        return moved;
    }
    // When line i of tile t is multiplied. Where that is a branch GCC makes two loops of the one,
    // which is faster with few rows, and slower where their sums fill the registers.
    template <bool IS_BRANCH>
    ALWAYS_INLINE void ask(int64_t i, int t) const {
        const uintptr_t jump = (next_ - here_) & -static_cast<uintptr_t>(i >= turn_);
        const uintptr_t tile = IS_BRANCH ? (i < turn_ ? here_ : next_) : here_ + jump;
        ask_for(tile + i * line_bytes_ + t * tile_bytes_);
        if (t == 0 && (i & mask_) == 0) ask_for(part_ + (i >> shift_) * line_bytes_);
    }

  private:
    int64_t line_bytes_, tile_bytes_;
    uintptr_t here_, next_;
    int64_t turn_, shift_ = 0, mask_;
    uintptr_t part_;
};

// ROWS rows times TILES tiles, the result added to or put into y [R, outputs].
template <typename Format, int ROWS, int TILES, bool IS_PACKED = false>
inline void rows_times_tiles(const LgptMatrix& m, int64_t tile, const typename Format::Operand* x,
                             float* y, bool is_added, const Lines& reading) {
    constexpr int WIDTH = Format::INPUTS_A_LINE;
    float out[TILES][ROWS][TILE];
    const int64_t lines = m.inputs / WIDTH;
    const auto* words = static_cast<const typename Format::Word*>(m.tiles) + tile * TILE * lines;
    const auto ahead = [&](int64_t i, int t) __attribute__((always_inline)) {
        reading.ask<!IS_PACKED>(i, t);
    };
    products<Format, ROWS, TILES>(words, lines, TILE, lines * TILE, x,
                                  IS_PACKED ? ROWS * WIDTH : WIDTH, IS_PACKED ? WIDTH : m.inputs,
                                  ahead, out);
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
                                  bool is_added, const Lines& reading) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) {
            last_rows_times_tiles<Format, ROWS - 1>(m, tile, tiles, x, y, rows, is_added, reading);
        } else if (tiles == 2 && (ROWS <= 2 || TILES_AT_ONCE == 2)) {
            rows_times_tiles<Format, ROWS, 2>(m, tile, x, y, is_added, reading);
        } else {
            for (int64_t t = 0; t < tiles; ++t)
                rows_times_tiles<Format, ROWS, 1>(m, tile + t, x, y, is_added, reading.of_tile(t));
        }
    }
}

// Rows [ROWS_AT_ONCE, inputs] as `products` takes them packed. Behind each other, what a line needs
// lies in as many cache lines, whose places in the cache are the same if inputs are a power of 2.
template <typename Format>
inline void pack(const typename Format::Operand* x, int64_t inputs, int64_t first_line,
                 int64_t lines, typename Format::Operand* packed) {
    constexpr int WIDTH = Format::INPUTS_A_LINE;
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
        for (int64_t i = first_line; i < first_line + lines; ++i)
            std::memcpy(packed + (i * ROWS_AT_ONCE + r) * WIDTH, x + r * inputs + i * WIDTH,
                        sizeof *x * WIDTH);
}

// x [R, inputs] times the matrix, added to or put into y [R, outputs]; `packed` has room for x.
template <typename Format>
inline void multiply(const Worker& worker, std::atomic<int64_t>& taken, const LgptMatrix& m,
                     const typename Format::Operand* x, float* y, int64_t rows, bool is_added,
                     typename Format::Operand* packed) {
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
    const int64_t passes = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t line_bytes = TILE * sizeof(typename Format::Word);
    const auto tile_at = [&](int64_t tile) {
        return static_cast<const char*>(m.tiles) + tile * lines * line_bytes;
    };
    share(worker, taken, (count + 1) / 2, [&](int64_t pair, int64_t next) {
        const int64_t tile = 2 * pair, tiles = tile + 1 < count ? 2 : 1;
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t row = pass * ROWS_AT_ONCE;
            const auto* left = x + row * m.inputs;
            float* there = y + row * m.outputs;
            const Lines reading(tile_at(tile), tile_at(2 * next), lines, line_bytes, pass, passes);
            if (row + ROWS_AT_ONCE > rows) {
                last_rows_times_tiles<Format, ROWS_AT_ONCE - 1>(m, tile, tiles, left, there,
                                                                rows - row, is_added, reading);
                continue;
            }
            left = packed + row * m.inputs;
            if (tiles == TILES_AT_ONCE) {
                rows_times_tiles<Format, ROWS_AT_ONCE, TILES_AT_ONCE, true>(m, tile, left, there,
                                                                            is_added, reading);
            } else {
                for (int64_t t = 0; t < tiles; ++t)
                    rows_times_tiles<Format, ROWS_AT_ONCE, 1, true>(m, tile + t, left, there,
                                                                    is_added, reading.of_tile(t));
            }
        }
    });
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
// Keys and values of one picture and head are two matrices in tiles, K and positions filled up to
// whole tiles: keys [positions, K] as every matrix, values [K, positions] with tiles side by side,
// [positions/INPUTS_A_LINE][K][INPUTS_A_LINE], so that both are read from front to back.

inline int64_t filled_up(int64_t count) { return (count + TILE - 1) / TILE * TILE; }

// Where a position's key and value are.
template <typename Kept, int PAIR>
struct Place {
    // Of the key PAIR (2 or 1) numbers in every TILE * PAIR, of the value every PAIR-th one.
    Kept *key, *value;

    Place(Kept* keys, Kept* values, int64_t position, int64_t whole)
        : key(keys + position / TILE * TILE * whole + position % TILE * PAIR),
          value(values + position / PAIR * PAIR * whole + position % PAIR) {}

    void write(const float* new_key, const float* new_value, int64_t width) const {
        for (int64_t i = 0; i < width; ++i) {
            put(key + i / PAIR * PAIR * TILE + i % PAIR, new_key[i]);
            put(value + i * PAIR, new_value[i]);
        }
    }

    // Ask memory for it.
    ALWAYS_INLINE void ask(int64_t width) const {
        for (int64_t i = 0; i < width; i += PAIR) __builtin_prefetch(key + i * TILE, 1);
        for (int64_t i = 0; i < width * PAIR; i += 64 / static_cast<int64_t>(sizeof(Kept)))
            __builtin_prefetch(value + i, 1);
    }
};

// One row times tiles [tile, tiles), several at once: their sums need not wait for each other.
template <typename Format, int TILES>
inline void row_times_tiles(const void* words, int64_t lines, int64_t line_words,
                            int64_t tile_words, int64_t tile, int64_t tiles,
                            const typename Format::Operand* x, const Reading& reading, float* out) {
    for (; tile + TILES <= tiles; tile += TILES) {
        const int64_t first = tile * tile_words;
        const auto ahead = [&](int64_t i, int t) __attribute__((always_inline)) {
            reading.ask((first + i * line_words + t * tile_words) * 4);
        };
        products<Format, 1, TILES>(static_cast<const typename Format::Word*>(words) + first, lines,
                                   line_words, tile_words, x, Format::INPUTS_A_LINE, 0, ahead,
                                   reinterpret_cast<float(*)[1][TILE]>(out + tile * TILE));
    }
    if constexpr (TILES > 1)
        row_times_tiles<Format, TILES / 2>(words, lines, line_words, tile_words, tile, tiles, x,
                                           reading, out);
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t room_of_a_thread(const LgptBlock& b, int64_t positions, int64_t words) {
    const int64_t width = filled_up(b.width / b.heads);
    const int64_t most = filled_up(larger(positions, words));
    return most + width + larger(most, width);
}

// softmax(q k^T + mask) v of one query of one head over `count` positions; `next` is read after it.
template <typename Cache>
inline void attend(const float* q, const typename Cache::Kept* keys,
                   const typename Cache::Kept* values, int64_t count, const float* mask,
                   int64_t width, float* room, const void* next, typename Cache::Operand* out) {
    constexpr int WIDTH = Cache::INPUTS_A_LINE;
    const int64_t whole = filled_up(width), seen = filled_up(count), key_lines = whole / WIDTH;
    const int64_t ahead = ROW_TILES * key_lines * TILE * 4;
    const int64_t key_bytes = seen * whole * sizeof *keys;
    const int64_t value_lines = (count + WIDTH - 1) / WIDTH;
    float *scores = room, *sums = scores + seen;
    auto* left = reinterpret_cast<typename Cache::Operand*>(sums + whole);
    for (int64_t i = 0; i < width; ++i) put(left + i, q[i]);
    for (int64_t i = width; i < whole; ++i) put(left + i, 0.0f);
    row_times_tiles<Cache, ROW_TILES>(keys, key_lines, TILE, key_lines * TILE, 0, seen / TILE, left,
                                      Reading(keys, key_bytes, values, ahead), scores);
    if (mask != nullptr)
        for (int64_t s = 0; s < count; ++s) scores[s] += mask[s];
    for (int64_t s = count; s < seen; ++s) scores[s] = -INFINITY;
    Floats most = floats_at(scores);
    for (int64_t s = LANES; s < seen; s += LANES) {
        const Floats here = floats_at(scores + s);
        most = here > most ? here : most;
    }
    float largest = most[0], total = 0;
    for (int i = 1; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < seen; ++s) {
        const float weight = scores[s] == -INFINITY ? 0.0f : exponential(scores[s] - largest);
        total += weight;
        put(left + s, weight);
    }
    row_times_tiles<Cache, ROW_TILES>(
        values, value_lines, whole, TILE, 0, whole / TILE, left,
        Reading(values, value_lines * WIDTH * whole * sizeof *values, next, ahead), sums);
    for (int64_t i = 0; i < width; ++i) put(out + i, sums[i] / total);
}

// Turn the pairs (x_j, x_{j+K/2}) by their angles.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// One picture and head, `item` of all: queries and keys normalised and turned, keys and values
// kept, then attended. Reading goes on at the head `next`.
template <typename Cache>
inline void self_attention(const LgptBlock& b, const LgptCall& c, int64_t item, int64_t next,
                           float* qkv, typename Cache::Operand* attended, float* room) {
    const int64_t picture = item / b.heads, head = item % b.heads;
    const int64_t K = b.width / b.heads, half = K / 2;
    const int64_t whole = filled_up(K), size = filled_up(c.positions) * whole;
    const float shrink = 1.0f / std::sqrt(static_cast<float>(K));
    auto* keys = static_cast<typename Cache::Kept*>(c.keys) + item * size;
    auto* values = static_cast<typename Cache::Kept*>(c.values) + item * size;
    using PlaceOf = Place<typename Cache::Kept, Cache::INPUTS_A_LINE>;
    const int64_t on = (next - item) * size;
    PlaceOf(keys + on, values + on, c.position, whole).ask(K);
    for (int64_t j = 0; j < c.length; ++j) {
        float* q = qkv + (picture * c.length + j) * 3 * b.width + head * K;
        float *k = q + b.width, *v = k + b.width;
        normalise(b.q_norm, q, q, K);
        normalise(b.k_norm, k, k, K);
        if (c.cos != nullptr) {
            rotate(q, c.cos + j * half, c.sin + j * half, half);
            rotate(k, c.cos + j * half, c.sin + j * half, half);
        }
        for (int64_t i = 0; i < K; ++i) q[i] *= shrink;
        PlaceOf(keys, values, c.position + j, whole).write(k, v, K);
    }
    for (int64_t j = 0; j < c.length; ++j) {
        const int64_t row = picture * c.length + j;
        attend<Cache>(qkv + row * 3 * b.width + head * K, keys, values, c.position + j + 1, nullptr,
                      K, room, keys + on, attended + row * b.width + head * K);
    }
}

template <typename Cache>
inline void cross_attention(const LgptBlock& b, const LgptCall& c, int64_t item, int64_t next,
                            float* queries, typename Cache::Operand* attended, float* room) {
    const int64_t picture = item / b.heads, head = item % b.heads, K = b.width / b.heads;
    const int64_t size = filled_up(c.words) * filled_up(K);
    const float shrink = 1.0f / std::sqrt(static_cast<float>(K));
    const auto* keys = static_cast<const typename Cache::Kept*>(c.text_keys) + item * size;
    const auto* values = static_cast<const typename Cache::Kept*>(c.text_values) + item * size;
    const float* mask = c.text_mask == nullptr ? nullptr : c.text_mask + picture * c.words;
    int64_t seen = c.words;
    while (mask != nullptr && seen > 1 && mask[seen - 1] == -INFINITY) --seen;
    for (int64_t j = 0; j < c.length; ++j) {
        const int64_t row = picture * c.length + j;
        float* q = queries + row * b.width + head * K;
        normalise(b.cross_q_norm, q, q, K);
        for (int64_t i = 0; i < K; ++i) q[i] *= shrink;
        attend<Cache>(q, keys, values, seen, mask, K, room, keys + (next - item) * size,
                      attended + row * b.width + head * K);
    }
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

// Of a row of what a product gives, and of what goes into one.
int64_t wide_floats(const LgptBlock& b) {
    return larger(b.is_gated ? 2 * b.inner : b.inner, 3 * b.width);
}
int64_t left_floats(const LgptBlock& b) { return larger(b.inner, b.width); }

template <typename Format>
void run(const LgptBlock& b, const LgptCall& c) {
    using Operand = typename Format::Operand;
    using Cache = typename Format::Cache;
    const int64_t rows = c.batch * c.length, heads = c.batch * b.heads;
    float* wide = c.scratch;
    Operand* left = reinterpret_cast<Operand*>(wide + rows * wide_floats(b));
    Operand* packed = left + rows * left_floats(b);
    float* rooms = wide + rows * (wide_floats(b) + 2 * left_floats(b));
    const int64_t room_size = room_of_a_thread(b, c.positions, c.words);
    std::atomic<int64_t> team{0}, taken[8] = {};
#pragma omp parallel num_threads(c.threads)
    {
        const Worker worker{team++, team};
        float* room = rooms + worker.number * room_size;
        normalise_rows(b.self_norm, c.x, left, rows, b.width);
        multiply<Format>(worker, taken[0], b.qkv, left, wide, rows, false, packed);
        share(worker, taken[1], heads, [&](int64_t item, int64_t next) {
            self_attention<Cache>(b, c, item, next, wide, left, room);
        });
        multiply<Format>(worker, taken[2], b.out, left, c.x, rows, true, packed);

        normalise_rows(b.cross_norm, c.x, left, rows, b.width);
        multiply<Format>(worker, taken[3], b.cross_q, left, wide, rows, false, packed);
        share(worker, taken[4], heads, [&](int64_t item, int64_t next) {
            cross_attention<Cache>(b, c, item, next, wide, left, room);
        });
        multiply<Format>(worker, taken[5], b.cross_out, left, c.x, rows, true, packed);

        normalise_rows(b.mlp_norm, c.x, left, rows, b.width);
        multiply<Format>(worker, taken[6], b.up, left, wide, rows, false, packed);
        activate(b, wide, left, rows);
        multiply<Format>(worker, taken[7], b.down, left, c.x, rows, true, packed);
    }
}

template <typename Format>
void run_linear(const LgptMatrix& m, const float* x, float* y, int64_t rows, void* scratch,
                int32_t threads) {
    using Operand = typename Format::Operand;
    Operand* left = static_cast<Operand*>(scratch);
    std::atomic<int64_t> team{0}, taken{0};
#pragma omp parallel num_threads(threads)
    {
        const Worker worker{team++, team};
        normalise_rows(LgptNorm{nullptr, nullptr, 0}, x, left, rows, m.inputs);
        multiply<Format>(worker, taken, m, left, y, rows, false, left + rows * m.inputs);
    }
}

}  // namespace

extern "C" {

// Floats of scratch that lgpt_block needs.
int64_t lgpt_scratch_floats(const LgptBlock* b, int64_t batch, int64_t length, int64_t positions,
                            int64_t words, int32_t threads) {
    return batch * length * (wide_floats(*b) + 2 * left_floats(*b)) +
           threads * room_of_a_thread(*b, positions, words);
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
