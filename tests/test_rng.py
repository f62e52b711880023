"""Random streams: Philox's published answers, and independence of calls and their order."""

import numpy as np
import pytest

from comet_np.rng import LOW, Key, key, philox, random_bits, stream

# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key_words", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key_words, answer):
    blocks = tuple(np.array([word], "uint64") for word in words(counter))
    got = philox(blocks, Key(*words(key_words)))
    assert [int(word[0]) for word in got] == words(answer)


def test_number_i_is_word_i_mod_4_of_block_i_div_4():
    bits = random_bits(Key(5, 6), 11, np)
    assert bits.dtype == "uint32"
    for i in range(11):
        block = tuple(np.array([c], "uint64") for c in (i // 4, 0, 0, 0))
        assert bits[i] == philox(block, Key(5, 6))[i % 4][0]
    assert random_bits(Key(5, 6), 0, np).shape == (0,)
    np.testing.assert_array_equal(random_bits(Key(5, 6), 1000, np)[:11], bits)


def test_bits_are_uniform():
    bits = random_bits(key(0, "uniform"), 1 << 16, np)
    ones = np.unpackbits(bits.view("uint8")).reshape(-1, 32).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / (1 << 8)  # five standard deviations
    assert abs((bits / LOW).mean() - 0.5) < 5 / 12**0.5 / (1 << 8)


def test_a_stream_is_a_function_of_seed_and_name():
    first = stream(3, "W", 1).random(4)
    stream(3, "W", 2).random(9)
    np.testing.assert_array_equal(stream(3, "W", 1).random(4), first)
    np.testing.assert_array_equal(stream(np.int64(3), "W", 1).random(4), first)
    for other in (stream(4, "W", 1), stream(3, "W", 2), stream(3, "W", "1"), stream(3, "W1")):
        assert (other.random(4) != first).all()
    assert key(3, "W", 1) == key(3, "W", 1)
    assert len({key(3, "W", 1), key(4, "W", 1), key(3, "W", 2), key(3, "W", "1")}) == 4


def test_streams_stay_what_they_are():
    """A change here would change every experiment's initial weights and data order."""
    assert key(0, "dropout") == Key(0xa393a60d, 0xf14ff1e3)
    assert stream(0, "W", 1).integers(0, 1 << 32, 3).tolist() == [855560503, 4039843485, 2522235345]
