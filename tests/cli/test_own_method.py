"""A method of one's own, in the one file that docs/methods.md shows, through every command that meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bellbox.cli.main import main
from bellbox.comparison import Results
from bellbox.data.prepare import prepare
from waiting import run as run_process

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SIZE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
WORDS = "the cat sat on the mat and the dog on the log while a hen ran from a fox to its box . "
CONFIG = {
    "model": {"preset": "tiny", "overrides": SIZE},
    "data": {"source": "tokens", "context": 16},
    "batch": {"tokens": 64, "micro_sequences": 4},
    "precision": "fp32", "device": "cpu", "threads": 1,
    "eval_every": 2, "checkpoint_every": 2, "log_every": 1, "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file, text, a configuration and a grid."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "laplace.py").write_text(CODE, encoding="utf-8")
    (folder / "text.txt").write_text(WORDS * 100, encoding="utf-8")
    prepare([str(folder / "text.txt")], folder / "tokens", vocab_size=270, valid_fraction=0.2)
    section = {"method": "laplace", "options": {"reach": 2.0}}
    config = {**CONFIG, "folder": "run", "steps": 4, "quantization": section}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    grid = {"base": {**CONFIG, "steps": 2}, "lr": [1e-2], "rows": {"Laplace": {"quantization": section}}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


def bellbox(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed program, which does not look into the current folder by itself."""
    program = Path(sys.executable).parent / "bellbox"
    return run_process(
        [sys.executable, "-P", str(program), *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def succeeds(folder: Path, *words: object) -> str:
    done = bellbox(folder, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(folder: Path, *words: object) -> str:
    done = bellbox(folder, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_the_file_is_short():
    assert len(CODE.splitlines()) < 80


def test_it_is_trained_measured_packed_and_compared(place: Path):
    said = succeeds(place, "train", "--import", "laplace", "--config", "config.yaml")
    assert "bellbox eval run --import laplace" in said
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["methods_from"] == ["laplace"]
    found = json.loads(succeeds(place, "eval", "run", "--import=laplace", "--json", "-"))
    assert found["perplexity"] > 1
    converted = succeeds(place, "convert", "run", "--import", "laplace", "--out", "packed")
    assert "the same function" in converted
    assert "NOT the same" not in converted
    succeeds(place, "generate", "run", "--import", "laplace", "--prompt", "the cat", "--max-new-tokens", 2)
    succeeds(
        place, "generate", "packed", "--prompt", "the cat", "--max-new-tokens", 2
    )  # integers need no method
    (place / "run" / "report.html").unlink(missing_ok=True)
    succeeds(place, "report", "run", "--import", "laplace")

    pytest.importorskip("scipy", reason="scipy, of the extra cli: `bellbox compare` asks for it")
    succeeds(place, "compare", "grid.yaml", "--import", "laplace", "--out", "out")
    (result,) = Results(place / "out").all
    assert result.error is None
    assert result.not_packed is None
    assert result.overrides["quantization"]["options"] == {"reach": 2.0}
    assert "Laplace" in (place / "out" / "tables.md").read_text()
    succeeds(place, "compare", "out", "--tables")  # a table needs no method

    for words in (("convert", "run", "--out", "other"), ("train", "--config", "run/config.yaml")):
        line = complaint(place, *words)
        assert "no method 'laplace' is known here, it came from the module laplace: import it again" in line
        assert "(--import laplace)" in line
    assert not (place / "other").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--import", "laplace.py"], "takes the name of a module, not of a file: --import laplace"),
        (["--import", "nowhere"], "no module of that name in "),
        (["--import", "broken"], r"ZeroDivisionError: division by zero \(.*broken.py, line 2\)"),
        (["--import", "wanting"], "it imports no_such_package, which is not installed"),
        (["--import"], "--import needs the name of a module"),
        (
            ["--quantization.method", "absent"],
            "no quantization method 'absent'; there are: .*--import MODULE",
        ),
    ],
)
def test_what_cannot_be_imported_is_said_in_a_line(
    place: Path,
    words: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (place / "broken.py").write_text("x = 1\ny = x / 0\n")
    (place / "wanting.py").write_text("import no_such_package\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        main(["train", "--folder", "never", *words])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(part, line)
    assert not (place / "never").exists()


def test_options_are_those_of_its_dataclass(place: Path):
    words = ("train", "--import", "laplace", "--config", "config.yaml", "--folder", "never")
    line = complaint(place, *words, "--quantization.options", "far=1")
    assert re.search("option 'far' of laplace: .*options: reach", line)
    assert not (place / "never").exists()


def test_a_file_of_a_run_has_nothing_imported(place: Path):
    (place / "evil.py").write_text("open('touched', 'w')\n")
    config = yaml.safe_load((place / "config.yaml").read_text()) | {"methods_from": ["evil"]}
    (place / "other.yaml").write_text(yaml.safe_dump(config))
    assert "it came from the module evil" in complaint(place, "train", "--config", "other.yaml")
    assert not (place / "touched").exists()


def test_an_installed_package_needs_no_flag(place: Path):
    site = place / "site"
    about = site / "laplace_box-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "laplace_box.py").write_text(CODE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: laplace-box\nVersion: 1.0\n")
    points = "[bellbox.quantizers]\nlaplace = laplace_box:LaplaceBox\nfalse = laplace_box:LaplaceBox\n"
    (about / "entry_points.txt").write_text(points)
    words = ("train", "--config", "config.yaml", "--folder", "installed", "--steps", 2)
    done = bellbox(place, *words, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((place / "installed" / "config.yaml").read_text())["methods_from"] == [
        "laplace_box"
    ]
    done = bellbox(place, "eval", "installed", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    done = bellbox(place, *words[:-4], "--quantization.method", "false", PYTHONPATH=str(site))
    assert done.returncode == 2
    assert "brings no method called false" in done.stderr
