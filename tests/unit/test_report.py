"""Promises of the report: it holds the whole record, refers to nothing outside, escapes every name and
shows no number that nobody measured or predicted."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sample_record

from edgekd.errors import StorageError
from edgekd.report import html_report, markdown_report, print_summary, write_reports
from edgekd.report.facts import backends, bounds, latency, primary, runtime_steps, significant, wilson
from edgekd.report.headlines import headline_figures
from edgekd.report.sensitivity import sensitivity_bars
from edgekd.report.svg import Axis, fit_axis

HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' | `x` </svg> ]]> <!-- & \x00\ud800 [bold red]"


def embedded(page: str) -> Any:
    found = re.findall(r'<script type="application/json" id="record">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def poison(value: Any) -> Any:
    """The record with every text replaced by a hostile one, kinds and verdicts too."""
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def without(record: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node.pop(path[-1], None)
    return changed


def nulled(value: Any) -> Any:
    """The record with every number gone."""
    if isinstance(value, dict):
        return {key: nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


def console_text(record: dict[str, Any], width: int = 120) -> str:
    from rich.console import Console

    with Path(os.devnull).open("w") as sink:
        console = Console(width=width, record=True, file=sink)
        print_summary(record, console, Path("runs/demo/report.html"))
        return console.export_text()


class Balance(HTMLParser):
    """Counts elements that are opened and not closed, and gathers what points outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": sample_record.full_record,
    "teacher": sample_record.teacher_record,
    "empty": dict,
    "nulled": lambda: nulled(sample_record.full_record()),
    "hostile": lambda: poison(sample_record.full_record()),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_is_embedded_whole(name: str) -> None:
    record = RECORDS[name]()
    assert embedded(html_report(record)) == record


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_is_balanced_and_refers_to_nothing_outside(name: str) -> None:
    page = html_report(RECORDS[name]())
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page
    found = Balance()
    found.feed(page)
    assert (found.open, found.outside, found.handlers) == ([], [], [])


@pytest.mark.parametrize("name", RECORDS)
def test_every_drawing_is_well_formed(name: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html_report(RECORDS[name]()), re.DOTALL)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        for element in root.iter():
            assert "nan" not in " ".join(element.attrib.values()).lower().split()
            for key in ("x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2"):
                if key in element.attrib:
                    assert abs(float(element.attrib[key])) < 5000
    assert len(drawings) >= {"full": 12, "teacher": 2}.get(name, 0)


@pytest.mark.parametrize("write", [html_report, markdown_report])
def test_hostile_names_are_escaped(write: Callable[[dict[str, Any]], str]) -> None:
    text = write(poison(sample_record.full_record()))
    assert "<script>alert" not in text
    assert "alert(1)</script>" not in text
    assert "\x00" not in text
    assert "&lt;script&gt;alert(1)" in text
    text.encode("utf-8")


def test_fidelity_has_a_row_for_every_model_that_was_measured() -> None:
    record = sample_record.full_record()
    page = re.search(r'<section id="fidelity">.*?</section>', html_report(record), re.DOTALL)
    assert page is not None
    names = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', page.group())
    measured = [row["id"] for row in record["metrics"]["variants"]]
    assert names == ["student, float", "student, quantized (simulated)", *measured]
    assert "0.0613" in page.group()  # the KL divergence
    line = "| student, float | 95.10 % | 2.90 % / 2.10 % | 0.946 | 0.0613 | 1.24 % |"
    assert line in markdown_report(record).splitlines()


def test_fidelity_that_is_not_defined_is_a_dash_and_unmeasured_models_have_no_row() -> None:
    record = sample_record.full_record()
    record["metrics"]["student_float"]["fidelity"]["confidence_correlation"] = None
    record["metrics"]["quantize"]["fidelity"] = None
    for row in record["metrics"]["variants"]:
        row["fidelity"] = None
    page = re.search(r'<section id="fidelity">.*?</section>', html_report(record), re.DOTALL)
    assert page is not None
    assert len(re.findall(r'<th scope="row"', page.group())) == 1
    assert "—" in page.group()
    record["metrics"]["student_float"]["fidelity"] = None
    assert 'id="fidelity"' not in html_report(record)


def test_hostile_names_stay_inside_their_markdown_cell() -> None:
    lines = markdown_report(poison(sample_record.full_record())).splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert columns <= {4, 7}


def test_rich_markup_in_a_name_is_shown_as_text() -> None:
    assert "[bold red]" in re.sub(r"\s+", " ", console_text(poison(sample_record.full_record()), 400))


@pytest.mark.parametrize("show", [html_report, markdown_report, console_text])
def test_a_record_with_only_the_teacher_renders(show: Callable[[dict[str, Any]], str]) -> None:
    text = show(sample_record.teacher_record())
    assert "NO VERDICT" in text
    assert "92.83" in text


def paths(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in record.items():
        yield (key,)
        if isinstance(value, dict):
            for inner, below in value.items():
                yield (key, inner)
                if isinstance(below, dict) and key == "metrics":
                    yield from ((key, inner, leaf) for leaf in below)


@pytest.mark.slow
def test_any_missing_part_still_renders() -> None:
    record = sample_record.full_record()
    record["metrics"]["search"] |= {
        "candidates": record["metrics"]["search"]["candidates"][:3],
        "chosen": 0,
        "by_macs": 1,
        "by_parameters": 1,
    }
    for row in record["metrics"]["backends"].values():
        row["layers"] = row["layers"][6:9]
    for path in paths(record):
        changed = without(record, path)
        assert html_report(changed).endswith("</html>\n"), path
        assert markdown_report(changed).startswith("## "), path


def test_a_null_latency_shows_its_reason_and_no_number() -> None:
    record = sample_record.full_record()
    row = record["metrics"]["backends"]["tensorrt"]
    figure = latency(row)
    assert (figure.text, figure.kind, figure.basis) == ("—", "unknown", sample_record.NO_GPU)
    body = html_report(record).split("<main>")[1].split("</section>")[1]
    line = next(part for part in body.split("</table>")[0].split("<tr") if "tensorrt-int8" in part)
    assert sample_record.NO_GPU in line
    assert not re.search(r"\d (ms|µs)", line)
    for text in (markdown_report(record), console_text(record, 300)):
        assert "the graph was parsed and compiled here" in text
        (shown,) = [part for part in text.splitlines() if re.match(r"\W*tensorrt-int8 ", part)]
        assert not re.search(r"\d (ms|µs)", shown)


@pytest.mark.parametrize("kind", [None, "unknown", "guessed"])
def test_a_latency_without_a_known_kind_is_no_number(kind: str | None) -> None:
    figure = latency({"latency_p50_ms": 123.4, "latency_p90_ms": 567.8, "latency_kind": kind})
    assert (figure.text, figure.kind) == ("—", "unknown")


def test_the_three_kinds_look_different() -> None:
    record = sample_record.full_record()
    record["metrics"]["variants"][1]["latency_kind"] = "predicted"
    page = html_report(record)
    for kind in ("measured", "predicted", "unknown"):
        assert f'class="fig k-{kind}"' in page
    kinds = {figure.kind for figure in headline_figures(sample_record.full_record())}
    assert kinds == {"measured", "predicted", "unknown"}


def test_float_fallbacks_are_highlighted_with_their_reason() -> None:
    page = html_report(sample_record.full_record())
    assert page.count('<tr class="fallback">') == 2
    assert "2 of 26 layers fell back to float" in page
    assert "no int8 kernel for a depthwise 5x5 with stride 2" in page.split('class="callout"')[2]


def test_a_float_run_has_no_fallbacks() -> None:
    record = sample_record.full_record()
    for row in record["metrics"]["backends"].values():
        row["precision"] = "f32"
        for layer in row["layers"]:
            layer["precision"] = "f32"
    assert '<tr class="fallback">' not in html_report(record)


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE"])
def test_the_verdict_comes_first_as_a_word(verdict: str) -> None:
    record = sample_record.full_record() | {"verdict": verdict}
    assert f'<div class="word">{verdict}</div>' in html_report(record)
    assert verdict in markdown_report(record).splitlines()[0]
    assert verdict in console_text(record)


def test_a_cpu_clock_number_says_what_it_cannot_see() -> None:
    assert "memory-bandwidth stalls" in html_report(sample_record.full_record())


def test_values_that_are_not_finite_are_left_out() -> None:
    record = sample_record.full_record()
    record["metrics"]["distill"]["history"][3]["loss"] = float("nan")
    record["metrics"]["search"]["candidates"][5]["score"] = float("inf")
    page = html_report(record)
    assert embedded(page)["metrics"]["distill"]["history"][3]["loss"] is None
    assert "1 candidate was not scored" in page


def test_wilson_interval_against_a_hand_computed_value() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.403832, 0.596168), abs=1e-6)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0942, "0.0942"), (17.44, "17.4"), (0.0, "0"), (-2.131, "−2.13"), (2.1e-6, "2.10e−06")],
)
def test_significant_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_bounds_share_their_decimals() -> None:
    assert bounds((0.21, 1.65)) == "[0.21, 1.65]"


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-3.0, 1e-9], [1e-6, 1e6], [91.84, 91.86]])
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_their_values_and_have_distinct_ticks(values: list[float], log: bool) -> None:
    axis = fit_axis("x", values, log=log)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    labels = [axis.label(tick, 6) for tick in axis.ticks(6)]
    assert 2 <= len(labels) <= 15
    assert len(set(labels)) == len(labels)


def test_tick_labels_keep_the_decimals_of_their_step() -> None:
    axis = Axis("x", 0.0, 1.0)
    assert [axis.label(tick, 4) for tick in axis.ticks(4)] == ["0.00", "0.25", "0.50", "0.75", "1.00"]


def test_both_files_are_written(tmp_path: Path) -> None:
    record = poison(sample_record.full_record())
    page, summary = write_reports(record, tmp_path / "run")
    assert (page.name, summary.name) == ("report.html", "report.md")
    assert page.read_text(encoding="utf-8") == html_report(record)
    assert summary.read_text(encoding="utf-8") == markdown_report(record)


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError):
        write_reports(sample_record.teacher_record(), tmp_path / "run")


def test_import_loads_neither_torch_nor_an_engine_nor_rich() -> None:
    code = (
        "import sys, edgekd.report; "
        "print(sorted({'torch', 'rich', 'onnxruntime', 'openvino', 'tensorrt', 'numpy'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    return ""


def screenshot(page: Path, picture: Path, profile: Path) -> None:
    names = (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars",
        "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1000,1400",
        f"user-data-dir={profile}", f"screenshot={picture}",
    )  # fmt: skip
    command = [_chromium(), *(f"--{name}" for name in names), page.as_uri()]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not _chromium(), reason="no chromium binary on this machine")
def test_a_browser_draws_something(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    page, _ = write_reports(sample_record.full_record(), tmp_path)
    picture = tmp_path / "report.png"
    screenshot(page, picture, tmp_path / "profile")
    with image.open(picture) as opened:
        grey = opened.convert("L")
        histogram = grey.histogram()
    total = sum(histogram)
    mean = sum(value * many for value, many in enumerate(histogram)) / total
    variance = sum(many * (value - mean) ** 2 for value, many in enumerate(histogram)) / total
    assert variance > 100
    assert max(histogram) < 0.97 * total


def test_the_latency_at_the_top_is_that_of_the_shipped_variant() -> None:
    rows = [
        {"id": "openvino-int8", "backend": "openvino", "latency_p50_ms": 0.2, "latency_kind": "measured"},
        {"id": "openvino-bf16", "backend": "openvino", "latency_p50_ms": 0.1, "latency_kind": "measured"},
    ]
    other = {"id": "onnxruntime-int8", "backend": "onnxruntime", "latency_p50_ms": 0.3}
    metrics = {"variants": [*rows, other], "backends": {"openvino": rows[0], "onnxruntime": other}}
    record = {"target": {"runtime": "openvino"}, "metrics": metrics}
    assert primary(record)["id"] == "openvino-int8"
    assert primary(record | {"gate": {"shipped": "openvino-bf16"}})["latency_p50_ms"] == 0.1
    assert primary(record | {"gate": {"shipped": "onnxruntime-int8"}})["id"] == "onnxruntime-int8"
    compiled = {"backend": "tensorrt", "reason": "compiled, not executed"}  # the target's runtime is not here
    backends = {"openvino": rows[0], "onnxruntime": other, "tensorrt": compiled}
    elsewhere = {"target": {"runtime": "tensorrt"}, "metrics": {"backends": backends, "variants": [other]}}
    assert primary(elsewhere | {"gate": {"shipped": "onnxruntime-int8"}}) == compiled


def test_bars_are_sorted_by_sensitivity_and_layers_in_float_stand_out() -> None:
    page = html_report(sample_record.full_record())
    section = page[page.index('id="sensitivity"') :]
    names = re.findall(r'<th[^>]*scope="row"[^>]*>([^<]*)</th>', section[: section.index("</table>")])
    assert names == ["body.1.weight", "stem.weight", "head.weight"]
    assert re.findall(r'<tr class="spared"><th[^>]*>([^<]*)', section) == ["body.1.weight"]
    assert "1 of 3 layers stay in float" in section


def test_a_large_network_shows_its_most_sensitive_layers_and_all_that_are_float() -> None:
    damage = {f"layer{number}": 1 / (1 + number) for number in range(90)}
    bars = sensitivity_bars(damage, ["layer80"], "damage")
    assert bars.count("<tr") == 1 + 41 and "layer80" in bars and "49 least sensitive" in bars


def test_the_reason_for_what_is_shipped_is_on_the_page() -> None:
    record = sample_record.full_record()
    assert record["gate"]["reason"] in html_report(record)


def test_a_finalist_tells_its_predicted_and_its_measured_latency() -> None:
    record = sample_record.full_record()
    page = html_report(record)
    assert page.count("measured latency 0.123 ms") == 4  # two dots, at either latency, wide and narrow
    assert "finalist at its measured latency" in page
    record["metrics"]["search"]["finalists"] = None
    assert "finalist at its measured latency" not in html_report(record)


def test_the_second_stage_shows_each_short_training_and_marks_the_chosen() -> None:
    record = sample_record.full_record()
    page = html_report(record)
    rows = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*(?:largest that fits|best and most diverse).*?</tr>", page)
    told = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
    assert [row[-1] for row in told] == ["—", "ms"]  # latency measured
    assert "85.67" in told[0]
    assert {"84.56", "83.45", "91.23", "0.123"} <= set(told[1])
    assert ["target" in row for row in rows] == [False, True]
    assert "τ 0.61 for those left out" in page
    del record["metrics"]["search"]["refine"]
    assert "Second stage" not in html_report(record)


def test_a_candidate_that_was_not_scored_tells_which_and_why() -> None:
    record = sample_record.full_record()
    found = record["metrics"]["search"]["candidates"]
    found[5] |= {"score": None, "feasible": True, "genome": [9, 9, 5]}
    found[6] |= {"score": None, "feasible": False, "genome": [9, 9, 6]}
    tips = re.findall(r"<title>genome (\[9, 9, .\])[^<]*?((?:with|out)[^\n<]*)</title>", html_report(record))
    assert set(tips) == {
        ("[9, 9, 5]", "within the budget, without a finite score"),
        ("[9, 9, 6]", "outside the budget, not scored"),
    }


def test_the_front_is_a_staircase_through_its_candidates() -> None:
    record = sample_record.full_record()
    assert "the best score up to each cost" not in html_report(record)
    search = record["metrics"]["search"]
    for row, (latency_ms, score) in enumerate([(0.01, 0.2), (0.02, 0.5), (0.04, 0.9)]):
        search["candidates"][row] |= {"latency_ms": latency_ms, "score": score}
    search["front"] = [0, 1, 2]
    page = html_report(record)
    assert "the best score up to each cost" in page
    (path, *_) = re.findall(r'<polyline points="([^"]*)" class="line front"', page)
    corners = [tuple(map(float, point.split(","))) for point in path.split()]
    assert len(corners) == 5
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(corners))  # steps, nothing between


def test_a_runtime_that_the_target_does_not_use_is_not_told_of() -> None:
    made = sample_record.full_record()
    made["target"]["id"] = "x86-amx-server"
    reason = "target 'x86-amx-server' does not use tensorrt"
    made["metrics"]["backends"]["tensorrt"] = {"id": None, "backend": "tensorrt", "reason": reason}
    assert "tensorrt" not in backends(made)
    assert reason not in markdown_report(made)
    page, _, _ = html_report(made).partition('id="record"')
    assert reason not in page
    assert "unnamed" not in page


def test_the_ladder_of_accuracies_has_the_shipped_variant() -> None:
    made = sample_record.full_record()
    shipped = copy.deepcopy(made["metrics"]["variants"][0])
    shipped |= {"id": "openvino-bf16", "backend": "openvino", "precision": "bf16", "accuracy": 0.9137}
    made["metrics"]["variants"].append(shipped)
    made["gate"]["shipped"] = "openvino-bf16"
    assert ("openvino, bf16 (shipped)", 0.9137) in [step[:2] for step in runtime_steps(made)]
    assert "openvino, bf16 (shipped)" in html_report(made)
    assert "openvino, bf16 (shipped)" in markdown_report(made)
