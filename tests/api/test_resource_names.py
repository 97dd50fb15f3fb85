"""The grammar of resource names: everything it makes is understood, and nothing else is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expbuild.api.compression import Compressor
from expbuild.api.resource_names import BlobName, ResourceNames
from expbuild.digest import Digest, DigestFunction, DigestFunctions
from expbuild.errors import InvalidArgument

pytestmark = pytest.mark.one_transport

FUNCTIONS = (DigestFunction.SHA256, DigestFunction.BLAKE3, DigestFunction.SHA1)
NAMES = ResourceNames(DigestFunctions(FUNCTIONS), (Compressor.IDENTITY, Compressor.ZSTD, Compressor.DEFLATE))

RESERVED = ("blobs", "uploads", "compressed-blobs")
"""The words that end an instance name here. (Which other names are refused is the business of Instances.)"""

_REST = (
    r"(?:blobs|compressed-blobs/(?P<compressor>zstd|deflate))"
    r"/(?:(?P<function>sha256|blake3|sha1)/)?(?P<hash>[0-9a-f]{64}|[0-9a-f]{40})/(?P<size>[0-9]{1,19})"
)
_INSTANCE = r"/?(?:(?P<instance>(?!/)(?:(?!(?:blobs|uploads|compressed-blobs)/)[^/]*/)*?))"
READ_GRAMMAR = re.compile(_INSTANCE + _REST)
WRITE_GRAMMAR = re.compile(_INSTANCE + r"uploads/(?P<upload>[^/]+)/" + _REST + r"(?:/.*)?", re.DOTALL)
"""The grammar once more, as one expression each: what the parser is compared with."""

segments = st.one_of(
    st.sampled_from([*RESERVED, "sha256", "blake3", "zstd", "identity", "", "0", "main", "a" * 64, "b" * 40, "c" * 63]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=8),
)
words = segments.filter(lambda segment: segment and segment not in RESERVED)
instances = st.lists(words, max_size=3).map("/".join)


@st.composite
def digests(draw: st.DrawFn) -> Digest:
    function = draw(st.sampled_from(FUNCTIONS))
    size_bytes = draw(st.integers(0, 2**63 - 1))
    length = function.hash_length
    hash_text = (
        draw(st.text("0123456789abcdef", min_size=length, max_size=length)) if size_bytes else function.empty_hash
    )
    return Digest(hash_text, size_bytes, function)


compressors = st.sampled_from([Compressor.IDENTITY, Compressor.ZSTD, Compressor.DEFLATE])


def _blob_part(digest: Digest, compressor: Compressor) -> str:
    return (
        f"blobs/{digest}"
        if compressor is Compressor.IDENTITY
        else f"compressed-blobs/{compressor.name.lower()}/{digest}"
    )


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


@given(instances, digests(), compressors, st.sampled_from(["", "/"]))
def test_bs_01_every_download_name_is_understood(
    instance: str, digest: Digest, compressor: Compressor, slash: str
) -> None:
    name = slash + _joined(instance, _blob_part(digest, compressor))
    assert NAMES.parse_read(name) == BlobName(instance, digest, compressor)


@given(
    instances, segments.filter(bool), digests(), compressors, st.lists(segments, max_size=4), st.sampled_from(["", "/"])
)
def test_bs_02_04_every_upload_name_is_understood_whatever_follows_it(
    instance: str, upload_id: str, digest: Digest, compressor: Compressor, tail: list[str], slash: str
) -> None:
    name = slash + _joined(instance, f"uploads/{upload_id}", _blob_part(digest, compressor))
    name = "/".join([name, *tail])
    assert NAMES.parse_write(name) == BlobName(instance, digest, compressor, upload_id)


@st.composite
def near_misses(draw: st.DrawFn) -> str:
    """Return a name of either kind in which a few segments were dropped, doubled, swapped or replaced."""
    digest, compressor = draw(digests()), draw(compressors)
    upload = draw(st.sampled_from(["", "uploads/u"]))
    parts = _joined(draw(instances), upload, _blob_part(digest, compressor)).split("/")
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(parts)))
        parts[index : index + draw(st.integers(0, 1))] = draw(st.lists(segments, max_size=2))
    return "/".join(parts)


@settings(max_examples=1000)
@given(st.one_of(near_misses(), st.lists(segments, max_size=8).map("/".join), st.text(max_size=30)))
def test_bs_08_a_name_is_accepted_exactly_when_it_is_of_the_grammar(name: str) -> None:
    """Compared with a second description of the grammar; any other outcome than acceptance is InvalidArgument."""
    assert _accepts(NAMES.parse_read, name) == _is_of(READ_GRAMMAR, name)
    assert _accepts(NAMES.parse_write, name) == _is_of(WRITE_GRAMMAR, name)


def _accepts(parse: object, name: str) -> bool:
    assert callable(parse)
    try:
        parse(name)
    except InvalidArgument:
        return False
    return True


def _is_of(grammar: re.Pattern[str], name: str) -> bool:
    match = grammar.fullmatch(name)
    if match is None:
        return False
    size_bytes, length = int(match["size"]), len(match["hash"])
    function = DigestFunction[match["function"].upper()] if match["function"] else None
    if function is None:
        function = DigestFunction.SHA256 if length == 64 else DigestFunction.SHA1
    if size_bytes > 2**63 - 1 or length != function.hash_length:
        return False
    return size_bytes > 0 or match["hash"] == function.empty_hash


def test_endless_names_are_refused() -> None:
    name = f"uploads/u/blobs/{'a' * 64}/5/"
    assert _accepts(NAMES.parse_write, name.ljust(8192, "x"))
    with pytest.raises(InvalidArgument, match="the resource name is 8193 characters long; at most 8192 are allowed"):
        NAMES.parse_write(name.ljust(8193, "x"))


@given(digests())
def test_dig_12_function_is_named_only_where_the_length_does_not_tell(digest: Digest) -> None:
    """What we write ourselves has the segment for BLAKE3 and for nothing else."""
    assert str(digest).startswith("blake3/") == (digest.function is DigestFunction.BLAKE3)


def test_bs_09_default_function_stands_in_where_no_segment_names_one() -> None:
    """A client that never names its function is understood by a server whose default it is."""
    names = ResourceNames(DigestFunctions([DigestFunction.BLAKE3, DigestFunction.SHA256]), (Compressor.IDENTITY,))
    hash_text = "a" * 64
    assert names.parse_read(f"blobs/{hash_text}/1").digest.function is DigestFunction.BLAKE3
    assert names.parse_read(f"blobs/sha256/{hash_text}/1").digest.function is DigestFunction.SHA256


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(1, 2**63 - 1))
def test_both_kinds_of_name_never_mean_each_other(hash_text: str, size_bytes: int) -> None:
    with pytest.raises(InvalidArgument):
        NAMES.parse_read(f"uploads/u/blobs/{hash_text}/{size_bytes}")
    with pytest.raises(InvalidArgument):
        NAMES.parse_write(f"blobs/{hash_text}/{size_bytes}")
