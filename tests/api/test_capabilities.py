"""GetCapabilities: the answer under which every client starts."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import text_format

from expbuild.reapi import GetCapabilitiesRequest, ServerCapabilities
from tests.api.client import TIMEOUT_S, Client, Refusal, refusal
from tests.api.conftest import StartServer

_CACHE_ONLY = """
cache_capabilities {
  digest_functions: SHA256
  action_cache_update_capabilities { update_enabled: true }
  cache_priority_capabilities { priorities { min_priority: -1000 max_priority: 1000 } }
  max_batch_total_size_bytes: 4000000
  symlink_absolute_path_strategy: ALLOWED
  supported_compressors: [IDENTITY, ZSTD, DEFLATE]
  supported_batch_update_compressors: [IDENTITY, ZSTD, DEFLATE]
}
low_api_version { major: 2 }
high_api_version { major: 2 minor: 3 }
"""


async def capabilities_of(address: str, instance_name: str = "") -> ServerCapabilities:
    client = Client(address)
    request = GetCapabilitiesRequest(instance_name=instance_name)
    answer: ServerCapabilities = await client.capabilities.GetCapabilities(request, timeout=TIMEOUT_S)
    await client.close()
    return answer


@pytest.mark.parametrize("instance_name", ["", "main", "a/b/c"])
@pytest.mark.duty("CAP-01", "CAP-03", "CAP-12", "CAP-18", "CAP-19")
async def test_cap_07_08_10_13_16_17_answer_of_a_cache_is_exactly_what_every_client_starts_with(
    start_server: StartServer, instance_name: str
) -> None:
    """Low 2.0, IDENTITY first, no execution capabilities where nothing is executed (CAP-01), for any instance."""
    answer = await capabilities_of(start_server("plain").address, instance_name)
    assert answer == text_format.Parse(_CACHE_ONLY, ServerCapabilities())


async def test_cap_04_05_06_execution_names_the_function_in_the_old_and_the_new_field(
    start_server: StartServer,
) -> None:
    """Old clients read only the singular field, new ones the list; both need priorities that include theirs."""
    server = start_server("executing", capabilities={"exec_enabled": True, "digest_functions": ["SHA256", "BLAKE3"]})
    answer = await capabilities_of(server.address)
    expected = text_format.Parse(_CACHE_ONLY, ServerCapabilities())
    text_format.Merge("cache_capabilities { digest_functions: BLAKE3 }", expected)
    text_format.Merge(
        """execution_capabilities {
          digest_function: SHA256
          digest_functions: [SHA256, BLAKE3]
          exec_enabled: true
          execution_priority_capabilities { priorities { min_priority: -1000 max_priority: 1000 } }
        }""",
        expected,
    )
    assert answer == expected


async def test_cap_10_13_15_16_configuration_decides_what_is_advertised(start_server: StartServer) -> None:
    server = start_server(
        "narrow",
        capabilities={
            "digest_functions": ["SHA1", "MD5"],
            "max_batch_total_size_bytes": 100_000,
            "supported_compressors": ["DEFLATE"],
            "action_cache_update_enabled": False,
            "symlink_absolute_path_strategy": "DISALLOWED",
        },
    )
    expected = """
    cache_capabilities {
      digest_functions: [SHA1, MD5]
      action_cache_update_capabilities {}
      cache_priority_capabilities { priorities { min_priority: -1000 max_priority: 1000 } }
      max_batch_total_size_bytes: 100000
      symlink_absolute_path_strategy: DISALLOWED
      supported_compressors: [IDENTITY, DEFLATE]
      supported_batch_update_compressors: [IDENTITY, DEFLATE]
    }
    low_api_version { major: 2 }
    high_api_version { major: 2 minor: 3 }
    """
    assert await capabilities_of(server.address) == text_format.Parse(expected, ServerCapabilities())


async def test_compressors_can_be_switched_off(start_server: StartServer) -> None:
    server = start_server("uncompressed", capabilities={"supported_compressors": []})
    cache = (await capabilities_of(server.address)).cache_capabilities
    assert [*cache.supported_compressors, *cache.supported_batch_update_compressors] == [0, 0]


@pytest.mark.parametrize(
    "instance_name", ["blobs", "a/uploads", "a//b", "/a", "a/", "operations/x", "compressed-blobs", "a\nb", "x" * 2000]
)
async def test_gen_11_malformed_instance_name_is_invalid_argument(
    start_server: StartServer, instance_name: str
) -> None:
    answer = await refusal(capabilities_of(start_server("plain").address, instance_name))
    assert answer == Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{instance_name[:100]!r} cannot be an instance name: segments are separated by single slashes, none is empty "
        "or a word of the protocol (blobs, uploads, …)",
    )
