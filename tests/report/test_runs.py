"""Reports of real run folders: what a run's files hold, several runs side by side, and what can't be compared."""

import colorsys
import csv
import json
import re
import shutil
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from llava_keeplora import cli
from llava_keeplora.errors import RunError
from llava_keeplora.report.overlap import overlap
from llava_keeplora.report.run_report import (
    READ,
    read_results,
    read_trial,
    report_is_current,
    settings_key,
    write_run_report,
)
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.files import file_hash
from shorter_runs import draw_nothing

TASKS = ["colours", "stripes", "corners"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def make_run(run_config, tmp_path_factory):
    """Function (name, **changes) → the folder of a finished run without a report."""
    from llava_keeplora.sequence import runner

    root = tmp_path_factory.mktemp("runs")

    def make(name, **changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "write_run_report", lambda root: None)
            runner.run(run_config(root / name, **{"training": {"logging_steps": 1}, **changes}))
        return root / name

    return make


@pytest.fixture(scope="module")
def seeds(make_run):
    """The same two methods on three tasks with seeds 0 and 1."""
    return [make_run(f"seed{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def other_rank(make_run):
    """KeepLoRA alone with another rank."""
    part = {"rank": 3, "alpha": 3}
    return make_run("rank3", methods={"keeplora": {}}, parts={"vision": part, "text": part})


@pytest.fixture(scope="module")
def one(seeds, tmp_path_factory):
    """The report of one run, in a folder of its own."""
    folder = tmp_path_factory.mktemp("report-of-one")
    write_run_report(seeds[0], into=folder)
    return folder


@pytest.fixture(scope="module")
def several(seeds, other_rank, tmp_path_factory):
    """The report of two seeds and another configuration, its plots not drawn."""
    folder = tmp_path_factory.mktemp("report-of-several")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return folder, write_run_report(*seeds, other_rank, into=folder)


def trial(run: Path, label: str = "keeplora"):
    return read_trial(run / label, read_results(run)[label], seed=0, run=run.name)


@pytest.mark.slow
def test_one_run_gets_every_image_as_png_and_svg_and_every_table(one):
    names = {path.name for path in one.iterdir()}
    pictures = {
        "curves",
        "forgetting",
        "loss",
        "cost",
        *(f"{kind}-keeplora" for kind in ("heatmap", "capacity", "captured", "overlap")),
    }
    pictures |= {"heatmap-seq-lora", "overlap-seq-lora"}
    assert names == {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} | {
        "report.html",
        "report.json",
        "table.md",
        "table.tex",
        "summary.csv",
        "scores.csv",
    }


def test_without_another_folder_the_report_of_a_run_lies_next_to_its_files(
    other_rank, tmp_path, capfd, undrawn
):
    copy = shutil.copytree(other_rank, tmp_path / "run")
    assert cli.main(["report", str(copy)]) == 0
    assert (copy / "report.html").is_file() and f"run folder: {copy}" in capfd.readouterr().out


def test_what_a_trial_says_is_what_the_files_of_the_run_say(seeds):
    found, folder = trial(seeds[0]), seeds[0] / "keeplora"
    prepared = json.loads((folder / "task-02-stripes/prepared.json").read_text())["report"]["gradient"]
    for name, numbers in prepared.items():
        part = "vision" if name.startswith("vision") else "text"
        assert found.captured[part][name][1] == numbers["captured"]
    history = json.loads((folder / "task-03-corners/train.json").read_text())["history"]
    assert (
        found.losses["corners"] == [(r["step"], r["loss"]) for r in history if "loss" in r]
        and len(found.losses["corners"]) == 3
    )
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    trained = [entry for entry in entries if entry["stage"] == "TRAINED"]
    assert found.costs["TRAINED"].seconds == pytest.approx(sum(entry["seconds"] for entry in trained))
    assert found.costs["TRAINED"].peak_bytes == max(entry["info"]["peak_bytes"] for entry in trained)
    assert set(found.costs) == {"CONSOLIDATED", "EVALUATED", "PREPARED", "TRAINED"}


def test_the_report_says_what_every_method_asked_for(seeds, one):
    lines = (one / "table.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| run | trained per task"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 4]]
    assert [row[0] for row in rows] == ["seq-lora", "keeplora"] and lines[start + 4] == "", (
        "the untouched model asks for nothing"
    )
    for label, trained, kept, extra, seen, passes, others, needed in rows:
        # One epoch of 24 examples a task; KeepLoRA takes the first gradient and the features of all of them.
        assert (seen, passes, needed) == ("72", "1.00", "nothing")
        assert others == ("0.00" if label == "seq-lora" else "2.00")
        folders = sorted((seeds[0] / label).glob("task-0[1-3]-*"))
        numbers = [
            value.numel()
            for key, value in load_file(folders[0] / "delta.safetensors").items()
            if label == "seq-lora" or key.endswith(".B")
        ]
        assert int(trained) == sum(numbers)
        sizes = [
            path.stat().st_size
            for folder in [*folders, *(seeds[0] / label).glob("task-00-*")]
            for path in folder.glob("*.safetensors")
            if path.stem in ("delta", "state")
        ]
        assert float(kept) == pytest.approx(sum(sizes) / 3 / 1e3, abs=0.05) and len(sizes) == (
            3 if label == "seq-lora" else 7  # W_p is of the base.
        )
        closed = [
            entry["info"]
            for entry in map(json.loads, (seeds[0] / label / "journal.jsonl").open())
            if entry["stage"] == "CLOSED"
        ]
        times = closed[-1]["test_seconds"]
        assert float(extra) == pytest.approx(1e3 * (times["learned"] - times["untouched"]), abs=0.006)
    assert '<th scope="col">trained per task</th>' in (one / "report.html").read_text()


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles(seeds):
    paths = [
        seeds[0] / "keeplora" / f"task-{i:02d}-{name}" / "delta.safetensors"
        for i, name in enumerate(TASKS, start=1)
    ]
    found = overlap(paths)
    one, other = load_file(paths[0]), load_file(paths[2])
    cosines = []
    for key in one:
        if key.endswith(".A"):
            # Principal angles by their definition: singular values of the product of orthonormal bases, here from the SVD.
            bases = [
                torch.linalg.svd(deltas[key].double(), full_matrices=False).Vh for deltas in (one, other)
            ]
            cosines.append(float(torch.linalg.svdvals(bases[0] @ bases[1].T).square().mean()))
    assert found[0][2] == pytest.approx(statistics.mean(cosines), abs=1e-5) and found[2][0] == pytest.approx(
        found[0][2]
    )
    assert [found[i][i] for i in range(3)] == pytest.approx([1.0] * 3)


def test_one_adapted_task_has_no_overlap(seeds, tmp_path):
    first = seeds[0] / "keeplora/task-01-colours/delta.safetensors"
    assert overlap([first, tmp_path / "gone"]) is None
    # Nor has a bound that learns all tasks at once, with the last one; the earlier one has an empty file.
    save_file({}, tmp_path / "nothing")
    assert overlap([tmp_path / "nothing", first]) is None


def test_seeds_are_one_row_and_another_configuration_has_its_own(seeds, other_rank, several):
    folder, results = several
    assert {name: len(trials) for name, trials in results.items()} == {
        "zero-shot": 1,
        "seq-lora": 2,
        "keeplora (seed0)": 2,
        "keeplora (rank3)": 1,
    }
    averages = [Matrix.from_json(run / "keeplora/matrix.json").metrics()["average"] for run in seeds]
    assert len(set(averages)) == 2, "equal seeds would make a spread of nothing"
    row = next(
        line
        for line in (folder / "table.md").read_text().splitlines()
        if line.startswith("| keeplora (seed0) |")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (
        cells[1] == "2" and cells[3] == f"{statistics.mean(averages):.1f} ± {statistics.stdev(averages):.1f}"
    )
    assert "| keeplora (rank3) | 1 |" in (folder / "table.md").read_text()


def test_the_wrong_answers_of_every_task_and_stage_add_up(seeds, one):
    record = json.loads((one / "report.json").read_text())
    ((answers,), summary) = record["answers"]["keeplora"], record["summary"]["keeplora"]
    assert summary["examples"] == 72 and summary["other_passes_of"] == {"feature": 1.0, "gradient": 1.0}
    stages = ["zero-shot", *TASKS]
    for stage, path in zip(stages, sorted((seeds[0] / "keeplora").glob("task-*/scores.json")), strict=True):
        for task, score in json.loads(path.read_text()).items():
            assert sum(answers["errors"][task][stage].values()) == score["n"] - score["correct"]
            pairs = answers["confusions"][task][stage]
            assert sum(count for *_, count in pairs) <= score["n"] - score["correct"]
            assert pairs == sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))
    assert "most frequent confusions at the end" in (one / "report.html").read_text()


def test_the_csv_files_hold_unrounded_numbers(seeds, several):
    folder, _ = several
    summary = {row["run"]: row for row in csv.DictReader(open(folder / "summary.csv"))}
    lasts = [Matrix.from_json(run / "seq-lora/matrix.json").metrics()["last"] for run in seeds]
    assert float(summary["seq-lora"]["last_mean"]) == pytest.approx(statistics.mean(lasts), rel=1e-12)
    assert summary["keeplora (seed0)"]["examples"] == "72.0" and summary["zero-shot"]["examples"] == ""
    assert float(summary["keeplora (seed0)"]["other_passes"]) == 2 and summary["seq-lora"]["needs"] == ""
    assert float(summary["seq-lora"]["last_sd"]) == pytest.approx(statistics.stdev(lasts), abs=1e-9)
    assert summary["zero-shot"]["last_sd"] == "" and summary["keeplora (rank3)"]["n"] == "1"
    scores = list(csv.DictReader(open(folder / "scores.csv")))
    cell = next(
        r
        for r in scores
        if (r["run"], r["seed"], r["after"], r["task"]) == ("seq-lora", "1", "stripes", "colours")
    )
    assert float(cell["score"]) == Matrix.from_json(seeds[1] / "seq-lora/matrix.json").rows[1][0]
    assert len(scores) == 3 + 5 * (3 + 9)


def test_the_latex_tables_say_what_the_markdown_says_and_escape_what_latex_reads(several):
    from llava_keeplora.report.latex_csv import latex_table

    folder, _ = several
    latex = (folder / "table.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2 + 3
    row = next(
        line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| seq-lora |")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    expected = " & ".join(f"$-${cell[1:]}" if cell.startswith("-") else cell for cell in cells).replace(
        "±", r"$\pm$"
    )
    assert expected + r" \\" in latex
    assert latex_table(["run", "A_1"], [["50% & {x}~^\\$#", "-0.5 ± 1.0"]]).splitlines()[2:5] == [
        r"run & A\_1 \\",
        r"\midrule",
        r"50\% \& \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\$\# & $-$0.5 $\pm$ 1.0 \\",
    ]


def test_the_page_says_which_runs_a_row_stands_for_and_where_they_differ(several):
    page = (several[0] / "report.html").read_text()
    assert "<dt>row keeplora (seed0)</dt><dd>seed0 (seed 0), seed1 (seed 1)</dd>" in page
    assert (
        "<dt>seed (seed1)</dt><dd>1</dd>" in page
        and "<dt>parts (rank3)</dt>" in page
        and "<dt>model</dt>" in page
    )


def refused(*runs, **options) -> str:
    with pytest.raises(RunError) as error:
        write_run_report(*runs, **options)
    return str(error.value)


def test_runs_that_cannot_stand_side_by_side_are_refused_in_a_sentence(seeds, make_run, tiny_tasks, tmp_path):
    first, second = seeds
    out = tmp_path / "out"
    assert refused(*seeds) == "the report of 2 runs belongs to none of their folders; add --into DIR."
    assert refused(first, first, into=out) == "a run is named twice; name every run once."
    fewer = make_run(
        "fewer", tasks=[str(path) for path in reversed(tiny_tasks[:2])], methods={"seq-lora": {}}
    )
    assert refused(first, fewer, into=out) == (
        f"{first} and {fewer} have different tasks (colours, stripes, corners against stripes, colours), "
        "so their numbers can't stand side by side; report them apart."
    )
    again = shutil.copytree(first, tmp_path / "again")
    assert refused(first, again, into=out) == (
        f"{first} and {again} hold 'seq-lora' with the same settings and the same seed 0, which are no two samples; name one of them."
    )
    scores, journal = again / "zero-shot/task-00-base/scores.json", again / "zero-shot/journal.jsonl"
    before = file_hash(scores)
    scores.write_text(scores.read_text().replace('"metric": "accuracy"', '"metric": "other"', 1))
    journal.write_text(journal.read_text().replace(before, file_hash(scores)))
    assert (
        refused(first, again, into=out)
        == f"{first} and {again} score task 'colours' on different examples or by different metrics; report them apart."
    )
    assert not out.exists()


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_named_before_anything_is_made_of_it(name, other_rank, tmp_path):
    run = shutil.copytree(other_rank, tmp_path / "run")
    path = run / "keeplora/task-02-stripes" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        RunError,
        match=rf"{path} is not what stage [A-Z]+ of task 2 wrote; restore it or start over in a new output_dir\.",
    ):
        write_run_report(run, into=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_in_progress_is_reported_up_to_its_last_stage(other_rank, tmp_path, undrawn):
    """The files as they are when the second task is being trained."""
    run = shutil.copytree(other_rank, tmp_path / "run")
    folder = run / "keeplora"
    for path in (folder / "task-02-stripes").iterdir():
        if path.name not in ("adapters.safetensors", "prepared.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "task-03-corners")
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(lines[: 4 + 6 + 2]))
    whole = Matrix.from_json(folder / "matrix.json")
    Matrix(whole.tasks, whole.zero_shot, whole.rows[:1]).to_json(folder / "matrix.json")
    write_run_report(run)
    assert {path.stem for path in run.glob("*.png")} == {
        "curves",
        "loss",
        "cost",
        "heatmap-keeplora",
        "capacity-keeplora",
        "captured-keeplora",
    }


def test_several_runs_on_the_command_line_go_into_a_folder_or_are_refused(
    seeds, tmp_path, capfd, monkeypatch
):
    from llava_keeplora.report import run_report

    monkeypatch.setattr(run_report, "write_report", lambda *args: None)  # the plots are other tests'
    assert cli.main(["report", *map(str, seeds), "--into", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^\| keeplora \| 2 \| .* ± ", out, re.M) and f"\nfolder: {tmp_path}\n" in out
    assert cli.main(["report", *map(str, seeds)]) == 2
    assert (
        "error: the report of 2 runs belongs to none of their folders; add --into DIR."
        in capfd.readouterr().err
    )


def test_a_report_is_current_until_it_would_show_something_else(other_rank, tmp_path, undrawn):
    run = shutil.copytree(other_rank, tmp_path / "run")
    write_run_report(run)
    assert report_is_current(run)
    (run / "table.tex").rename(run / "moved")
    assert not report_is_current(run)
    (run / "moved").rename(run / "table.tex")
    journal = run / "keeplora/journal.jsonl"
    journal.write_text(journal.read_text().replace('"seconds": ', '"seconds": 1', 1))
    assert not report_is_current(run)


def test_every_command_of_the_reports_page_is_one():
    text = (Path(__file__).parents[2] / "docs/reports.md").read_text()
    commands = re.findall(r"^    llava-keeplora (.*)$", text, re.M)
    parsed = [cli.parse_arguments(cli.build_parser(), command.split()) for command in commands]
    assert [args.run.__name__ for args in parsed] == ["run_report", "run_train"]
    assert parsed[1].overrides == ["training.report_to=tensorboard"]


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on the PATH: 2 checks left out")

    def start(*arguments):
        command = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
        patience = forked.patience()
        return subprocess.run(command, capture_output=True, text=True, timeout=patience, check=True).stdout

    return start


@pytest.mark.parametrize(("scheme", "paper"), [("light", (255, 255, 255)), ("dark", (22, 25, 29))])
def test_a_browser_shows_the_page_in_light_and_dark(browser, one, tmp_path, scheme, paper):
    from PIL import Image

    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browser(
        *dark,
        "--window-size=1280,1600",
        f"--screenshot={tmp_path / 'page.png'}",
        f"file://{one / 'report.html'}",
    )
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    assert max(colours, key=colours.get) == paper and picture.getpixel((2, 2)) == paper
    hues = Counter(
        round(12 * colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0])
        for colour in colours
        if max(colour) - min(colour) > 90
    )
    assert hues[round(12 * colorsys.rgb_to_hsv(0xD5, 0x5E, 0)[0])] > 0, (
        "the pictures keep the hues of their lines"
    )


def test_a_telephone_scrolls_the_images_but_never_the_page(browser, one, tmp_path):
    page = (one / "report.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    script = "f.onload = () => { const d = f.contentDocument; document.title = [d.documentElement.scrollWidth, [...d.images].every(i => i.naturalWidth > 300)] }"
    frame = f'<iframe id="f" width="390" height="800" frameborder="0" srcdoc="{page}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}<script>{script}</script>")
    dom = browser("--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path / 'frame.html'}")
    assert "<title>390,true</title>" in dom[:200]


def test_a_setting_that_an_older_version_did_not_have_makes_no_other_row_and_a_guard_does():
    new = {"methods": {"keeplora": {"options": {"preset": "paper", "distillation": None}}}, "tasks": ["a"]}
    old = {"methods": {"keeplora": {"options": {"preset": "paper"}}}, "tasks": ["a"]}
    other = {"methods": {"keeplora": {"options": {"preset": "paper", "distillation": 1.0}}}, "tasks": ["a"]}
    assert settings_key(new, "keeplora") == settings_key(old, "keeplora") != settings_key(other, "keeplora")
    guarded = new | {"guard": {"old_tasks": {"max_drop": 2.0}}}
    assert settings_key(guarded, "keeplora") != settings_key(new, "keeplora")
    assert settings_key(guarded, "zero-shot") == settings_key(new, "zero-shot")
