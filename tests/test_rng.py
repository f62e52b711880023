"""Random streams: Philox's published answers, and independence of calls and their order."""

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.rng import LOW, Key, key, philox, random_bits, stream, uniform

# Random123's kat_vectors for philox4x64-10: counter, key, answer.
KNOWN_ANSWERS = [
    ("0000000000000000 0000000000000000 0000000000000000 0000000000000000",
     "0000000000000000 0000000000000000",
     "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ("ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
     "ffffffffffffffff ffffffffffffffff",
     "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ("243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
     "452821e638d01377 be5466cf34e90c6c",
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def of_numpy(counter, key_words, n):
    """Return n words of NumPy's generator, which raises its counter before each block."""
    before = sum(word << 64 * i for i, word in enumerate(counter)) - 1
    before %= 1 << 256
    start = np.array([before >> 64 * i & (1 << 64) - 1 for i in range(4)], "uint64")
    return np.random.Philox(key=np.array(key_words, "uint64"), counter=start).random_raw(n).tolist()


@pytest.mark.parametrize(("counter", "key_words", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key_words, answer):
    blocks = tuple(np.array([word], "uint64") for word in words(counter))
    got = philox(blocks, Key(*words(key_words)))
    assert [int(word[0]) for word in got] == words(answer)
    assert of_numpy(words(counter), words(key_words), 4) == words(answer)


def test_philox_is_that_of_numpy(draw):
    counters = draw.integers(0, 1 << 64, (4, 50), dtype="uint64")
    key_words = draw.integers(0, 1 << 64, 2, dtype="uint64").tolist()
    got = np.array(philox(tuple(counters), Key(*key_words)))
    for i in range(50):
        assert got[:, i].tolist() == of_numpy(counters[:, i].tolist(), key_words, 4)


@pytest.mark.parametrize("n", [0, 1, 8, 9, 1000])
def test_number_i_is_half_word_i_of_the_blocks_at_the_counter(n):
    numbers = Key(5, 2**63 + 6)
    bits = random_bits(numbers, n, np.array([[0, 3], [2**40, 3]]))
    assert (bits.dtype, bits.shape) == ("uint32", (2, 2, n))
    for i in np.ndindex(2, 2):
        at = [[0, 3], [2**40, 3]][i[0]][i[1]]
        whole = of_numpy([1, 0, at, 0], numbers, n)
        halves = [half for word in whole for half in (word & LOW, word >> 32)]
        assert bits[i].tolist() == halves[:n]
    assert random_bits(numbers, n, np.zeros(0, int)).shape == (0, n)
    np.testing.assert_array_equal(random_bits(numbers, n, np.array(3)), bits[0, 1])


@pytest.mark.parametrize("along", ["numbers", "counters", "keys"])
def test_bits_are_uniform(along):
    n = 1 << 16
    if along == "numbers":
        bits = random_bits(key(0, "uniform"), n, np.array(0))
    elif along == "counters":
        bits = random_bits(key(0, "uniform"), 1, np.arange(n))[:, 0]
    else:
        n = 1 << 10
        bits = np.array([random_bits(key(seed, "uniform"), 1, np.array(0))[0] for seed in range(n)])
    ones = np.unpackbits(bits.view("uint8")).reshape(-1, 32).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / n**0.5  # five standard deviations
    assert abs((bits / LOW).mean() - 0.5) < 5 / 12**0.5 / n**0.5


def test_a_stream_is_a_function_of_seed_and_name():
    first = stream(3, "W", 1).random(4)
    stream(3, "W", 2).random(9)
    np.testing.assert_array_equal(stream(3, "W", 1).random(4), first)
    np.testing.assert_array_equal(stream(np.int64(3), "W", 1).random(4), first)
    for other in (stream(4, "W", 1), stream(3, "W", 2), stream(3, "W", "1"), stream(3, "W1")):
        assert (other.random(4) != first).all()
    assert key(3, "W", 1) == key(3, "W", 1)
    assert len({key(3, "W", 1), key(4, "W", 1), key(3, "W", 2), key(3, "W", "1")}) == 4


def test_uniform_numbers_are_the_same_in_every_dtype_and_keep_their_bound():
    numpy = get_backend("numpy")
    single, double = (uniform(numpy, dtype, 25, (300, 400), 3, "V", 1)
                      for dtype in ("float32", "float64"))
    assert (single.dtype, double.dtype) == ("float32", "float64")
    np.testing.assert_array_equal(single, double)
    assert np.abs(single).max() <= np.float32(0.2)
    assert abs(double.var() - 0.2**2 / 3) < 5 * 0.2**2 * (4 / 45 / double.size) ** 0.5


def test_streams_stay_what_they_are():
    """A change here would change every experiment's initial weights and data order."""
    assert key(0, "dropout") == Key(0xF14FF1E3A393A60D, 0xB113CF7E00F8144C)
    assert stream(0, "W", 1).integers(0, 1 << 32, 3).tolist() == [855560503, 4039843485, 2522235345]
    assert random_bits(key(0, "dropout"), 3, np.array(7)).tolist() == [
        3625021822, 4006377194, 2367030967]
