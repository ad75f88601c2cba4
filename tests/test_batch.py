"""Running notebooks: parameters, figures, failures, and the kernel being that of this environment."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
import yaml
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from pss.__main__ import main
from pss.apps import execution
from pss.apps.execution import refresh, run_notebook
from pss.apps.parameters import check_places, check_values, parameters_of, read_text, read_yaml
from pss.apps.sweep import read_sweep, run_sweep

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
        new_code_cell("for done in range(3):\n    print(f'\\rat {done}', end='', file=sys.stderr, flush=True)"),
        new_code_cell("print('noise', file=sys.stderr)\nassert factor < 100, 'too large'"),
    ]
    path = tmp_path / "my notebooks" / "01_small.ipynb"
    path.parent.mkdir()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def text_of(path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_runs_with_parameters_and_writes_figures(notebook, tmp_path):
    figures = run_notebook(notebook, tmp_path / "out", {"factor": 3})
    assert "the answer is 63" in text_of(tmp_path / "out" / "01_small.ipynb")
    assert figures == [tmp_path / "out" / "figures" / "01.png"] and figures[0].read_bytes().startswith(b"\x89PNG")
    assert "63" not in text_of(notebook)
    page = (tmp_path / "out" / "01_small.html").read_text()
    assert "the answer is 63" in page and "at 2" in page and "at 1" not in page, "a bar of progress is one line"
    with pytest.raises(ValueError, match="would take the place of"):
        run_notebook(notebook, notebook.parent)


def test_a_notebook_is_written_when_it_ends_and_its_kernel_closed_without_an_interrupt(notebook, tmp_path, monkeypatch):
    """Whatever ends it: a kernel that dies leaves what there was."""
    from jupyter_client import AsyncKernelManager
    from papermill import engines

    written, interrupted = [], []
    write, interrupt = engines.write_ipynb, AsyncKernelManager._async_interrupt_kernel
    monkeypatch.setattr(engines, "write_ipynb", lambda *args: (written.append(args), write(*args)))
    monkeypatch.setattr(
        AsyncKernelManager, "_async_interrupt_kernel", lambda self: (interrupted.append(self), interrupt(self))[1]
    )
    run_notebook(notebook, tmp_path / "out")
    assert len(written) <= 2 and not interrupted  # not twice for each cell
    book = nbformat.read(notebook, as_version=4)
    book.cells.append(new_code_cell("import os\nos._exit(1)"))
    nbformat.write(book, notebook)
    with pytest.raises(DeadKernelError):
        run_notebook(notebook, tmp_path / "dead")
    assert "the answer is 42" in text_of(tmp_path / "dead" / "01_small.ipynb")


FORKED = """import atexit, gc, json, multiprocessing, os, sys
import beside
atexit.register(lambda: open("ended", "w").close())
loaded = "pss.patches" in sys.modules, sys.modules["torch"].get_num_threads(), multiprocessing.get_start_method()
loaded += (gc.get_freeze_count() > 10**5,)  # what is shared is no work for the collector
print(json.dumps([os.getppid(), os.getcwd(), os.environ["ASKED"], beside.__file__, *loaded]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_kernels_of_many_notebooks_are_forked_from_one_process(tmp_path, monkeypatch):
    """With the environment, folder and modules of their own run, otherwise as they are; one that dies is no harm."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("")
    book, found = new_notebook(cells=[new_code_cell(FORKED), new_code_cell("if code: os._exit(code)")]), []
    book.cells.insert(0, new_code_cell("code = 0", metadata={"tags": ["parameters"]}))
    nbformat.write(book, tmp_path / "01_forked.ipynb")
    for number in range(3):
        monkeypatch.setenv("ASKED", str(number))
        options = {"parameters": {"code": number % 2}, "caller": tmp_path / "mine", "many": True}
        with pytest.raises(DeadKernelError) if number % 2 else nullcontext():
            run_notebook(tmp_path / "01_forked.ipynb", tmp_path / "out", **options)
        assert (tmp_path / "ended").exists() == (number % 2 == 0)
        (tmp_path / "ended").unlink(missing_ok=True)
        found.append(json.loads(text_of(tmp_path / "out" / "01_forked.ipynb")))
    server = found[0][0]
    usual = [str(tmp_path / "mine" / "beside.py"), True, int(os.environ["OMP_NUM_THREADS"]), "fork", True]
    assert found == [[server, str(tmp_path), str(number), *usual] for number in range(3)] and server != os.getpid()


def test_starting_makes_no_grammar_for_a_format_that_no_notebook_has():
    code = "import pss.apps.sweep, sys; assert not sys.modules.get('rfc3987_syntax') and 'jsonschema' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_refresh_keeps_outputs_and_drops_noise(notebook):
    refresh(notebook)
    assert "the answer is 42" in text_of(notebook) and "noise" not in text_of(notebook)
    book = nbformat.read(notebook, as_version=4)
    assert "papermill" not in book.metadata and all("papermill" not in c.metadata for c in book.cells)
    assert [p.name for p in notebook.parent.iterdir()] == ["01_small.ipynb"]


def test_copies_are_on_the_disk_before_they_take_their_place(notebook, tmp_path, monkeypatch):
    """Or else a power failure leaves an empty notebook: of a finished run, or in the place of one's own."""
    synced, moved = set(), []
    fsync, replace = os.fsync, os.replace

    def execute(source, output, parameters, caller, many):
        nbformat.write(nbformat.read(source, as_version=4), output)
        if parameters:
            raise RuntimeError("a cell raised")

    def spy_on_replace(source, target):
        moved.append((Path(target), os.stat(source).st_ino in synced))
        replace(source, target)

    monkeypatch.setattr(execution, "execute", execute)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", spy_on_replace)
    run_notebook(notebook, tmp_path / "copy")
    with pytest.raises(RuntimeError):
        run_notebook(notebook, tmp_path / "failed", {"factor": 3})
    refresh(notebook)
    copies = [tmp_path / folder / f"01_small.{kind}" for folder in ("copy", "failed") for kind in ("ipynb", "html")]
    assert moved == [(path, True) for path in (*copies, notebook)]
    assert notebook.read_text().endswith("}\n") and not list(tmp_path.rglob(".*"))


def test_kernel_is_that_of_this_environment_whatever_the_machine_has(notebook, tmp_path):
    """A kernel of the same name in the user's folder and on JUPYTER_PATH leads elsewhere: neither is taken."""
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    places = [tmp_path / "home" / ".local" / "share" / "jupyter", tmp_path / "elsewhere"]
    for folder in places:
        (folder / "kernels" / "python3").mkdir(parents=True)
        (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    environment = os.environ | {"HOME": str(tmp_path / "home"), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "pss", "run", "--out", str(tmp_path / "runs"), str(notebook)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sys.executable in text_of(tmp_path / "runs" / "01_small" / "01_small.ipynb")


def test_command_line_says_what_was_made_and_fails_with_a_notebook(notebook, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main(["run", "--out", str(runs), str(notebook.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["1 finished", str(runs / "01_small" / "01_small.html")]
    assert main(["run", "--out", str(runs), "-p", "factor", "100", str(notebook)]) == 1
    told = capsys.readouterr().out
    assert "FAILED: AssertionError: too large" in told and "factor=100" in told.splitlines()[-1]
    assert "(cell 6 of" in told and "the answer is 42" in text_of(runs / "01_small" / "01_small.ipynb")


def test_a_folder_of_notebooks_has_an_index(notebook, tmp_path, capsys):
    slow = nbformat.read(notebook, as_version=4)
    slow.cells.append(new_code_cell("import time\ntime.sleep(4)"))
    nbformat.write(slow, notebook.with_name("03_longest.ipynb"))
    for name in ("00_first", "02_long", "other"):
        shutil.copy(notebook, notebook.with_name(f"{name}.ipynb"))
    assert main(["run", "--out", str(tmp_path / "runs"), str(notebook.parent), "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begun = {p.parent.name: json.loads(p.read_text())["started"] for p in (tmp_path / "runs").glob("*/run.json")}
    first = sorted(begun, key=begun.get)
    assert (
        set(first[:2]) == {"00_first", "03_longest"} and first[3] == "01_small"
    )  # later pages of a tutorial take longer
    assert lines.index("00_first finished") == min(lines.index(f"{name} finished") for name in begun)
    assert lines[-2:] == ["4 runs: 4 finished", str(tmp_path / "runs" / "index.html")]
    page = (tmp_path / "runs" / "index.html").read_text()
    assert page.index("00_first/00_first.ipynb") < page.index("01_small/01_small.ipynb")
    assert page.index("00_first/00_first.html") < page.index("00_first/00_first.ipynb")
    assert main(["run", "--in-place", str(notebook)]) == 0 and "the answer is 42" in text_of(notebook)


def test_defaults_are_read_whatever_they_are(tmp_path):
    source = "a = 1\nb: float = 2.0\nc = -1e-3  # text\nd = [1, 'x']\ne = len('abc')\nf = None\ng: int"
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "01_x.ipynb")
    found = {name: parameter.default for name, parameter in parameters_of(tmp_path / "01_x.ipynb").items()}
    assert found == {"a": 1, "b": 2.0, "c": -1e-3, "d": [1, "x"], "e": None, "f": None}


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(tmp_path):
    """A notebook with a parameter of every type."""
    source = "flag = True\ncount = 3\nrate = 0.5\nname = 'a'\nsizes = [1, 2]\nmixed = [1, 'a']\nanything = None"
    path = tmp_path / "typed.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source, metadata={"tags": ["parameters"]})]), path)
    return path


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("flag", "false", False),
        ("count", "12", 12),
        ("rate", "2", 2.0),
        ("rate", "1e-3", 1e-3),
        ("rate", "1.5e3", 1500.0),
        ("rate", ".inf", float("inf")),
        ("name", "007", "007"),
        ("name", "no", "no"),
        ("name", "'quoted'", "quoted"),
        ("name", "a: [", "a: ["),
        ("sizes", "[4, 5]", [4, 5]),
        ("mixed", "[b, 2.5]", ["b", 2.5]),
        ("anything", "{a: 1}", {"a": 1}),
        ("anything", "3", 3),
        ("anything", "true", True),
        ("anything", "no", "no"),
        ("anything", "photos: cat/3.png", "photos: cat/3.png"),
        ("anything", "2020-01-01", "2020-01-01"),
        ("anything", "@x", "@x"),
    ],
)
def test_texts_are_read_by_the_type_of_the_default(typed, name, text, value):
    given = check_values(typed, {name: read_text(text, parameters_of(typed)[name])})
    assert given == {name: value} and type(given[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flag", "false", "flag = 'false' is a text, but its default True is true or false"),
        ("flag", 1, "is a whole number, but its default True"),
        ("count", "abc", "count = 'abc' is a text, but its default 3 is a whole number"),
        ("count", True, "is true or false"),
        ("count", 2.5, "is a number"),
        ("count", None, "is nothing"),
        ("rate", "1e-3", "is a text"),
        ("name", 282, "name = 282 is a whole number, but its default 'a' is a text"),
        ("name", yaml.safe_load("2020-01-01"), "is a date: put it in quotes"),
        ("sizes", 4, "is a whole number, but its default .1, 2. is a list"),
        ("sizes", [4, "5"], r"sizes.1. = '5' is a text"),
        ("anything", {"a": {1, 2}}, "is a set"),
        ("coutn", 4, "has no parameter coutn: it has flag, count"),
    ],
)
def test_values_of_another_type_are_refused(typed, name, value, message):
    with pytest.raises(ValueError, match=message):
        check_values(typed, {name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("{a: 1, a: 2}", "a is given twice"),
        ("a: 'x", "while scanning"),
        ("2020-13-45", "month must be in"),
    ],
)
def test_yaml_that_is_not_plain_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(text)


KINDS = """picture = ""  # place: a picture
output = "a#b"  # place to write: folder
model = "digits"  # name or place: of a network
many = ["a"]  # place: files
method = "zscore"  # one of zscore, pot: how to rank
index = None  # place in the set, or a name; no kind"""


@pytest.fixture
def placed(tmp_path):
    """A notebook with parameters of every kind, and two files beside it."""
    nbformat.write(new_notebook(cells=[new_code_cell(KINDS, metadata={"tags": ["parameters"]})]), tmp_path / "k.ipynb")
    (tmp_path / "here").mkdir()
    for name in ("cat.jpg", "digits.yaml", "plain"):
        (tmp_path / "here" / name).touch()
    return tmp_path / "k.ipynb"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("picture", "cat.jpg", "here/cat.jpg"),
        ("picture", "../here/cat.jpg", "here/cat.jpg"),
        ("picture", "", None),
        ("output", "new/folder", "here/new/folder"),
        ("model", "digits", None),
        ("model", "nets.small:build", None),
        ("model", "digits.yaml", "here/digits.yaml"),
        ("model", "./plain", "here/plain"),
        ("model", "plain", "here/plain"),
        ("many", ["cat.jpg", "plain"], ["here/cat.jpg", "here/plain"]),
        ("method", "pot", None),
        ("index", "brick/brick_012.png", None),
        ("index", "./x", None),
    ],
)
def test_only_what_the_notebook_calls_a_place_is_seen_from_the_caller(placed, tmp_path, name, value, expected):
    if expected is not None:
        value_then = [str(tmp_path / e) for e in expected] if isinstance(expected, list) else str(tmp_path / expected)
    else:
        value_then = value
    assert check_values(placed, {name: value}, tmp_path / "here") == {name: value_then}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("picture", "dog.jpg", "picture = '.*here.dog.jpg' is not there; relative places are seen from"),
        ("model", "other.yaml", "model = '.*here.other.yaml' is not there"),
        ("many", ["cat.jpg", "x"], "many = '.*here.x' is not there"),
        ("method", "fisher", "method = 'fisher': expected one of zscore, pot"),
    ],
)
def test_what_is_not_there_is_said_before_anything_runs(placed, tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        check_places(placed, check_values(placed, {name: value}, tmp_path / "here"))


# --- sweeps -----------------------------------------------------------------------------------------------------------

TASK = """
import json, pathlib
open(log_file, "a").write(f"{k} {rate} {name}\\n")
assert rate < 9, f"rate <b>{rate}</b> is too large"
pathlib.Path(output, "summary.json").write_text(json.dumps({"score": k * rate, "k": -k, "list": [1]}))
"""


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep over a notebook that logs its runs, and returns the file."""
    parameters = "k = 1\nrate = 0.5\nname = 'a'\nlog_file = ''  # place to write: a log\noutput = ''"
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(TASK), new_code_cell(PICTURE)]
    (tmp_path / "books").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "books" / "task.ipynb")

    def write(**entries):
        asked = {
            "notebook": "books/task.ipynb",
            "out": "out",
            "parameters": {"log_file": str(tmp_path / "log")},
        } | entries
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(asked))
        return tmp_path / "sweep.yaml"

    return write


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]


def test_a_grid_of_runs_is_summed_up_goes_on_past_failures_and_runs_again_what_failed(sweep_file, tmp_path):
    evil = "<script>x</script> & '\" a,b"
    path = sweep_file(grid={"k": [1, 2], "rate": [3, 10]}, table=[{"name": evil}])
    sweep = read_sweep(path)
    assert sweep.out == tmp_path / "out" and [run.parameters["rate"] for run in sweep.runs] == [3, 10] * 2
    table = run_sweep(sweep, progress=False)
    assert table["status"].tolist() == ["finished", "failed"] * 2
    assert table["score"].tolist()[::2] == [3, 6] and table["results.k"].tolist()[::2] == [-1, -2]
    assert table["error"][1].startswith("AssertionError: rate <b>10.0</b> is too large\n(cell 3 of ")
    pd.testing.assert_frame_equal(
        pd.read_csv(sweep.out / "summary.csv", keep_default_na=False)[["k", "name"]], table[["k", "name"]]
    )
    for run in sweep.runs:
        assert "too large" in (run.folder / "task.ipynb").read_text() and run.folder.parent == sweep.out
        assert not list(run.folder.glob(".*"))

    page = (sweep.out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert not {"script", "b"} & links.tags and "&lt;script&gt;" in page
    assert all((sweep.out / unquote(link)).exists() for link in links.links)
    assert sum("task.ipynb" in unquote(link) for link in links.links) == 4 and "img" in links.tags

    again = run_sweep(read_sweep(path), progress=False)
    assert again["status"].tolist() == table["status"].tolist() and again["run"].tolist() == table["run"].tolist()
    ran = (tmp_path / "log").read_text().splitlines()
    assert sorted(line.split()[1] for line in ran) == ["10.0"] * 4 + ["3.0"] * 2


def test_places_are_seen_from_the_file_of_the_sweep_wherever_it_names_them(sweep_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "books")
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).touch()
    grid = read_sweep(sweep_file(parameters={"name": "x"}, grid={"log_file": ["a.txt", "./b.txt"]}))
    assert [run.parameters["log_file"] for run in grid.runs] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    table = read_sweep(sweep_file(parameters={"name": "x"}, table=[{"log_file": "c.txt"}]))
    assert [run.parameters["log_file"] for run in table.runs] == [str(tmp_path / "c.txt")]
    fixed = read_sweep(sweep_file(parameters={"log_file": "a.txt"}, grid={"k": [1, 2]}))
    assert {run.parameters["log_file"] for run in fixed.runs} == {str(tmp_path / "a.txt")}


def test_finished_runs_are_known_by_code_parameters_and_version(sweep_file, tmp_path, monkeypatch):
    keys = lambda path: [run.key for run in read_sweep(path).runs]  # noqa: E731
    path = sweep_file(grid={"k": [1, 2]})
    before = keys(path)
    book = nbformat.read(tmp_path / "books" / "task.ipynb", as_version=4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(book, tmp_path / "books" / "task.ipynb")
    assert keys(path) == before == keys(sweep_file(grid={"k": [1, 2, 3]}))[:2]
    assert keys(sweep_file(grid={"k": [1, 2], "rate": [0.25]})) != before
    monkeypatch.setattr("pss.apps.sweep.__version__", "9")
    assert not set(keys(sweep_file(grid={"k": [1, 2]}))) & set(before)
    monkeypatch.undo()
    book.cells[1].source += "\n1"
    nbformat.write(book, tmp_path / "books" / "task.ipynb")
    assert not set(keys(path)) & set(before)


def test_a_table_from_a_csv_and_values_of_the_command_line(sweep_file, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("name,k\n007,3\nno,\n", encoding="utf-8-sig")
    path = sweep_file(table="rows.csv")
    monkeypatch.chdir(tmp_path / "books")
    sweep = read_sweep(path, tmp_path / "elsewhere", {"rate": "2", "log_file": "log.txt"})
    assert [run.shown for run in sweep.runs] == [{"name": "007", "k": 3}, {"name": "no"}]
    fixed = {"rate": 2.0, "log_file": str(tmp_path / "books" / "log.txt")}
    assert all(fixed.items() <= run.parameters.items() for run in sweep.runs)
    assert [run.parameters["output"] for run in sweep.runs] == [str(run.folder) for run in sweep.runs]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"kk": [1]}}, "has no parameter kk"),
        ({"grid": {"k": [1, "abc"]}}, "k = 'abc' is a text"),
        ({"grid": {"k": 3}}, "needs a list of values for k"),
        ({"grid": {"k": []}}, "needs a list of values for k"),
        ({"grid": {"k": [1, 1]}}, "runs 1 and 2 have the same parameters"),
        ({"grid": {"k": [1]}, "table": [{"k": 2}]}, "k is given in grid and table"),
        ({"grid": {"log_file": ["x"]}}, "log_file is given in parameters and grid"),
        ({"grid": {"k": list(range(400)), "rate": list(range(400))}}, "160000 runs, more than 100000"),
        ({"table": [{"k": 1}, 3]}, "must be a list of mappings"),
        ({"table": [{3: 1}]}, "3 is no name"),
        ({"table": "missing.csv"}, "cannot be read"),
        ({"gird": {"k": [1]}}, "has entries gird"),
        ({"parameters": [1]}, "must be a mapping"),
        ({"notebook": "books/other.ipynb"}, "there is no notebook"),
        ({"parameters": {"output": "x"}, "grid": {"k": [1, 2]}}, "several runs would write to output"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_anything_runs(sweep_file, tmp_path, entries, message, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", str(sweep_file(**entries))])
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-p", "facto", "3", "{0}"], "has no parameter facto: it has factor, name"),
        (["run", "-p", "factor", "[", "{0}"], "while parsing"),
        (["run", "missing.ipynb"], "neither a notebook nor a folder"),
        (["run", "{1}"], "no notebook NN_"),
        (["run", "{0}", "{0}"], "several notebooks would be written to"),
        (["run", "--jobs", "0", "{0}"], "--jobs 0: at least 1"),
        (["sweep", "missing.yaml"], "missing.yaml cannot be read"),
        (["sweep", "--dask", "nonsense://here", "{2}"], "nonsense"),
        (["cache", "--empty", "nothing"], "hold no nothing"),
        (["walk"], "invalid choice: 'walk'"),
        ([], "required: COMMAND"),
    ],
)
def test_command_lines_that_cannot_run(notebook, sweep_file, tmp_path, monkeypatch, capsys, arguments, message):
    if "--dask" in arguments:
        pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PSS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        main([a.format(notebook, tmp_path, sweep_file(grid={"k": [1, 2]})) for a in arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("k,k\n1,2\n", "each once"), ("k\n1,2\n", "row 2: 2 cells"), ("k\n", "each once")]
)
def test_tables_that_cannot_be_read(sweep_file, tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(table="rows.csv"))


def test_twelve_runs_killed_half_way_and_run_again(sweep_file, tmp_path):
    path = sweep_file(grid={"k": [1, 2, 3, 4], "rate": [1, 2, 3]})
    command = [sys.executable, "-m", "pss", "sweep", str(path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    finished = lambda: {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/run.json")}  # noqa: E731
    deadline = time.monotonic() + 120
    while len(finished()) < 4 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = finished()
    assert 4 <= len(kept) < 12
    assert set(pd.read_csv(tmp_path / "out" / "summary.csv")["status"]) <= {"finished", "not run"}
    (tmp_path / "log").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 12 runs are finished already" in done.stdout and "12 runs: 12 finished" in done.stdout
    assert len((tmp_path / "log").read_text().splitlines()) == 12 - len(kept)
    assert kept.items() <= finished().items() and len(finished()) == 12
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["score"].tolist() == [
        k * r for k in (1, 2, 3, 4) for r in (1, 2, 3)
    ]
    assert not list((tmp_path / "out").rglob(".*.json.*")) and not list((tmp_path / "out").rglob(".*.running.ipynb"))


def test_the_same_sweep_on_a_local_dask_cluster(sweep_file, tmp_path):
    pytest.importorskip("distributed")
    path = sweep_file(grid={"k": [1, 2]})
    command = [sys.executable, "-m", "pss", "sweep", "--dask", "local", "--jobs", "2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "2 runs: 2 finished" in done.stdout, done.stderr
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["score"].tolist() == [0.5, 1.0]


def test_the_sweeps_of_the_project_can_be_read(root):
    sweeps = [path for path in (root / "notebooks" / "params").glob("*.yaml") if path.name != "full.yaml"]
    assert "sweep.yaml" in {path.name for path in sweeps}
    for path in sweeps:
        assert len(read_sweep(path).runs) > 1
