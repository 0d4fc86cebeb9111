"""Settings: the order of their sources, and one clear line for each bad value."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from tokenllm import settings
from tokenllm.cli import main
from tokenllm.config import ServeConfig
from tokenllm.settings import SettingError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in settings.TABLE.values():
        monkeypatch.delenv(field.variable, raising=False)


def config_of(file: Path | None = None, environment: dict[str, str] | None = None, **flags: str) -> ServeConfig:
    return settings.to_config(settings.gather(file, environment or {}, flags))


def test_defaults_without_any_source() -> None:
    assert config_of() == ServeConfig()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "tokenllm.toml"
    file.write_text('port = 1\ndrain_s = 1\npolicy = "conservative"\ngateway_processes = 3\n')
    environment = {"TOKENLLM_PORT": "2", "TOKENLLM_DRAIN_S": "2", "TOKENLLM_HOST": ""}
    config = config_of(file, environment, port="3")
    assert (config.port, config.drain_s, config.gateway_processes) == (3, 2.0, 3)
    assert config.host == "127.0.0.1", "an empty variable counts as unset"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "65536", "a whole number from 0 to 65535"),
        ("port", "-1", "a whole number from 0 to 65535"),
        ("port", "80.5", "a whole number from 0 to 65535"),
        ("port", "eighty", "a whole number from 0 to 65535"),
        ("gateway_processes", "0", "a whole number from 1 to 64"),
        ("drain_s", "nan", "a number from 0 to 86400"),
        ("drain_s", "soon", "a number from 0 to 86400"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("allow_no_auth", "maybe", "true or false"),
    ],
)
def test_a_bad_value_is_named_with_its_setting_and_source(name: str, value: str, expected: str) -> None:
    variable = settings.TABLE[name].variable
    with pytest.raises(SettingError) as refusal:
        config_of(environment={variable: value})
    assert str(refusal.value) == f"{name} must be {expected}, but {variable} says {value!r}"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenllm.toml"
    for content, word in [("port = =", "line 1"), ("prot = 8000", "'prot'"), ("api_key = 5", "***")]:
        file.write_text(content)
        with pytest.raises(SettingError) as refusal:
            config_of(file)
        assert str(file) in str(refusal.value)
        assert word in str(refusal.value)
    with pytest.raises(SettingError, match="No such file"):
        config_of(tmp_path / "absent.toml")


def test_every_setting_has_a_flag_that_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    other = {"model": "m", "port": "9", "allow_no_auth": "true", "device": "cpu", "dtype": "float32"}
    other |= {"load_format": "dummy", "policy": "conservative", "gateway_processes": "2", "ring_bytes": "65536"}
    texts = {
        name: other.get(name) or ("7" if isinstance(f.default, int | float) else "text")
        for name, f in settings.TABLE.items()
    }
    flags = [texts["model"], "--print-config"]
    for name, text in texts.items():
        if name != "model":
            flag = settings.TABLE[name].flag
            flags += [flag] if name == "allow_no_auth" else [flag, text]
    assert main(["serve", *flags]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    expected = msgspec.to_builtins(config_of(**texts)) | {"api_key": "***"}
    assert printed == expected


def test_the_printed_settings_are_a_file_that_gives_them_again(tmp_path: Path) -> None:
    given = settings.gather(None, {"TOKENLLM_SERVED_MODEL_NAME": 'a "quoted" \\ näme 🙂'}, {"port": "0"})
    config = settings.to_config(given)
    (tmp_path / "again.toml").write_text(settings.as_toml(config, given))
    assert config_of(tmp_path / "again.toml") == config


def test_keys_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key", "sesame", "--print-config"]) == 0
    assert "sesame" not in capsys.readouterr().out


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_no_start_on_a_reachable_address_without_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", host]) == 2
    error = capsys.readouterr().err
    assert repr(host) in error
    assert "--api-key" in error
    settings.check(config_of(host=host, api_key="k"))
    settings.check(config_of(host=host, allow_no_auth="true"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_is_served_without_a_key(host: str) -> None:
    settings.check(config_of(host=host))


def test_a_key_file_holds_a_key_per_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for content in ("", "\n  \n"):
        file.write_text(content)
        with pytest.raises(SettingError, match="holds no key"):
            settings.check(config_of(api_key_file=str(file)))
    file.write_text("one\n two \n\n")
    config = config_of(host="0.0.0.0", api_key_file=str(file), api_key="three")
    settings.check(config)
    assert settings.accepted_keys(config) == {"one", "two", "three"}
    with pytest.raises(SettingError, match="absent"):
        settings.check(config_of(api_key_file=str(tmp_path / "absent")))


def test_an_empty_key_flag_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key", ""]) == 2
    assert "api_key must not be empty" in capsys.readouterr().err


def test_a_missing_chat_template_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--chat-template", "nowhere.jinja"]) == 2
    assert "'nowhere.jinja'" in capsys.readouterr().err


def test_help_tells_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for field in settings.TABLE.values():
        assert field.variable in text


def test_rings_hold_a_step_of_the_whole_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ring-bytes", "65536", "--max-running-requests", "65"]) == 2
    assert "ring_bytes must be at least 66560" in capsys.readouterr().err
