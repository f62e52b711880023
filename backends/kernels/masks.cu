// The cap C_k, eq. (3), and bit-packed masks. Plain reference for a row v of n scores:
//
//     strict:     mask[i] = #{j : v[j] >= v[i]} <= k
//     threshold:  mask[i] = v[i] >= t                    with t the k-th largest score
//     index:      mask[i] = v[i] > t, or v[i] == t and
//                           #{j : v[j] > t} + #{j < i : v[j] == t} < k
//
// Method. count(t) = #{j : v[j] >= t} falls as t rises. Two thresholds enclose the answer,
// count(below) > k >= count(above); they close in until count(above) == k or no floating-point
// number lies between. Then {v >= above} are the strict winners, and where count(above) < k the
// scores equal to `below` are the tie group that straddles rank k. Scores are read once, into
// registers.
//
// Random projections are nearly normal, so the first guess is the normal quantile, and the search
// walks on from there until it has passed rank k; then it halves. For N = 512 to 9216 this issues
// 29 to 43 instructions a score; interpolation between the counts 3 % more to 7 % fewer; a
// histogram 7-32 % more for short rows, 1-12 % fewer for long ones (counted on sm_90, not timed on
// a GPU). The simplest is never far from the best: see docs/decisions.md.

enum Ties { STRICT, THRESHOLD, INDEX };

// Integers in the order of the floating-point numbers, so that halving their range ends.
template <class T> struct Ordered;
template <> struct Ordered<float> {
    typedef unsigned Integer;
    static constexpr unsigned SIGN = 1u << 31;
    static __device__ unsigned of(float x) {
        const unsigned bits = __float_as_uint(x);
        return bits & SIGN ? ~bits : bits | SIGN;
    }
    static __device__ float value(unsigned i) { return __uint_as_float(i & SIGN ? i ^ SIGN : ~i); }
};
template <> struct Ordered<double> {
    typedef unsigned long long Integer;
    static constexpr unsigned long long SIGN = 1ull << 63;
    static __device__ unsigned long long of(double x) {
        const unsigned long long bits = __double_as_longlong(x);
        return bits & SIGN ? ~bits : bits | SIGN;
    }
    static __device__ double value(unsigned long long i) {
        return __longlong_as_double(i & SIGN ? i ^ SIGN : ~i);
    }
};

// One row, shared by the WARPS warps of a group: warp w holds items * 32 neighbours, and its lane l
// those with index % 32 == l, so that its j-th is score first + 32 j. The first `held` of them lie
// in the row; beyond stands NaN, which is above no threshold. (Places are given as 32 j rather than
// as an index, which the compiler would keep in a register for each.)
template <class T, int WARPS, int ITEMS> struct Row {
    T score[ITEMS];
    int first, held;

    __device__ Row(const T* row, int n, int warp, int lane) : first(warp * ITEMS * WARP + lane) {
        held = n - first;
        row += first;
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) score[j] = j * WARP < held ? row[j * WARP] : NOT_A_NUMBER;
    }
    template <class Visit> __device__ void each(Visit visit) const {
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) visit(j * WARP, score[j]);
    }
};

// ITEMS = 0: rows too long for registers stay in memory and are read again for each count.
template <class T, int WARPS> struct Row<T, WARPS, 0> {
    const T* row;
    int first, held, items;

    __device__ Row(const T* all, int n, int warp, int lane)
        : items((n + WARPS * WARP - 1) / (WARPS * WARP)) {
        first = warp * items * WARP + lane;
        held = n - first;
        row = all + first;
    }
    template <class Visit> __device__ void each(Visit visit) const {
        for (int j = 0; j < items; ++j)
            visit(j * WARP, j * WARP < held ? row[j * WARP] : (T)NOT_A_NUMBER);
    }
};

// Mean and standard deviation of row r. A NaN in it is noted in `error`.
template <int WARPS, class R, class T>
__device__ void moments(const R& row, long long r, int n, Place* error, T& mean, T& deviation) {
    T sum = 0, squares = 0;
    row.each([&](int place, T v) {
        if (place < row.held) {
            sum += v;
            squares += v * v;
        }
    });
    sum = group_sum<WARPS>(sum, 0);
    squares = group_sum<WARPS>(squares, 1);
    if (sum != sum) {  // a NaN, or infinities of both signs
        row.each([&](int place, T v) {
            if (place < row.held && v != v) note_error(error, r, row.first + place);
        });
    }
    mean = sum / n;
    deviation = sqrt(fmax(squares / n - mean * mean, (T)0));
}

constexpr __host__ __device__ int block_warps(int WARPS) { return WARPS < 4 ? 4 : WARPS; }

// Blocks that a multiprocessor of 65536 registers shall hold at least: a thread has its scores and
// room for 40 numbers more, where the compiler alone might take more.
template <class T, int WARPS, int ITEMS> constexpr __host__ __device__ int least_blocks() {
    return 65536 / ((ITEMS + 40) * ((int)sizeof(T) / 4) * block_warps(WARPS) * WARP);
}

// mask (rows, n) and bits (rows, ceil(n / 8)), the highest bit of a byte first; either may be null.
// quantile: of the standard normal distribution at 1 - k / n. gap: roughly the distance between
// neighbouring scores there, in standard deviations. A NaN is noted in `error`, and never wins.
template <class T, int WARPS, int ITEMS>
__global__ void
__launch_bounds__(block_warps(WARPS) * WARP, least_blocks<T, WARPS, ITEMS>())
kwta(const T* scores, unsigned char* mask, unsigned char* bits, long long rows, int n, int k,
     int ties, T quantile, T gap, Place* error) {
    typedef Ordered<T> Order;
    constexpr int GROUPS = block_warps(WARPS) / WARPS;  // rows a block
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    const long long r = (long long)blockIdx.x * GROUPS + threadIdx.x / WARP / WARPS;
    if (r >= rows) return;  // the whole group leaves together
    const Row<T, WARPS, ITEMS> row(scores + r * n, n, warp, lane);

    T mean, deviation;
    moments<WARPS>(row, r, n, error, mean, deviation);
    T below = -INF, above = INF, guess = mean + quantile * deviation, stride = deviation * gap;
    bool under = false, over = false;  // whether below and above have been counted
    int winners = 0;                   // count(above), if it has
    if (k == n) {
        above = -INF;
        over = true;
        winners = n;
    }
    for (int step = 0; winners != k; ++step) {
        T threshold = guess;
        if (step % 8 == 7 || !(threshold > below && threshold < above)) {
            // Halving the range of representable numbers now and then makes any scores end.
            const typename Order::Integer low = Order::of(below), high = Order::of(above) + !over;
            if (high - low <= 1) break;
            threshold = Order::value(low + (high - low) / 2);
        }
        float sum_reached = 0;  // an integer would cost a third instruction a score
        row.each([&](int, T v) { sum_reached += reached(v, threshold); });
        const int count = group_sum<WARPS>((int)sum_reached, step % 2);
        if (count > k) {
            below = threshold;
            under = true;
        } else {
            above = threshold;
            over = true;
            winners = count;
        }
        if (under && over) {
            guess = below + (above - below) / 2;
        } else {  // walk on towards rank k
            guess = threshold + stride * (count - k - (T)0.5);
            stride *= 2;
        }
    }

    const T tied = below;
    const T winning = ties == THRESHOLD && winners < k ? tied : over ? above : (T)NOT_A_NUMBER;
    const bool by_index = ties == INDEX && winners < k;
    int places_left = k - winners;
    if (by_index) {  // of the tie group, the warps before this one come first
        float ties_here = 0;
        row.each([&](int, T v) { ties_here += reached(v, tied) - reached(v, winning); });
        const int mine = warp_sum((int)ties_here);
        __shared__ int ties_of[GROUPS * WARPS];
        if (lane == 0) ties_of[threadIdx.x / WARP] = mine;
        if constexpr (WARPS > 1) __syncthreads();
        for (int w = 0; w < warp; ++w) places_left -= ties_of[threadIdx.x / WARP - warp + w];
    }
    const unsigned lanes_before = (1u << lane) - 1;
    const int row_bytes = (n + 7) / 8;
    unsigned char* row_mask = mask + r * n + row.first;
    unsigned char* row_bits = bits + r * row_bytes + (row.first - lane) / 8 + lane;
    const int bytes_left = row_bytes - ((row.first - lane) / 8 + lane);
    row.each([&](int place, T v) {
        bool wins = reaches(v, winning);
        if (by_index) {
            const bool is_tied = reaches(v, tied) && !wins;
            const unsigned tied_lanes = __ballot_sync(ALL, is_tied);
            wins |= is_tied && __popc(tied_lanes & lanes_before) < places_left;
            places_left -= __popc(tied_lanes);
        }
        if (mask && place < row.held) row_mask[place] = wins;
        if (bits) {
            const unsigned word = __brev(__ballot_sync(ALL, wins));  // the first lane highest
            if (lane < 4 && place / 8 < bytes_left) row_bits[place / 8] = word >> (24 - 8 * lane);
        }
    });
}
