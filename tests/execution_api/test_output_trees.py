"""Output directories as Trees, written by the server, and files that change while they are collected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from expbuild.digest import DigestFunction
from expbuild.reapi import ActionResult, Directory, Tree
from tests.support.actions import Client, SideEffects, from_message, shell

MAKE = """
mkdir -p d/b/twin d/a/twin d/empty
for t in d/a/twin d/b/twin; do echo same > $t/f; done
printf '#!/bin/sh' > d/tool; chmod +x d/tool; echo > d/B; echo > d/a.txt
ln -s ../x d/a/up; ln -s nowhere d/dangling; ln -s twin/f d/b/inside; ln -s empty d/to-empty"""


def _messages(tree: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of an encoded Tree, in the order in which they lie there: (tag, bytes)."""
    position = 0
    while position < len(tree):
        tag, position = tree[position], position + 1
        length = shift = 0
        while True:
            byte, position = tree[position], position + 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield tag, tree[position : position + length]
        position += length


async def _tree(client: Client) -> tuple[ActionResult, bytes]:
    result = (await client.execute(shell(MAKE, output_paths=["d"]))).result
    return result, await client.read(result.output_directories[0].tree_digest)


async def test_OUT_09_OUT_10_DIG_17_a_tree_is_canonical_and_sorted(client: Client) -> None:
    """The root first, parents before children, each directory once, each list by name; and so are its bytes."""
    result, data = await _tree(client)
    assert result.output_directories[0].is_topologically_sorted
    fields = list(_messages(data))
    assert [tag for tag, _ in fields] == [0x0A] + [0x12] * (len(fields) - 1)
    directories = [Directory.FromString(encoded) for _, encoded in fields]
    digests = [hashlib.sha256(encoded).hexdigest() for _, encoded in fields]
    assert len(set(digests)) == len(digests) == 5, "root, a, b, one twin, empty"
    for number, directory in enumerate(directories):
        assert directory.SerializeToString(deterministic=True) == fields[number][1]
        for nodes in (directory.files, directory.directories, directory.symlinks):
            names = [node.name for node in nodes]
            assert names == sorted(names)
        for node in directory.directories:
            assert digests.index(node.digest.hash) > number
    named = {node.digest.hash for directory in directories for node in directory.directories}
    assert named == set(digests[1:])
    assert (await _tree(client))[1] == data, "equal directories are equal bytes"


async def test_OUT_13_OUT_19_links_stay_links_and_nothing_unasked_is_added(client: Client) -> None:
    _, data = await _tree(client)
    tree = Tree.FromString(data)
    assert {link.name: link.target for link in tree.root.symlinks} == {"dangling": "nowhere", "to-empty": "empty"}
    assert {file.name: file.is_executable for file in tree.root.files} == {"B": False, "a.txt": False, "tool": True}
    targets = {link.target for child in tree.children for link in child.symlinks}
    assert targets == {"../x", "twin/f"}
    for directory in (tree.root, *tree.children):
        assert not directory.HasField("node_properties")
        assert not any(node.HasField("node_properties") for node in (*directory.files, *directory.symlinks))


async def test_RUN_07_what_is_stored_is_what_was_hashed_whatever_still_writes(
    client: Client, effects: SideEffects
) -> None:
    """A writer the action leaves behind appends all the time: each blob is what its digest says."""
    script = f"""
    echo > f; mkdir d
    (setsid sh -c 'while :; do echo line >> f; echo line >> d/f; done' &)
    while [ "$(wc -l < d/f)" -lt 100 ]; do :; done 2>/dev/null; {effects.mark("ran")}"""
    result = (await client.execute(shell(script, output_paths=["f", "d"]))).result
    tree = Tree.FromString(await client.read(result.output_directories[0].tree_digest))
    for digest in (result.output_files[0].digest, tree.root.files[0].digest):
        data = await client.read(digest)
        assert DigestFunction.SHA256.digest_of(data) == from_message(digest)
        assert data.count(b"line") > 0
