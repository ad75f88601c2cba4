"""Running notebooks: parameters, figures, failures, and the kernel being that of this environment."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pss.batch import find_notebooks, main, parameters_of, refresh, run_notebook

PICTURE = """
from IPython.display import display
pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
display({"image/png": pixel}, raw=True)
"""


@pytest.fixture
def notebook(tmp_path):
    """A notebook in a folder with a space in its name."""
    cells = [
        new_code_cell("factor = 2\nname = 'a'", metadata={"tags": ["parameters"]}),
        new_code_cell("import sys\nprint(sys.executable)\nprint('the answer is', 21 * factor)"),
        new_code_cell(PICTURE),
        new_code_cell("import sys\nprint('noise', file=sys.stderr)\nassert factor < 100, 'too large'"),
    ]
    path = tmp_path / "my notebooks" / "01_small.ipynb"
    path.parent.mkdir()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def text_of(path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_parameters_are_those_of_the_tagged_cell(notebook):
    assert set(parameters_of(notebook)) == {"factor", "name"}


def test_runs_with_parameters_and_writes_figures(notebook, tmp_path):
    figures = run_notebook(notebook, tmp_path / "runs" / "01_small.ipynb", {"factor": 3})
    assert "the answer is 63" in text_of(tmp_path / "runs" / "01_small.ipynb")
    assert [p.name for p in figures] == ["01.png"] and figures[0].read_bytes().startswith(b"\x89PNG")
    assert "63" not in text_of(notebook)


def test_refresh_keeps_outputs_and_drops_noise(notebook):
    refresh(notebook)
    assert "the answer is 42" in text_of(notebook) and "noise" not in text_of(notebook)
    book = nbformat.read(notebook, as_version=4)
    assert "papermill" not in book.metadata and all("papermill" not in c.metadata for c in book.cells)
    assert [p.name for p in notebook.parent.iterdir()] == ["01_small.ipynb"]


def test_kernel_is_that_of_this_environment_whatever_the_machine_has(notebook, tmp_path):
    """A kernel of the same name in the user's folder and on JUPYTER_PATH leads elsewhere: neither is taken."""
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    places = [tmp_path / "home" / ".local" / "share" / "jupyter", tmp_path / "elsewhere"]
    for place in places:
        (place / "kernels" / "python3").mkdir(parents=True)
        (place / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    environment = os.environ | {"HOME": str(tmp_path / "home"), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "pss.batch", "--out", str(tmp_path / "runs"), str(notebook)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sys.executable in text_of(tmp_path / "runs" / "01_small.ipynb")


def test_command_line_says_what_was_made_and_fails_with_a_notebook(notebook, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "runs"), str(notebook.parent)]) == 0
    assert "1 of 1 notebooks executed" in capsys.readouterr().out
    assert main(["--out", str(tmp_path / "runs"), "-p", "factor", "100", str(notebook)]) == 1
    printed = capsys.readouterr()
    assert "0 of 1" in printed.out and "FAILED: AssertionError: too large" in printed.out + printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "facto", "3", "{}"], "has no parameter facto: it has factor, name"),
        (["-p", "factor", "[", "{}"], "while parsing"),
        (["missing.ipynb"], "neither a notebook nor a folder"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(notebook, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "runs"), *[a.format(notebook) for a in arguments]])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_folder_without_notebooks(tmp_path):
    with pytest.raises(ValueError, match="no notebook"):
        find_notebooks([str(tmp_path)])


def test_notebook_without_parameters_cell(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "01_x.ipynb")
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'"):
        parameters_of(tmp_path / "01_x.ipynb")
