"""Arguments that are paths: a string that cannot be a path gives an error and exit code 2, before anything is read or written."""

from pathlib import Path

import pytest

from pipelines.command_line import dispatch
from vqmosaic.runs.launch import exit_code_of

INVALID_PATHS = {"empty": ("", "empty"), "long name": ("x" * 300, "too long"), "long path": ("x/" * 3000, "too long"),
                 "through a file": ("FILE/x", "is a file"), "loop of links": ("LOOP/x", "loop of links")}
COMMANDS = {
    "recipe": ["run", "PATH"], "run_dir": ["run", "digits", "--run_dir", "PATH"], "data.path": ["check-data", "image_folder", "--data.path", "PATH"],
    "tokenizer of tokens": ["preprocess", "digits", "--tokens.tokenizer", "PATH"],
    "tokens": ["train-prior", "digits", "--prior_training.tokens", "PATH"],
    "init_from": ["train-tokenizer", "digits", "--tokenizer_training.init_from", "PATH"],
    "resume": ["train-tokenizer", "digits", "--tokenizer_training.resume", "PATH"],
    "accelerate_config": ["run", "digits", "--accelerate_config", "PATH"], "recipe file": ["run", "FILE"],
    "bundle": ["bundle", "--tokenizer", "PATH", "--prior", ".", "--out", "out"], "bundle's prior": ["bundle", "--tokenizer", ".", "--prior", "PATH",
                                                                                               "--out", "out"],
    "bundle's out": ["bundle", "--tokenizer", ".", "--prior", ".", "--out", "PATH"],
    "generate": ["generate", "PATH"], "generate's out": ["generate", "RUN", "--out", "PATH"], "sweep": ["sweep", "PATH", "--features", "f.pt"],
    "features": ["sweep", "RUN", "--features", "PATH"], "real": ["sweep", "RUN", "--features", "f.pt", "--real", "PATH"],
    "sweep's recipe": ["sweep", "RUN", "--features", "FILE", "--recipe", "PATH"], "reconstruct": ["reconstruct", "PATH", "a.png"],
    "image": ["reconstruct", "RUN", "PATH"], "reconstruct's out": ["reconstruct", "RUN", "a.png", "--out", "PATH"], "audit": ["audit", "PATH"],
    "audit's recipe": ["audit", "RUN", "--recipe", "PATH"], "import": ["import-tokens", "PATH", "--out", "out"],
    "import's out": ["import-tokens", "x.jsonl", "--out", "PATH"], "labels": ["import-tokens", "x.npy", "--out", "out", "--labels", "PATH"],
    "export": ["export-tokens", "PATH", "--out", "out"], "export's out": ["export-tokens", "RUN/tokens/train", "--out", "PATH"],
    "demo": ["demo", "PATH"],
}


@pytest.mark.parametrize("kind", INVALID_PATHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_invalid_paths_are_refused(name, kind, tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("seed: 1\n")
    Path("LOOP").symlink_to("LOOP")
    arguments = [part.replace("PATH", INVALID_PATHS[kind][0]).replace("RUN", str(tiny_run)) for part in COMMANDS[name]]
    if name == "recipe file":  # arguments cannot contain a null byte, but files can
        Path("FILE").write_text('data: {path: "a\\0b", source: folder}\n')
    assert exit_code_of(lambda: dispatch(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err) < 2000 and "Errno" not in err
    assert (INVALID_PATHS[kind][1] if name != "recipe file" else "null byte") in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "LOOP"], "nothing is written"


def test_reading_a_too_long_path_gives_a_clear_error(capsys):
    assert exit_code_of(lambda: Path("/" + "x" * 300).read_bytes()) == 2
    assert "too long" in capsys.readouterr().err
