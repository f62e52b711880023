// CUDA on the CPU, for tests: what the kernels use of CUDA's language and library, as plain C++.
//
// shim_runtime.cpp runs one block at a time, each thread as a fiber, in random order, and watches
// every memory access that the compiler's sanitizer hooks report.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 800
#define UNWATCHED __attribute__((no_sanitize("thread")))  // touches the shim's own memory

struct Index {
    unsigned x, y, z;
};
struct Builtins {
    Index thread, block, block_size, grid_size;
};
extern Builtins builtins;
#define threadIdx builtins.thread
#define blockIdx builtins.block
#define blockDim builtins.block_size
#define gridDim builtins.grid_size

enum Meeting { SHUFFLE, BALLOT, REDUCE };

void __syncthreads();
// Waits until all lanes of `mask` have come to the same call; returns what each of the 32 brought.
const uint64_t* shim_meet(Meeting kind, unsigned mask, uint64_t value);
unsigned shim_lane();
unsigned long long atomicMin(unsigned long long* at, unsigned long long value);

template <class To, class From> UNWATCHED To shim_bits(From from) {
    To to{};
    memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
    return to;
}

template <class T> UNWATCHED T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return shim_bits<T>(shim_meet(SHUFFLE, mask, shim_bits<uint64_t>(value))[shim_lane() ^ lanes]);
}
UNWATCHED inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    const uint64_t* all = shim_meet(BALLOT, mask, predicate);
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane) result |= (unsigned)all[lane] << lane;
    return result;
}
UNWATCHED inline int __reduce_add_sync(unsigned mask, int value) {
    const uint64_t* all = shim_meet(REDUCE, mask, shim_bits<uint64_t>(value));
    int result = 0;
    for (int lane = 0; lane < 32; ++lane) result += shim_bits<int>(all[lane]);
    return result;
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
    return result;
}
inline unsigned __float_as_uint(float x) { return shim_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return shim_bits<float>(x); }
inline long long __double_as_longlong(double x) { return shim_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return shim_bits<double>(x); }

// --- the table of kernels, with the types of their parameters as NumPy calls them ---------------

struct ShimType {
    const char* name;
    bool pointer;
};
template <class T> constexpr ShimType shim_type;  // not initialised: other types do not compile
template <> constexpr ShimType shim_type<unsigned char> = {"uint8", false};
template <> constexpr ShimType shim_type<int> = {"int32", false};
template <> constexpr ShimType shim_type<unsigned> = {"uint32", false};
template <> constexpr ShimType shim_type<long long> = {"int64", false};
template <> constexpr ShimType shim_type<unsigned long long> = {"uint64", false};
template <> constexpr ShimType shim_type<float> = {"float32", false};
template <> constexpr ShimType shim_type<double> = {"float64", false};
template <class T> constexpr ShimType shim_type<T*> = {shim_type<T>.name, true};
template <class T> constexpr ShimType shim_type<const T*> = {shim_type<T>.name, true};

struct ShimKernel {
    const char* name;
    const ShimType* parameters;
    int parameter_count;
    void (*run)(void** arguments);
};
void shim_register(ShimKernel kernel);

template <auto kernel> struct ShimCall;
template <class... P, void (*kernel)(P...)> struct ShimCall<kernel> {
    static constexpr ShimType parameters[] = {shim_type<P>...};
    template <size_t... I>
    UNWATCHED static void call(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<P*>(arguments[I])...);
    }
    static void run(void** arguments) { call(arguments, std::index_sequence_for<P...>{}); }
    UNWATCHED explicit ShimCall(const char* name) {
        shim_register({name, parameters, sizeof...(P), run});
    }
};
