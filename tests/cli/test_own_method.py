"""A method of one's own, in the one file that docs/methods.md shows, through every command that meets it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from bellbox.cli.main import main
from bellbox.comparison import Results
from bellbox.data.prepare import prepare
from bellbox.quantizers.registry import METHODS
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


Here = Callable[..., str]


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
    return process(folder, [str(program), *map(str, words)], environment)


SEVERAL = """
import json, sys
from bellbox.cli.main import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


def in_one_process(
    folder: Path, *commands: Sequence[object], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Several commands one after another, up to the first that fails."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    return process(folder, ["-c", SEVERAL, words], environment)


def process(
    folder: Path, arguments: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return run_process([sys.executable, "-P", *arguments], cwd=folder, env=everything)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command line in this process, in that folder; no method of one's own has come into it."""
    assert "laplace" not in METHODS
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: object, refused: bool = False) -> str:
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext() as left:
            main([str(word) for word in words])
        told = capsys.readouterr()
        if not refused:
            return told.out
        assert left is not None
        assert left.value.code == 2
        (line,) = told.err.strip().splitlines()
        return line

    return call


@pytest.fixture(scope="module")
def trained(place: Path) -> str:
    """What the program said while it trained `run`."""
    return said(bellbox(place, "train", "--import", "laplace", "--config", "config.yaml"))


def test_the_file_is_short():
    assert len(CODE.splitlines()) < 80


@pytest.mark.slow
def test_it_is_trained_and_measured(place: Path, trained: str):
    assert "bellbox eval run --import laplace" in trained
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["methods_from"] == ["laplace"]
    found = json.loads(said(bellbox(place, "eval", "run", "--import=laplace", "--json", "-")))
    assert found["perplexity"] > 1


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_it_is_packed_pictured_and_compared(place: Path, here: Here):
    pytest.importorskip("scipy", reason="scipy, of the extra cli: `bellbox compare` asks for it")
    (place / "run" / "report.html").unlink(missing_ok=True)
    own = ("--import", "laplace")
    converted = said(
        in_one_process(
            place,
            ("convert", "run", *own, "--out", "packed"),
            ("generate", "run", *own, "--prompt", "the cat", "--max-new-tokens", 2),
            ("report", "run", *own),
            ("compare", "grid.yaml", *own, "--out", "out"),
        )
    )
    assert "the same function" in converted
    assert "NOT the same" not in converted
    assert (place / "run" / "report.html").is_file()
    (result,) = Results(place / "out").all
    assert result.error is None
    assert result.not_packed is None
    assert result.overrides["quantization"]["options"] == {"reach": 2.0}
    assert "Laplace" in (place / "out" / "tables.md").read_text()
    # Neither integers nor a table need the method.
    here("generate", "packed", "--prompt", "the cat", "--max-new-tokens", 2)
    here("compare", "out", "--tables")


@pytest.mark.usefixtures("trained")
def test_without_its_module_it_is_refused(place: Path, here: Here):
    for words in (("convert", "run", "--out", "other"), ("train", "--config", "run/config.yaml")):
        line = here(*words, refused=True)
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
def test_what_cannot_be_imported_is_said_in_a_line(place: Path, here: Here, words: list[str], part: str):
    (place / "broken.py").write_text("x = 1\ny = x / 0\n")
    (place / "wanting.py").write_text("import no_such_package\n")
    assert re.search(part, here("train", "--folder", "never", *words, refused=True))
    assert not (place / "never").exists()


def test_options_are_those_of_its_dataclass(place: Path):
    words = ("train", "--import", "laplace", "--config", "config.yaml", "--folder", "never")
    done = bellbox(place, *words, "--quantization.options", "far=1")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert re.search("option 'far' of laplace: .*options: reach", line)
    assert not (place / "never").exists()


def test_a_file_of_a_run_has_nothing_imported(place: Path, here: Here):
    (place / "evil.py").write_text("open('touched', 'w')\n")
    config = yaml.safe_load((place / "config.yaml").read_text()) | {"methods_from": ["evil"]}
    (place / "other.yaml").write_text(yaml.safe_dump(config))
    assert "it came from the module evil" in here("train", "--config", "other.yaml", refused=True)
    assert not (place / "touched").exists()


@pytest.mark.slow
def test_an_installed_package_needs_no_flag(place: Path):
    site = place / "site"
    about = site / "laplace_box-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "laplace_box.py").write_text(CODE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: laplace-box\nVersion: 1.0\n")
    points = "[bellbox.quantizers]\nlaplace = laplace_box:LaplaceBox\nfalse = laplace_box:LaplaceBox\n"
    (about / "entry_points.txt").write_text(points)
    words = ("train", "--config", "config.yaml", "--folder", "installed", "--steps", 2)
    said(bellbox(place, *words, PYTHONPATH=str(site)))
    assert yaml.safe_load((place / "installed" / "config.yaml").read_text())["methods_from"] == [
        "laplace_box"
    ]
    false = (*words[:-4], "--quantization.method", "false")
    done = in_one_process(place, ("eval", "installed"), false, PYTHONPATH=str(site))
    assert "perplexity" in done.stdout
    assert done.returncode == 2
    assert "brings no method called false" in done.stderr
