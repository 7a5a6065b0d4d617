"""Launch files: what a shell and a YAML reader make of them, and the fields that schedulers ask for."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bellbox.cli.main import main
from bellbox.errors import BellboxError
from bellbox.scaling.hardware import GPUS, Cluster
from bellbox.scaling.launch import Launch, kubernetes, slurm


def launch(gpus: int = 32, **options) -> Launch:
    return Launch(
        Cluster(GPUS["h100"], gpus), **{"config": "runs/a b's.yaml", "image": "bellbox:1", **options}
    )


def test_a_slurm_script_is_a_script(tmp_path: Path) -> None:
    text = slurm(launch(hours=12, name="seven"))
    file = tmp_path / "job.sbatch"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert directives["nodes"] == "4"
    assert directives["gpus-per-node"] == "8"
    assert directives["time"] == "12:00:00"
    assert directives["signal"].startswith("TERM@")
    assert text.startswith("#!/bin/bash\n#SBATCH")  # sbatch reads no directive behind the first command


def test_what_slurm_runs_is_torchrun_with_these_words(tmp_path: Path) -> None:
    """The script itself, with commands of a scheduler that say what they were asked."""
    (tmp_path / "job").write_text(slurm(launch()))
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node%s\\n' {7..9999}\n")
    (tmp_path / "srun").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    done = subprocess.run(
        ["bash", str(tmp_path / "job")], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[1] == "torchrun"
    assert {"--nnodes=4", "--nproc-per-node=8", "--rdzv-id=42", "--rdzv-endpoint=node7:29500"} <= set(words)
    assert words[-5:] == ["--no-python", "bellbox", "train", "--config", "runs/a b's.yaml"]


def test_a_kubernetes_job_has_the_fields_of_its_kind() -> None:
    service, job = yaml.safe_load_all(kubernetes(launch(name="seven")))
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    known = {
        "completionMode",
        "completions",
        "parallelism",
        "backoffLimit",
        "activeDeadlineSeconds",
        "template",
    }
    assert set(spec) == known
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # no other is allowed in a Job
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    # The first pod's name within the service, as an Indexed Job gives it.
    assert f"--rdzv-endpoint=seven-0.{pod['subdomain']}:29500" in container["command"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["command"][-1] == "runs/a b's.yaml"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "Seven"}, "job name 'Seven'"),
        ({"name": "x\n#SBATCH --wrap=rm"}, "job name"),
        ({"config": "a\nb"}, "configuration 'a"),
        ({"hours": 0}, "0 hours: must be from 1"),
        ({"volume": "A_B"}, "volume 'A_B'"),
    ],
)
def test_names_that_a_scheduler_would_refuse_are_refused_here(options, says) -> None:
    with pytest.raises(BellboxError, match=says):
        launch(**options)
    with pytest.raises(BellboxError, match="name it with --image"):
        kubernetes(launch(image=None))


def test_the_command_plans_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, job, numbers = tmp_path / "a.sbatch", tmp_path / "a.yaml", tmp_path / "a.json"
    arguments = "--preset 95M --gpus 16 --config c.yaml --image i:1"
    main([
        "plan", "cluster", *shlex.split(arguments), "--slurm", str(script), "--kubernetes", str(job),
        "--json", str(numbers),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert "by a model with the data sheet's rates, not measured" in output
    assert "95M    16" in output
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(list(yaml.safe_load_all(job.read_text()))) == 2
    (row,) = yaml.safe_load(numbers.read_text())
    assert row["parameters"] == 94_871_680
    assert sum(row["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gpus 8 64 --slurm a.sbatch", "one number of GPUs"),
        ("--gpus 0", "0 GPUs: must be from 1"),
        ("--preset 9B", "no model preset '9B'"),
        ("--tokens nan", "--tokens is nan"),
        ("--efficiency 1.5", "must be at most 1"),
        ("--gpus 8 --kubernetes a.yaml", "name it with --image"),
        ("--gpus 8 --batch-tokens 1000", "take a multiple of"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_leaves_nothing(
    arguments: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "cluster", "--preset", "95M", *shlex.split(arguments)] if "--preset" not in arguments else
             ["plan", "cluster", *shlex.split(arguments)])  # fmt: skip
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
