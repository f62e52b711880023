// Two other ways to the cap C_k than that of masks.cu, which they are compared with: false position,
// and a histogram. Strict ties, float, bool mask, rows in registers. Plain reference for a row v:
//
//     mask[i] = #{j : v[j] >= v[i]} <= k
//
// Both begin as masks.cu does, with mean and deviation. Its own kernel comes as a function here, so
// that the compiler knows the same constants in all three. MARK(part), defined by kwta_methods.py,
// says which part of a row's work begins, so that it can be counted; it is empty when timed.

template <int WARPS> __device__ void group_barrier() {
    if constexpr (WARPS > 1) __syncthreads();
    else __syncwarp();
}

template <class R, class Wins>
__device__ void write(const R& row, unsigned char* mask, Wins wins) {
    mask += row.first;
    row.each([&](int place, float v) {
        if (place < row.held) mask[place] = wins(v);
    });
}

// Returns a threshold that exactly the winners reach. It walks from the guess until two thresholds
// enclose the answer, then halves as masks.cu does, or interpolates between their counts.
template <int WARPS, bool INTERPOLATE, class R>
__device__ float search(const R& row, int k, float guess, float stride) {
    typedef Ordered<float> Order;
    float below = -INF, above = INF;  // count(below) > k >= count(above), if `over`
    float below_count = 0, above_count = 0;
    bool under = false, over = false;
    for (int step = 0;; ++step) {
        MARK(STEP)
        float threshold = guess;
        if (step % 8 == 7 || !(threshold > below && threshold < above)) {
            MARK(SPLIT)  // halving the range of representable numbers makes any scores end
            const unsigned low = Order::of(below), high = Order::of(above) + !over;
            if (high - low <= 1) {
                MARK(NEIGHBOURS)
                return Order::value(high);
            }
            threshold = Order::value(low + (high - low) / 2);
        }
        MARK(COUNT)
        float sum_reached = 0;
        row.each([&](int, float v) { sum_reached += reached(v, threshold); });
        const int count = group_sum<WARPS>((int)sum_reached, step % 2);
        if (count == k) return threshold;
        if (count > k) {
            below = threshold;
            below_count = count;
            under = true;
        } else {
            above = threshold;
            above_count = count;
            over = true;
        }
        if (INTERPOLATE && under && over && (step < 5 || step % 2)) {
            MARK(INTERPOLATE_COUNTS)
            guess = below + __fdividef(below_count - k - 0.5f, below_count - above_count)
                            * (above - below);
        } else if (under && over) {
            MARK(HALVE)
            guess = below + (above - below) / 2;
        } else {
            MARK(WALK)
            guess = threshold + stride * (count - k - 0.5f);
            stride *= 2;
        }
    }
}

#define KWTA(method, REGISTERS)                                                                  \
    template <int WARPS, int ITEMS>                                                              \
    __global__ void                                                                              \
    __launch_bounds__(block_warps(WARPS) * WARP, least_blocks<float, WARPS, ITEMS + REGISTERS>()) \
    method(const float* scores, unsigned char* mask, long long rows, int n, int k,               \
           float quantile, float gap, float window, Place* error)

#define ROW                                                                                      \
    constexpr int GROUPS = block_warps(WARPS) / WARPS;                                           \
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;                      \
    const long long r = (long long)blockIdx.x * GROUPS + threadIdx.x / WARP / WARPS;             \
    if (r >= rows) return;                                                                       \
    MARK(LOAD)                                                                                   \
    const Row<float, WARPS, ITEMS> row(scores + r * n, n, warp, lane);                           \
    mask += r * n;                                                                               \
    float mean, deviation, edge = -INF;

KWTA(kwta_bisection, 0) {
    kwta<float, WARPS, ITEMS>(scores, mask, nullptr, rows, n, k, STRICT, quantile, gap, error);
}

KWTA(kwta_false_position, 0) {
    ROW
    moments<WARPS>(row, r, n, error, mean, deviation);
    if (k < n)
        edge = search<WARPS, true>(row, k, mean + quantile * deviation, deviation * gap);
    MARK(WRITE)
    write(row, mask, [&](float v) { return reaches(v, edge); });
}

// One pass counts the scores above a window around the normal quantile, `window` deviations wide,
// and those in each of its 256 bins. They tell the bin of the largest score that loses, the k+1-st
// largest. If it is the largest of its bin, the bin's upper edge parts winners from losers. If not,
// the few scores of the bin are gathered, and ranked among themselves. Scores that are not spread
// as expected have no such bin, or one that holds too many, and are bisected.
KWTA(kwta_histogram, 16) {
    typedef Ordered<float> Order;
    constexpr int BINS = 256, EACH = BINS / WARP, MOST = WARP;
    constexpr float ZERO = 1 << 23;  // from here to twice that, floating-point numbers are integers
    constexpr unsigned ZERO_BITS = 0x4b000000;
    ROW
    const int group = threadIdx.x / WARP / WARPS, thread = threadIdx.x % (WARPS * WARP);
    __shared__ int all_bins[GROUPS][BINS], all_gathered[GROUPS];
    __shared__ float all_lists[GROUPS][MOST];
    int *bins = all_bins[group], *gathered = all_gathered + group;
    float* list = all_lists[group];
#pragma unroll
    for (int bin = thread; bin < BINS; bin += WARPS * WARP) bins[bin] = 0;
    if (thread == 0) *gathered = 0;

    moments<WARPS>(row, r, n, error, mean, deviation);
    if (k < n) {
        float scale = BINS / (window * deviation);
        const float shift = ZERO + BINS / 2 - (mean + quantile * deviation) * scale;
        const auto bin_of = [&](float v) { return fmaf(v, scale, shift); };  // ZERO + it, rounded
        group_barrier<WARPS>();
        MARK(BIN)
        float beyond = 0;
        row.each([&](int, float v) {
            const float bin = bin_of(v);
            beyond += bin >= ZERO + BINS ? 1.f : 0.f;
            if (bin >= ZERO && bin < ZERO + BINS)
                atomicAdd(bins + (int)(__float_as_uint(bin) - ZERO_BITS), 1);
        });
        int above = group_sum<WARPS>((int)beyond, 0);
        group_barrier<WARPS>();
        scale = __shfl_xor_sync(ALL, scale, 0);  // or the compiler keeps all bins in registers
        MARK(SCAN)  // each warp for itself: lane l has the l-th lowest EACH bins
        int sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum += bins[lane * EACH + i];
        int total = sum;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int other = __shfl_xor_sync(ALL, total, step);
            if (!(lane & step)) above += other;
            total += other;
        }
        int found = 0;  // the bin, how many scores it holds, and how many of them win
        if (above <= k && k < above + sum) {
            int i = EACH - 1;
            for (; k >= above + bins[lane * EACH + i]; --i) {
                MARK(SEEK)
                above += bins[lane * EACH + i];
            }
            MARK(HIT)
            const int holds = bins[lane * EACH + i];
            if (holds <= MOST) found = (lane * EACH + i) << 16 | holds << 8 | (k - above);
        }
        MARK(RESULT)
        found = warp_sum(found);
        const int held = found >> 8 & 255, winners = found & 255;
        const float bin = ZERO + (found >> 16);
        if (held && !winners) {
            MARK(EDGE)
            write(row, mask, [&](float v) { return bin_of(v) > bin; });
            return;
        }
        if (held) {
            constexpr int TOGETHER = 4;  // one branch for so many scores
#pragma unroll
            for (int j = 0; j < ITEMS; j += TOGETHER) {
                MARK(GATHER)
                bool any = false;
#pragma unroll
                for (int i = j; i < j + TOGETHER && i < ITEMS; ++i)
                    any |= bin_of(row.score[i]) == bin;
                if (any) {
                    MARK(CHECK)
#pragma unroll
                    for (int i = j; i < j + TOGETHER && i < ITEMS; ++i)
                        if (bin_of(row.score[i]) == bin) {
                            MARK(FOUND)
                            list[atomicAdd(gathered, 1)] = row.score[i];
                        }
                }
            }
            MARK(RANK)
            group_barrier<WARPS>();
            const float mine = lane < held ? list[lane] : NOT_A_NUMBER;
            int larger = 0, as_large = 0;
#pragma unroll 1
            for (int i = 0; i < held; ++i) {
                MARK(COMPARE)
                larger += !reaches(mine, list[i]);
                as_large += reaches(list[i], mine);
            }
            MARK(LOSER)
            const unsigned best = __ballot_sync(ALL, larger <= winners && winners < as_large);
            const float loser = list[__popc((best & -best) - 1)] + 0.f;  // - 0 is 0
            edge = Order::value(Order::of(loser) + 1);
        } else {
            edge = search<WARPS, false>(row, k, mean + quantile * deviation, deviation * gap);
        }
    }
    MARK(WRITE)
    write(row, mask, [&](float v) { return reaches(v, edge); });
}
