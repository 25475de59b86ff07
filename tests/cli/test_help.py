"""What `--help` of a verb shows on terminals of any width."""

import pytest
from command_line import fails

from teal_cli.cli import VERBS, run


@pytest.mark.parametrize("columns", ["60", "80", "100", "109", "110", "160"])
def test_help_names_every_flag_in_full(columns: str, capsys, monkeypatch) -> None:
    """80 columns is what a terminal has that nobody made wider."""
    monkeypatch.setenv("COLUMNS", columns)
    for verb in VERBS:
        assert run([verb, "--help"]) == 0
        assert "…" not in capsys.readouterr().out, verb


def test_a_wrong_flag_leads_to_the_help_of_its_verb(capsys) -> None:
    fails(capsys, 2, "No such option: --token", "calibrate", "--token", 100)
    fails(capsys, 2, "(teal calibrate --help)", "calibrate", "--token", 100)
    fails(capsys, 2, "Did you mean 'generate'? (teal --help)", "genrate")
