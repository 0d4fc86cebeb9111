"""compose.yaml is safe as it stands: only the loopback address is published, and the containers can do little."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenllm.config import ServeConfig
from tokenllm.settings import TABLE

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
KEYS = yaml.safe_load((ROOT / "compose.keys.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
SERVERS = [service for name, service in SERVICES.items() if name.startswith("tokenllm-")]


def dockerfile(service: dict[str, Any]) -> str:
    return (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")


def test_there_is_a_profile_for_each_device_and_for_the_chat_page() -> None:
    assert {profile for service in SERVICES.values() for profile in service["profiles"]} == {"cpu", "gpu", "webui"}


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_published_on_the_loopback_address_only(service: dict[str, Any]) -> None:
    assert service["ports"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("service", SERVERS, ids=["cpu", "gpu"])
def test_a_server_is_nobody_and_may_write_nothing_but_its_cache(service: dict[str, Any]) -> None:
    assert service["user"] == "10001:10001"
    assert "USER 10001:10001" in dockerfile(service)
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")] == ["/cache"]
    assert "VOLUME /cache" in dockerfile(service)


def test_models_and_compiled_kernels_outlive_the_container() -> None:
    """Kernels that are compiled anew at every start cost minutes; the volume is theirs too."""
    service = SERVICES["tokenllm-gpu"]
    (volume,) = [volume.split(":")[0] for volume in service["volumes"] if volume.endswith(":/cache")]
    assert volume in COMPOSE["volumes"]
    environment = dict(re.findall(r"\b(XDG_CACHE_HOME|TRITON_CACHE_DIR)=(\S+)", dockerfile(service)))
    assert environment == {"XDG_CACHE_HOME": "/cache", "TRITON_CACHE_DIR": "/cache/triton"}


@pytest.mark.parametrize("service", SERVERS, ids=["cpu", "gpu"])
def test_docker_waits_longer_than_the_server_drains(service: dict[str, Any]) -> None:
    assert int(service["stop_grace_period"].removesuffix("s")) > ServeConfig().drain_s


@pytest.mark.parametrize("service", SERVERS, ids=["cpu", "gpu"])
def test_every_variable_is_a_setting_and_every_build_argument_is_taken(service: dict[str, Any]) -> None:
    text = dockerfile(service)
    used = set(re.findall(r"TOKENLLM_\w+", text)) | service["environment"].keys() | keys_of("tokenllm-cpu").keys()
    assert {name for name in used if name.startswith("TOKENLLM_")} <= {field.variable for field in TABLE.values()}
    assert all(re.search(rf"^ARG {name}\b", text, re.MULTILINE) for name in service["build"]["args"])


def keys_of(service: str) -> dict[str, str]:
    return KEYS["services"][service]["environment"]


def test_the_overlay_with_keys_covers_every_server_and_takes_back_the_permission_to_do_without() -> None:
    assert list(KEYS["services"]) == [name for name in SERVICES if name.startswith("tokenllm-")]
    for name in KEYS["services"]:
        assert keys_of(name)["TOKENLLM_ALLOW_NO_AUTH"] == "false"
        assert keys_of(name)["TOKENLLM_API_KEY_FILE"] == f"/run/secrets/{KEYS['services'][name]['secrets'][0]}"


def test_the_chat_page_talks_to_whichever_server_runs() -> None:
    address = SERVICES["open-webui"]["environment"]["OPENAI_API_BASE_URL"]
    assert address == "http://tokenllm:8000/v1"
    assert all(server["networks"]["default"]["aliases"] == ["tokenllm"] for server in SERVERS)
