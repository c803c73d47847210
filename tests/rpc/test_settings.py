import pytest
from pydantic import ByteSize, Field

from common.settings import ServiceSettings, read_settings


class Settings(ServiceSettings):
    """A service for the test."""

    port: int = Field(7300, ge=0, le=65535, description="gRPC port, 100 % yours")
    max_bytes: ByteSize = Field(ByteSize(2**20), description="bytes kept")
    prefix_caching: bool = Field(True, description="reuse prefixes")
    name: str | None = Field(None, description="its name")
    for_tests: bool = False


def read(*argv, **environ):
    return read_settings(Settings, list(argv), "baton serve test", environ=environ)


def test_a_flag_beats_a_variable_and_a_variable_beats_the_default():
    assert read().port == 7300
    assert read(BATON_PORT="1").port == 1
    assert read("--port", "2", BATON_PORT="1").port == 2
    assert read(BATON_PORT="").port == 7300


def test_values_are_read_as_their_type():
    settings = read("--max-bytes", "512MiB", "--no-prefix-caching", BATON_NAME="a b")
    assert (settings.max_bytes, settings.prefix_caching) == (512 * 2**20, False)
    assert settings.name == "a b"
    assert read(BATON_PREFIX_CACHING="false").prefix_caching is False


@pytest.mark.parametrize(
    "argv", [["--port", "70000"], ["--port", "x"], ["--log-level", "loud"], ["--nope", "1"]]
)
def test_a_value_that_does_not_fit_names_its_flag_and_exits_with_two(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_shows_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--max-bytes" in shown
    assert "100 % yours (default: 7300)" in " ".join(shown.split())


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        read().port = 1


def test_a_field_without_a_description_works_and_is_not_told_of(capsys):
    assert read("--for-tests").for_tests
    with pytest.raises(SystemExit):
        read("--help")
    told = capsys.readouterr().out
    assert "--name" in told
    assert "for-tests" not in told
