// Runs kernels that were compiled with cuda_shim.h: blocks one after the other, the threads of a
// block as fibers that take turns at barriers and warp operations, in an order drawn afresh each
// round. Compiled without a sanitizer; the kernels are compiled with the hooks of GCC's sanitizers
// for threads, bounds and alignment, which are implemented here (their own libraries are not
// linked). So these are errors, found whatever the order of the threads:
//
//   - access outside the arrays that were passed, or outside a shared array;
//   - two threads that touch one byte, one of them writing, with no barrier in between
//     (or from two blocks, which nothing orders);
//   - a read of shared memory that no thread of this block has written;
//   - misaligned access;
//   - a warp operation whose lanes do not all come, or come with different masks; a barrier that
//     not all threads reach.
#include "cuda_shim.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

Builtins builtins = {{~0u, 0, 0}, {}, {}, {}};  // not zero, so that it does not lie in .bss

namespace {

constexpr size_t STACK = 64 * 1024;
constexpr unsigned WARP_SIZE = 32, LARGEST_BLOCK = 1024;

enum State { RUNNING, AT_BARRIER, AT_MEETING, DONE };

struct Fiber {
    State state;
    bool started;
    Meeting kind;
    unsigned mask;
    uint64_t value, gathered[WARP_SIZE];
    jmp_buf place;
};

struct Array {
    const char* begin;
    size_t bytes;
};

// Who touched a byte last, and when: `era` counts barriers, over all blocks of a launch.
struct Touch {
    unsigned write_era = 0, writer = 0, read_era = 0, reader = 0;
};
constexpr unsigned SEVERAL = ~0u;  // readers

std::vector<Fiber> fibers;
std::unique_ptr<char[]> stacks;  // not set to zero, which would make all their pages resident
unsigned current, threads;
ucontext_t start;
jmp_buf scheduler;
uint64_t random_state;
std::string error;
const ShimKernel* kernel;
void** arguments;

bool running, watching;
std::vector<Array> arrays;
std::unordered_map<const char*, Touch> touched;
unsigned era, block_era;  // now, and when this block began

std::vector<ShimKernel>& kernels() {
    static std::vector<ShimKernel> all;
    return all;
}

uint64_t draw() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void fail(const char* what) {
    if (!error.empty()) return;
    char text[256];
    snprintf(text, sizeof text, "%s (block %u,%u thread %u)", what, builtins.block.x,
             builtins.block.y, current);
    error = text;
}

void give_way() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

void fiber_main() {
    kernel->run(arguments);
    fibers[current].state = DONE;
    _longjmp(scheduler, 1);
}

void resume(unsigned thread) {
    current = thread;
    const unsigned x = builtins.block_size.x, y = builtins.block_size.y;
    builtins.thread = {thread % x, thread / x % y, thread / (x * y)};
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&start);
    start.uc_stack.ss_sp = &stacks[thread * STACK];
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

// Lets the lanes that wait in one warp operation go on, if all that its mask names are there.
bool meeting_complete(unsigned thread) {
    const unsigned warp = thread / WARP_SIZE * WARP_SIZE;
    const Fiber& first = fibers[thread];
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane) {
        if (!(first.mask >> lane & 1)) continue;
        if (warp + lane >= threads || fibers[warp + lane].state == DONE) {
            fail("a warp operation names a lane that does not exist or has returned");
            return false;
        }
        const Fiber& other = fibers[warp + lane];
        if (other.state != AT_MEETING) return false;
        if (other.kind != first.kind || other.mask != first.mask) {
            fail("lanes of one warp meet in different operations or with different masks");
            return false;
        }
    }
    uint64_t values[WARP_SIZE] = {};
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane)
        if (first.mask >> lane & 1) values[lane] = fibers[warp + lane].value;
    const unsigned mask = first.mask;
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane)
        if (mask >> lane & 1) {
            memcpy(fibers[warp + lane].gathered, values, sizeof values);
            fibers[warp + lane].state = RUNNING;
        }
    return true;
}

void run_block() {
    std::vector<unsigned> order(threads);
    for (unsigned thread = 0; thread < threads; ++thread) {
        fibers[thread].state = RUNNING;
        fibers[thread].started = false;
        order[thread] = thread;
    }
    block_era = ++era;
    for (unsigned alive = threads; alive;) {
        unsigned waiting = 0;
        for (unsigned thread = 0; thread < threads; ++thread)
            waiting += fibers[thread].state == AT_BARRIER;
        if (waiting == alive) {
            ++era;
            for (unsigned thread = 0; thread < threads; ++thread)
                if (fibers[thread].state == AT_BARRIER) fibers[thread].state = RUNNING;
        }
        for (unsigned i = threads - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
        bool progress = false;
        for (unsigned thread : order) {
            Fiber& fiber = fibers[thread];
            if (fiber.state == AT_MEETING) meeting_complete(thread);
            if (!error.empty()) return;
            if (fiber.state != RUNNING) continue;
            resume(thread);
            if (!error.empty()) return;
            progress = true;
            alive -= fiber.state == DONE;
        }
        if (!progress && alive) {
            fail("deadlock: some threads wait at a barrier or in a warp operation for others");
            return;
        }
    }
}

// Of this library (hidden: not those of the program): its shared arrays lie in between.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

// One byte of memory is read or written by the running thread.
void touch(const char* at, bool write, bool shared) {
    Touch& last = touched[at];
    if (shared && !write && last.write_era < block_era)
        return fail("a read of shared memory that this block has not written");
    // Blocks are not ordered among each other, so for them all eras of the launch are one.
    const auto unordered = [&](unsigned when) {
        return when == era || (!shared && when && when < block_era);
    };
    const unsigned other_writer = last.writer != current || last.write_era < block_era;
    const unsigned other_reader = last.reader != current || last.read_era < block_era;
    if (unordered(last.write_era) && other_writer)
        fail("a race: a byte was written by another thread");
    if (write && unordered(last.read_era) && other_reader)
        fail("a race: a byte was read by another thread");
    if (write) {
        last.write_era = era;
        last.writer = current;
    } else {
        last.reader = last.read_era == era && last.reader != current ? SEVERAL : current;
        last.read_era = era;
    }
}

void access(const void* pointer, size_t bytes, bool write) {
    if (!running) return;  // static initialisation
    const char* at = static_cast<const char*>(pointer);
    const auto within = [&](const void* begin, size_t size) {
        const char* first = static_cast<const char*>(begin);
        return at >= first && at + bytes <= first + size;
    };
    if (within(stacks.get(), LARGEST_BLOCK * STACK) || within(&builtins, sizeof builtins)) return;
    const bool shared = within(__bss_start, _end - __bss_start);
    bool known = shared;
    for (const Array& array : arrays) known = known || within(array.begin, array.bytes);
    if (!known) {
        fail("an access outside the arrays of this launch");
        give_way();
    }
    if (watching)
        for (size_t i = 0; i < bytes; ++i) touch(at + i, write, shared);
    if (!error.empty()) give_way();
}

}  // namespace

void __syncthreads() {
    fibers[current].state = AT_BARRIER;
    give_way();
}

const uint64_t* shim_meet(Meeting kind, unsigned mask, uint64_t value) {
    Fiber& fiber = fibers[current];
    if (!(mask >> current % WARP_SIZE & 1))
        fail("a warp operation whose mask leaves out its caller");
    fiber.state = AT_MEETING;
    fiber.kind = kind;
    fiber.mask = mask;
    fiber.value = value;
    give_way();
    return fiber.gathered;
}

unsigned shim_lane() { return current % WARP_SIZE; }

unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
    const unsigned long long before = *at;
    if (value < before) *at = value;
    return before;
}

void shim_register(ShimKernel one) { kernels().push_back(one); }

extern "C" {

int shim_count() { return kernels().size(); }
const char* shim_name(int i) { return kernels()[i].name; }
int shim_parameter_count(int i) { return kernels()[i].parameter_count; }
const ShimType* shim_parameters(int i) { return kernels()[i].parameters; }
const char* shim_error() { return error.c_str(); }

// Returns 0, or 1 with a text in shim_error. `watch`: look for races, which costs time.
int shim_launch(int i, const unsigned* grid, const unsigned* block, void** values,
                const Array* passed, int passed_count, int watch, uint64_t seed) {
    error.clear();
    kernel = &kernels()[i];
    arguments = values;
    arrays.assign(passed, passed + passed_count);
    builtins.grid_size = {grid[0], grid[1], grid[2]};
    builtins.block_size = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    if (threads > LARGEST_BLOCK) fail("more than 1024 threads a block");
    fibers.resize(LARGEST_BLOCK);
    if (!stacks) stacks.reset(new char[LARGEST_BLOCK * STACK]);
    random_state = seed * 2654435761u + 1;
    watching = watch;
    running = true;
    touched.clear();
    era = 0;
    for (unsigned z = 0; z < grid[2] && error.empty(); ++z)
        for (unsigned y = 0; y < grid[1] && error.empty(); ++y)
            for (unsigned x = 0; x < grid[0] && error.empty(); ++x) {
                builtins.block = {x, y, z};
                run_block();
            }
    running = false;
    return !error.empty();
}

// --- the hooks of -fsanitize=thread,bounds,alignment ---

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(bytes)                                                        \
    void __tsan_read##bytes(void* at) { access(at, bytes, false); }         \
    void __tsan_write##bytes(void* at) { access(at, bytes, true); }         \
    void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) { access(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { access(at, bytes, true); }

void __ubsan_handle_out_of_bounds(void*, void*) {
    fail("an index outside its array");
    give_way();
}
void __ubsan_handle_type_mismatch_v1(void*, void*) {
    fail("a misaligned access");
    give_way();
}
}
