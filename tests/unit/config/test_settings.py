# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, precedence, and errors that help."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from pydantic import AliasChoices

from acestep_consumer.client import Client
from acestep_consumer.config.settings import SECRETS, SECTIONS, SettingsError, describe, known_variables, load
from acestep_consumer.config.upstream_settings import RENAMED, WITHOUT_EFFECT
from acestep_schemas.request import AudioFormat


def test_without_any_variable_the_defaults_hold() -> None:
    settings = load({}, None)
    assert (settings.broker.queue_maxsize, settings.broker.queue_workers, settings.engine.lanes) == (200, 1, 1)
    assert settings.engine.models == ("acestep-v15-turbo",)
    assert settings.broker.queue_type == "classic"


def test_checkpoints_in_the_working_directory_are_found_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load({}, None).engine.checkpoint_dir is None
    (tmp_path / "checkpoints").mkdir()
    assert load({}, None).engine.checkpoint_dir == tmp_path / "checkpoints"
    assert load({"ACESTEP_CHECKPOINT_DIR": "elsewhere"}, None).engine.checkpoint_dir == Path("elsewhere")


def test_the_env_file_of_ace_steps_own_server_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    lines = [f"{name}=1" for name in WITHOUT_EFFECT]
    file.write_text("\n".join([*lines, "ACESTEP_CHECKPOINTS_DIR=/models", "ACESTEP_LM_BACKEND=mlx", "PORT=7860"]))
    settings = load({}, file)
    assert settings.without_effect == WITHOUT_EFFECT
    assert (settings.engine.checkpoint_dir, settings.engine.lm_backend) == (Path("/models"), "pt")
    own = load({"ACESTEP_CHECKPOINT_DIR": "/ours"}, file)
    assert own.engine.checkpoint_dir == Path("/ours")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("int8", "int8"), ("int8_weight_only", "int8"), ("true", "int8"), ("none", None), ("None", None), ("false", None),
     ("auto", None)],
)  # fmt: skip
def test_quantization_is_named_as_here_or_as_in_ace_step(given: str, meant: str | None) -> None:
    assert load({"ACESTEP_QUANTIZATION": given}, None).engine.quantization == meant


@pytest.mark.parametrize("given", ["fp8_weight_only", "w8a8_dynamic"])
def test_a_quantization_of_ace_step_that_is_not_here_is_told_with_the_one_that_is(given: str) -> None:
    with pytest.raises(SettingsError, match=rf"ACESTEP_QUANTIZATION.*{given} is not there; int8 \(weights only\) is"):
        load({"ACESTEP_QUANTIZATION": given}, None)


def test_no_setting_of_this_program_is_said_to_have_no_effect() -> None:
    assert not known_variables() & (WITHOUT_EFFECT.keys() | RENAMED.keys())
    assert set(RENAMED.values()) <= known_variables()


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ACESTEP_QUEUE_WORKERS=2\nACESTEP_QUEUE_MAXSIZE=20\nACESTEP_API_WORKERS=2\n")
    settings = load({"ACESTEP_QUEUE_WORKERS": "3", "ACESTEP_QUEUE_MAXSIZE": "30"}, file, {"ACESTEP_QUEUE_WORKERS": "4"})
    assert (settings.broker.queue_workers, settings.broker.queue_maxsize, settings.engine.lanes) == (4, 30, 2)


def test_an_unknown_variable_stops_the_start_with_a_suggestion() -> None:
    with pytest.raises(SettingsError, match=r"ACESTEP_QUEUE_MAXSIZ is not a setting.*mean ACESTEP_QUEUE_MAXSIZE"):
        load({"ACESTEP_QUEUE_MAXSIZ": "5"}, None)


@pytest.mark.parametrize("name", ["acestep_queue_maxsize", "ACE_STEP_QUEUE_MAXSIZE", "ACESTP_QUEUE_MAXSIZE"])
def test_a_variable_with_a_mistake_in_its_prefix_stops_the_start_too(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} is not a setting.*mean ACESTEP_QUEUE_MAXSIZE"):
        load({name: "5"}, None)
    load({"ACE_EDITOR_FONT": "5", "ACESULFAME": "5"}, None)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"ACESTEP_QUEUE_MAXSIZE": "many", "ACESTEP_LM_BACKEND": "tpu", "ACESTEP_OFFLOAD_TO_CPU": "perhaps"}, None)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert all(name in text for name in ("ACESTEP_QUEUE_MAXSIZE", "ACESTEP_LM_BACKEND", "ACESTEP_OFFLOAD_TO_CPU"))


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:sesame@[bad",
        "http://user:sesame@host",
        "sesame",
        "amqp:host",
        "amqp://",
        "amqp:///sesame",
        "amqp://user:sesame@host,",
    ],
)
def test_a_malformed_broker_url_is_explained_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError, match="ACESTEP_AMQP_URL") as caught:
        load({"ACESTEP_AMQP_URL": url}, None)
    assert "sesame" not in str(caught.value)


def test_the_nodes_of_a_cluster_are_comma_separated_urls_and_a_comma_in_a_password_separates_nothing() -> None:
    one, two = "amqps://user:se,same@a:5671/music", "amqps://user:se,same@b:5671/music"
    broker = load({"ACESTEP_AMQP_URL": f"{one}, {two}"}, None).broker
    assert [url.get_secret_value() for url in broker.urls] == [one, two]
    assert broker.url.get_secret_value() == one
    assert broker.every_url.get_secret_value() == f"{one},{two}"
    assert "se,same" not in repr(broker)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("http://user:sesame@b", "begin with amqp"),
        ("b:5672", "begin with amqp"),
        ("amqp://user:sesame@b/x", "same virt"),
    ],
)
def test_a_wrong_url_among_several_is_explained_without_repeating_it(second: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load({"ACESTEP_AMQP_URL": f"amqp://user:sesame@a:5672/,{second}"}, None)
    assert "sesame" not in str(caught.value)


def test_secrets_do_not_show_in_the_repr() -> None:
    settings = load({"ACESTEP_AMQP_URL": "amqp://user:sesame@host:5672/"}, None)
    assert "sesame" not in repr(settings)
    assert "sesame" not in settings.model_dump_json()


def test_a_blank_variable_counts_as_unset() -> None:
    assert load({"ACESTEP_QUEUE_WORKERS": " ", "ACESTEP_CONFIG_PATH2": ""}, None).broker.queue_workers == 1


def test_lists_are_comma_separated() -> None:
    settings = load({"ACESTEP_INPUT_BUCKETS": "stems, uploads,,", "ACESTEP_INPUT_HOSTS": "cdn.example.org"}, None)
    assert settings.inputs.buckets == ("stems", "uploads")
    assert settings.inputs.hosts == ("cdn.example.org",)


def test_networks_are_blocks_of_addresses_and_a_single_address_is_a_block_of_one() -> None:
    networks = load({"ACESTEP_INPUT_NETWORKS": "10.20.0.0/16, fd00::/8,127.0.0.1"}, None).inputs.networks
    assert [str(network) for network in networks] == ["10.20.0.0/16", "fd00::/8", "127.0.0.1/32"]
    assert load({}, None).inputs.networks == ()


@pytest.mark.parametrize("network", ["10.20.0.1/16", "10.20.0.0/33", "inside.example", "10.20", "fd00::/200"])
def test_a_malformed_network_is_answered_with_examples(network: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({"ACESTEP_INPUT_NETWORKS": f"10.0.0.0/8,{network}"}, None)
    assert str(caught.value) == (
        f"ACESTEP_INPUT_NETWORKS: {network!r} must be a network such as 10.20.0.0/16 or fd00::/8"
    )


@pytest.mark.parametrize(
    ("text", "value", "at_start"), [("1", 1, 1), ("1024", 1024, 1024), ("auto", None, 2), (" Auto ", None, 2)]
)
def test_workers_are_a_number_or_left_to_the_worker(text: str, value: int | None, at_start: int) -> None:
    broker = load({"ACESTEP_QUEUE_WORKERS": text}, None).broker
    assert (broker.queue_workers, broker.workers_at_start, broker.queue_workers_max) == (value, at_start, 256)


def test_a_word_for_the_workers_that_is_not_auto_is_answered_with_the_choice() -> None:
    with pytest.raises(SettingsError, match="ACESTEP_QUEUE_WORKERS: must be a number of jobs, 1 to 1024, or auto"):
        load({"ACESTEP_QUEUE_WORKERS": "automatic"}, None)


def test_auto_does_not_start_above_its_maximum() -> None:
    environ = {"ACESTEP_QUEUE_WORKERS": "auto", "ACESTEP_QUEUE_WORKERS_MAX": "1"}
    assert load(environ, None).broker.workers_at_start == 1


@pytest.mark.parametrize("text", ["0", "1025", "-1", "many", "2.5"])
@pytest.mark.parametrize("name", ["ACESTEP_QUEUE_WORKERS", "ACESTEP_QUEUE_WORKERS_MAX"])
def test_a_number_of_workers_that_cannot_be_is_refused(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: "):
        load({name: text}, None)


@pytest.mark.parametrize(("text", "value"), [("auto", None), ("true", True), ("0", False), ("AUTO", None)])
def test_a_switch_may_be_left_to_the_card(text: str, value: bool | None) -> None:  # noqa: FBT001 - a table of values
    assert load({"ACESTEP_INIT_LLM": text}, None).engine.init_llm is value


def test_up_to_three_models_are_named_the_first_is_primary() -> None:
    environ = {f"ACESTEP_CONFIG_PATH{n}": f"model{n}" for n in ("", "2", "3")}
    assert load(environ, None).engine.models == ("model", "model2", "model3")


def test_variables_of_other_programs_are_left_alone() -> None:
    load({"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x"}, None)


def test_every_setting_is_described() -> None:
    rows = list(describe())
    assert {name for name, _, _ in rows} == known_variables()
    assert all(about for _, _, about in rows)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "amqp_url"
    path.write_text("amqp://user:sesame@host:5672/\n")
    return path


class TestSecretFiles:
    @pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
    def test_a_file_holds_the_secret_in_the_variables_place(self, end: str, tmp_path: Path) -> None:
        for name in ("amqp", "http"):
            (tmp_path / name).write_text(f"{name}://user:sesame@host:1{end}", newline="")
        files = {
            f"ACESTEP_{kind}_URL_FILE": str(tmp_path / name)
            for kind, name in (("AMQP", "amqp"), ("MANAGEMENT", "http"))
        }
        broker = load(files, None).broker
        assert broker.url.get_secret_value() == "amqp://user:sesame@host:1"
        assert broker.management_url is not None
        assert broker.management_url.get_secret_value() == "http://user:sesame@host:1"
        assert "sesame" not in repr(broker)

    def test_both_at_once_are_refused_by_name(self, secret: Path) -> None:
        with pytest.raises(SettingsError) as caught:
            load({"ACESTEP_AMQP_URL": "amqp://user:other@host/", "ACESTEP_AMQP_URL_FILE": str(secret)}, None)
        assert str(caught.value) == "ACESTEP_AMQP_URL and ACESTEP_AMQP_URL_FILE are both set: unset one of them"

    def test_the_environments_choice_puts_the_other_one_of_the_env_file_aside(
        self, secret: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / ".env"
        file.write_text("ACESTEP_AMQP_URL=amqp://user:other@elsewhere/\n")
        assert "@host" in load({"ACESTEP_AMQP_URL_FILE": str(secret)}, file).broker.url.get_secret_value()
        file.write_text(f"ACESTEP_AMQP_URL_FILE={secret}\n")
        environ = {"ACESTEP_AMQP_URL": "amqp://user:other@elsewhere/"}
        assert "@elsewhere" in load(environ, file).broker.url.get_secret_value()
        assert "@host" in load({"ACESTEP_AMQP_URL": " "}, file).broker.url.get_secret_value()

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda _: None, "cannot be read: No such file or directory"),
            (lambda path: path.mkdir(), "cannot be read: Is a directory"),
            (lambda path: path.write_bytes(b"\n"), "is empty"),
            (lambda path: path.write_bytes(b"sesame\xff"), "is not UTF-8 text"),
            (lambda path: path.write_bytes(b"sesame" * 20_000), "is larger than 65,536 bytes: is it the right file?"),
        ],
        ids=["missing", "folder", "empty", "bytes", "huge"],
    )
    def test_a_file_that_cannot_be_used_is_named_with_its_variable(
        self, make: Callable[[Path], object], why: str, tmp_path: Path
    ) -> None:
        make(tmp_path / "secret")
        with pytest.raises(SettingsError) as caught:
            load({"ACESTEP_MANAGEMENT_URL_FILE": str(tmp_path / "secret")}, None)
        assert str(caught.value) == f"ACESTEP_MANAGEMENT_URL_FILE: {tmp_path / 'secret'} {why}"
        assert caught.value.__cause__ is None or "sesame" not in repr(caught.value.__cause__)

    def test_a_malformed_secret_is_explained_with_the_variable_that_named_its_file(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("http://user:sesame@host")
        with pytest.raises(SettingsError) as caught:
            load({"ACESTEP_AMQP_URL_FILE": str(tmp_path / "secret")}, None)
        assert str(caught.value).startswith("ACESTEP_AMQP_URL, as read from ACESTEP_AMQP_URL_FILE: must look like amqp")
        assert "sesame" not in str(caught.value)

    def test_every_setting_that_hides_its_value_may_come_from_a_file(self) -> None:
        hidden = {
            str(field.validation_alias.choices[0])
            for section in SECTIONS.values()
            for field in section.model_fields.values()
            if isinstance(field.validation_alias, AliasChoices) and "SecretStr" in repr(field.annotation)
        }
        assert hidden == set(SECRETS)
        assert {f"{name}_FILE" for name in hidden} <= known_variables()


def test_settings_can_be_imported_without_the_package_that_reads_env_files() -> None:
    """A producer that imports the client alone needs neither it nor pydantic-settings."""
    code = "import sys, acestep_consumer.config.settings; print({'dotenv', 'pydantic_settings'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:ses#ame@host:5672/",
        "amqp://user:12#ame@host:5672/",
        "amqp://user:ses/ame@host:5672/",
        "amqp://user:12/ame@host:5672/",
        "amqp://user:12?ame@host:5672/",
        "amqp://user:ses[ame@host:5672/",
    ],
)
def test_a_password_that_is_not_percent_encoded_is_answered_with_how_to_encode_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"percent-encoded \(# is %23, / is %2F") as caught:
        load({"ACESTEP_AMQP_URL": url, "ACESTEP_MANAGEMENT_URL": url.replace("amqp", "http")}, None)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "ACESTEP_AMQP_URL",
        "ACESTEP_MANAGEMENT_URL",
    ]
    assert "ame" not in str(caught.value).replace("name", "")


@pytest.mark.parametrize("heartbeat", ["abc", "", "-5", "2.5", "99999999", "60&heartbeat=x", "\u0663"])
def test_a_heartbeat_that_aiormq_would_turn_off_in_silence_is_refused(heartbeat: str) -> None:
    with pytest.raises(SettingsError, match=r"ACESTEP_AMQP_URL: .*heartbeat in the URL must be a whole number"):
        load({"ACESTEP_AMQP_URL": f"amqp://host/?heartbeat={heartbeat}"}, None)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("hearbeat", "heartbeat"), ("Heartbeat", "heartbeat"), ("heart_beat", "heartbeat"), ("ca_file", "cafile"),
        ("cacertfile", "cafile"), ("key-file", "keyfile"), ("no_ssl_verify", "no_verify_ssl"),
    ],
)  # fmt: skip
def test_a_misspelled_parameter_of_the_url_is_named_with_the_one_that_is_meant(given: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"ACESTEP_AMQP_URL: .*parameter {given} is unknown; did you mean {meant}"):
        load({"ACESTEP_AMQP_URL": f"amqp://a/,amqp://b/?{given}=30"}, None)
    with pytest.raises(ValueError, match=f"did you mean {meant}"):
        Client(f"amqp://host/?{given}=30")


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("no_verify_ssl=false", "no_verify_ssl in the URL must be 0, or 1 to accept any certificate"),
        ("no_verify_ssl=", "no_verify_ssl in the URL must be 0"),
        ("happy_eyeballs_delay=soon", "must be numbers"),
    ],
)
def test_a_parameter_of_the_url_that_would_be_misread_is_refused(parameter: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"ACESTEP_AMQP_URL: .*{words}"):
        load({"ACESTEP_AMQP_URL": f"amqps://host/?{parameter}"}, None)


def test_parameters_of_other_amqp_libraries_are_told_and_stop_nobody() -> None:
    """A producer in another language may have the same URL."""
    url = "amqps://host/?heartbeat=30&connection_attempts=3&cafile=/a.pem&blocked_connection_timeout=300"
    broker = load({"ACESTEP_AMQP_URL": url}, None).broker
    assert [text.split()[2] for text in broker.url_warnings] == ["blocked_connection_timeout", "connection_attempts"]


@pytest.mark.parametrize("name", ["cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl"])
def test_a_parameter_for_tls_is_told_where_the_url_has_none(name: str) -> None:
    """Of a cluster, one node's URL may be the wrong one."""
    urls = f"amqps://a/?{name}=1,amqp://b/?{name}=1&heartbeat=30"
    warnings = load({"ACESTEP_AMQP_URL": urls}, None).broker.url_warnings
    (told,) = (text for text in warnings if "has no effect" in text)
    assert told.startswith(f"the parameter {name} of ACESTEP_AMQP_URL has no effect here: ")
    assert told.endswith("amqps:// has it")
    with_tls = load({"ACESTEP_AMQP_URL": f"amqps://a/?{name}=1"}, None).broker.url_warnings
    assert not any("has no effect" in text for text in with_tls)


def test_a_certificate_that_nobody_verifies_is_told_once() -> None:
    urls = "amqps://a/?no_verify_ssl=1,amqps://b/?no_verify_ssl=1"
    (told,) = load({"ACESTEP_AMQP_URL": urls}, None).broker.url_warnings
    assert told.startswith("the broker's certificate is not verified")
    for url in ("amqps://a/?no_verify_ssl=0", "amqps://a/"):
        assert load({"ACESTEP_AMQP_URL": url}, None).broker.url_warnings == ()


@pytest.mark.parametrize("heartbeat", ["0", "1", "65534"])
def test_a_heartbeat_of_amqps_range_is_taken(heartbeat: str) -> None:
    url = f"amqp://host/?heartbeat={heartbeat}"
    assert load({"ACESTEP_AMQP_URL": url}, None).broker.url.get_secret_value() == url


@pytest.mark.parametrize("url", ["amqp://user:p%40ss%2F%23@host/music%40home", "amqp://u:p@host/m@sic?cafile=/a@b"])
def test_an_encoded_password_and_a_vhost_with_an_at_sign_are_accepted(url: str) -> None:
    assert load({"ACESTEP_AMQP_URL": url}, None).broker.url.get_secret_value() == url


def test_a_login_may_be_longer_than_a_host_name() -> None:
    login, hosts = f"user:{'long' * 50}", ("host", "a-b.example.org.", "my_rabbit", "[::1]")
    for host in hosts:
        urls = {"ACESTEP_AMQP_URL": f"amqp://{login}@{host}/", "ACESTEP_MANAGEMENT_URL": f"http://{login}@{host}/"}
        assert login in load(urls, None).broker.url.get_secret_value()


@pytest.mark.parametrize("name", ["so/ngs", "so", "a" * 64, "song s"])
def test_a_bucket_name_that_cannot_be_is_refused_wherever_it_is_set(name: str) -> None:
    for variable in ("ACESTEP_S3_BUCKET", "ACESTEP_INPUT_BUCKETS"):
        with pytest.raises(SettingsError, match=f"^{variable}: .*without s3://"):
            load({variable: "s3://songs"}, None)
        with pytest.raises(SettingsError, match=f"^{variable}: .*must be 3 to 63 letters"):
            load({variable: name}, None)
    assert load({"ACESTEP_S3_BUCKET": "Songs_2026.eu-1"}, None).storage.bucket == "Songs_2026.eu-1"


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "s3.example.org", "ftp://host", "http://", "http://host:99999", "http://a b:9"]
)
def test_an_endpoint_without_a_scheme_or_host_is_answered_with_examples(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"^ACESTEP_S3_ENDPOINT: must be a URL with its scheme, such as http://"):
        load({"ACESTEP_S3_ENDPOINT": endpoint}, None)
    assert load({"ACESTEP_S3_ENDPOINT": "http://[::1]:9000"}, None).storage.endpoint == "http://[::1]:9000"


@pytest.mark.parametrize("endpoint", ["http://key:secret@host:9000", "http://host/?region=x", "http://host#x"])
def test_an_endpoint_is_no_place_for_keys_and_queries_and_its_error_does_not_repeat_them(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"^ACESTEP_S3_ENDPOINT: .*AWS_SECRET_ACCESS_KEY") as refusal:
        load({"ACESTEP_S3_ENDPOINT": endpoint}, None)
    assert "key:secret" not in str(refusal.value)


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_a_number_must_be_finite(number: str) -> None:
    with pytest.raises(SettingsError, match=r"^ACESTEP_EXECUTION_TIMEOUT_S: Input should be"):
        load({"ACESTEP_EXECUTION_TIMEOUT_S": number}, None)


def test_a_byte_order_mark_does_not_hide_the_first_line_of_an_env_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ACESTEP_QUEUE_MAXSIZE=20\n", encoding="utf-8-sig")
    assert load({}, file).broker.queue_maxsize == 20


def test_an_env_file_may_have_comments_blank_lines_quotes_and_empty_values(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# text\n\nexport ACESTEP_QUEUE_MAXSIZE='20' # why\nACESTEP_CONFIG_PATH2=\nOTHER=a b\n")
    assert load({}, file).broker.queue_maxsize == 20


def test_a_folder_in_the_place_of_the_env_file_is_none(tmp_path: Path) -> None:
    """It is no mistake: many people's virtual environments are called so."""
    (tmp_path / ".env").mkdir()
    assert load({}, tmp_path / ".env").broker.queue_maxsize == 200


def test_the_default_format_is_one_that_a_request_may_name() -> None:
    field = SECTIONS["worker"].model_fields["default_format"]
    assert get_args(field.annotation) == get_args(AudioFormat)
