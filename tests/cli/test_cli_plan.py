from __future__ import annotations

import pytest

from bellbox.cli.main import main


def test_a_budget_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--parameters", "95e6", "--tokens", "3e9", "--bits", "2"])
    output = capsys.readouterr().out
    assert "3,000,000,000 tokens, 95,000,000 parameters of 2 bits: 126.3 tokens a byte" in output
    assert "then quantized:       24.9%" in output
    assert "bellbox train --quantization.bits 2 --tokens 3000000000 --phases.quantized 0.249" in output


def test_the_parameters_of_a_preset_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--preset", "95M", "--tokens", "3e9", "--bits", "1.585"])
    output = capsys.readouterr().out
    assert "94,871,680 parameters" in output
    assert "bellbox train --model.preset 95M --quantization.levels 3 --tokens 3000000000 " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1e9"], "give one of --preset and --parameters"),
        (["--tokens", "0", "--parameters", "1e6"], "--tokens is 0, must be"),
        (["--tokens", "1e9", "--parameters", "0.3"], "--parameters is 0.3, must be"),
        (["--tokens", "1e9", "--parameters", "0"], "--parameters is 0, must be"),
        (["--tokens", "1e5", "--parameters", "1e6"], "begins above 1"),
        (["--tokens", "1e9", "--preset", "96M"], "96M"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
