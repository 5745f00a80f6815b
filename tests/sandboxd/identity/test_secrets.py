import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.identity.secrets import ALPHABET, digest, display_prefix, is_well_formed, new_key


def test_a_new_key_has_the_documented_form():
    key = new_key()
    assert re.fullmatch(r"8080_live_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", key)
    assert is_well_formed(key)
    assert display_prefix(key) == key[:14]
    assert len(digest(key)) == 64


def test_keys_differ():
    assert len({new_key() for _ in range(1000)}) == 1000


@given(st.integers(min_value=10, max_value=52), st.sampled_from(ALPHABET))
def test_any_one_wrong_character_is_noticed(position, char):
    key = new_key()
    changed = key[:position] + char + key[position + 1 :]
    assert is_well_formed(changed) is (changed == key)


@given(st.text())
def test_text_is_no_key(text):
    assert not is_well_formed(text)
    digest(text.encode("utf-8", "surrogateescape").decode("latin-1"))


@pytest.mark.parametrize(
    "change", [lambda k: k + "\n", lambda k: k[:-1], lambda k: " " + k, lambda k: k.upper()]
)
def test_a_key_copied_badly_is_noticed(change):
    assert not is_well_formed(change(new_key()))
