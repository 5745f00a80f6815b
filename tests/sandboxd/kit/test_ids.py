import re

from sandboxd.kit.ids import ID_PATTERN, RANDOM_BITS, is_id, new_id


def test_an_id_has_its_prefix_and_the_documented_form():
    value = new_id("sbx")
    assert value.startswith("sbx_")
    assert re.fullmatch(ID_PATTERN, value)


def test_text_order_is_time_order():
    times = [0, 1, 31, 32, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1]
    ids = [new_id("sbx", now_ms=now_ms) for now_ms in times]
    assert ids == sorted(ids)


def test_ids_of_one_millisecond_differ():
    assert len({new_id("sbx", now_ms=1) for _ in range(1000)}) == 1000


def test_all_random_bits_vary():
    assert RANDOM_BITS >= 120
    alphabet = "0123456789abcdefghijklmnopqrstuv"
    ones = zeros = 0
    for _ in range(400):
        text = new_id("x" * 2, now_ms=0).partition("_")[2]
        value = 0
        for char in text:
            value = value << 5 | alphabet.index(char)
        assert value < 1 << RANDOM_BITS
        ones |= value
        zeros |= ~value & ((1 << RANDOM_BITS) - 1)
    assert ones == zeros == (1 << RANDOM_BITS) - 1


def test_the_host_name_form_fits_into_a_label_with_a_port():
    assert len("65535-" + new_id("sbx").partition("_")[2]) <= 63


def test_what_can_be_an_id():
    assert is_id(new_id("sbx"))
    for text in ("", "sbx_", new_id("sbx")[:-1], new_id("sbx") + "\n", new_id("sbx").upper(), "a\0"):
        assert not is_id(text)
