"""Digest.parse accepts exactly what can be the name of a blob; which function a request means."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuild.digest import MAX_SIZE_BYTES, Digest, DigestFunction, DigestFunctions
from expbuild.errors import InvalidArgument, InvalidDigest

functions = st.sampled_from(DigestFunction)
HEX = set("0123456789abcdef")


@given(functions, st.data(), st.integers(1, MAX_SIZE_BYTES))
def test_dig_01_every_possible_digest_is_accepted(function: DigestFunction, data: st.DataObject, size: int) -> None:
    length = function.hash_length
    hash_text = data.draw(st.text("0123456789abcdef", min_size=length, max_size=length))
    assert Digest.parse(hash_text, size, function) == Digest(hash_text, size, function)


@given(functions, st.one_of(st.text(max_size=130), st.text("0123456789abcdefABCDEF\n/. ", max_size=130)), st.integers())
def test_dig_01_02_06_nothing_else_is_accepted(function: DigestFunction, hash_text: str, size: int) -> None:
    possible = len(hash_text) == function.hash_length and set(hash_text) <= HEX and 0 <= size < 2**63
    possible = possible and (size > 0 or hash_text == function.empty_hash)
    if possible:
        Digest.parse(hash_text, size, function)
    else:
        with pytest.raises(InvalidDigest):
            Digest.parse(hash_text, size, function)


@given(functions, st.data())
def test_dig_01_one_wrong_character_is_enough(function: DigestFunction, data: st.DataObject) -> None:
    good = function.digest_of(b"good").hash
    index = data.draw(st.integers(0, len(good) - 1))
    wrong = data.draw(st.characters(exclude_characters="0123456789abcdef"))
    for bad in (good[:index] + wrong + good[index + 1 :], good[:index] + good[index + 1 :], good + wrong, good + "0"):
        with pytest.raises(InvalidDigest):
            Digest.parse(bad, 4, function)


@given(functions, st.integers(max_value=-1) | st.integers(min_value=2**63))
def test_dig_02_impossible_sizes_are_refused(function: DigestFunction, size: int) -> None:
    with pytest.raises(InvalidDigest):
        Digest.parse("a" * function.hash_length, size, function)


@given(st.binary(max_size=300))
def test_digest_of_is_the_function_it_says(data: bytes) -> None:
    assert DigestFunction.SHA256.digest_of(data) == Digest(
        hashlib.sha256(data).hexdigest(), len(data), DigestFunction.SHA256
    )
    for function in DigestFunction:
        digest = function.digest_of(data)
        assert Digest.parse(digest.hash, digest.size_bytes, function) == digest
        assert digest.is_empty == (data == b"")


@pytest.mark.parametrize(
    ("function", "empty"),
    [
        (DigestFunction.MD5, "d41d8cd98f00b204e9800998ecf8427e"),
        (DigestFunction.SHA1, "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
        (DigestFunction.SHA256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (DigestFunction.BLAKE3, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
    ],
)
def test_dig_04_empty_hashes_are_the_known_ones(function: DigestFunction, empty: str) -> None:
    assert function.empty_hash == empty
    assert Digest.parse(empty, 0, function).is_empty


class TestResolve:
    """DIG-07 to DIG-09: the function a request names, or the one its hash length tells."""

    @pytest.mark.parametrize(
        ("enabled", "number", "length", "expected"),
        [
            pytest.param("SHA256", 0, 64, "SHA256", id="DIG-08-by-length"),
            pytest.param("SHA256 SHA1 MD5 SHA384 SHA512", 0, 32, "MD5", id="DIG-08-MD5"),
            pytest.param("SHA256 SHA1 MD5 SHA384 SHA512", 0, 40, "SHA1", id="DIG-08-SHA1"),
            pytest.param("SHA256 SHA1 MD5 SHA384 SHA512", 0, 96, "SHA384", id="DIG-08-SHA384"),
            pytest.param("SHA256 SHA1 MD5 SHA384 SHA512", 0, 128, "SHA512", id="DIG-08-SHA512"),
            pytest.param("SHA256 BLAKE3", 0, 64, "SHA256", id="DIG-08-BLAKE3-is-not-inferred"),
            pytest.param("SHA1 BLAKE3", 0, 64, "SHA1", id="DIG-08-BLAKE3-is-not-inferred-at-all"),
            pytest.param("BLAKE3 SHA256", 0, 64, "BLAKE3", id="default-comes-first"),
            pytest.param("BLAKE3 SHA1", 0, 40, "SHA1", id="other-length-than-the-default"),
            pytest.param("SHA256", 0, 0, "SHA256", id="nothing-to-tell-by"),
            pytest.param("SHA256 BLAKE3", 9, 64, "BLAKE3", id="DIG-07-named"),
            pytest.param("SHA256 BLAKE3", 9, 40, "BLAKE3", id="DIG-07-named-whatever-the-length"),
        ],
    )
    def test_function_is_found(self, enabled: str, number: int, length: int, expected: str) -> None:
        accepted = DigestFunctions(DigestFunction[name] for name in enabled.split())
        assert accepted.resolve(number, length) is DigestFunction[expected]

    @pytest.mark.parametrize("number", [2, 4, 7, 8, 10, 77, -1, 2**31 - 1])
    def test_dig_09_function_that_is_not_enabled_is_refused(self, number: int) -> None:
        accepted = DigestFunctions([DigestFunction.SHA256, DigestFunction.BLAKE3])
        with pytest.raises(InvalidArgument, match="this server accepts SHA256, BLAKE3"):
            accepted.resolve(number, 64)
