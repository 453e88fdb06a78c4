"""metrics.jsonl: valid JSON whatever the values, whole lines whatever happened, cut where asked."""

from __future__ import annotations

import json
import math

import pytest

from lgpt.tracking.metrics_file import MetricLine, MetricsFile, read_metrics


def written(folder, steps) -> MetricsFile:
    file = MetricsFile(folder)
    for step in steps:
        file.append(MetricLine(step, 100.0 + step, {"loss": 1.0 / (step + 1)}))
    return file


def test_nan_and_infinities_are_valid_json_and_come_back(tmp_path):
    file = MetricsFile(tmp_path)
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "one": 1.0}
    file.append(MetricLine(3, 100.5, values))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path)
    assert (line.step, line.time) == (3, 100.5)
    assert math.isnan(line.metrics.pop("nan"))
    assert line.metrics == {"up": math.inf, "down": -math.inf, "one": 1.0}
    file.close()


def test_half_a_line_of_a_killed_run_goes_when_the_file_is_opened_again(tmp_path):
    written(tmp_path, [1, 2]).close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 3, "ti')
    assert [line.step for line in read_metrics(tmp_path)] == [1, 2]
    file = written(tmp_path, [3])
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("sent", range(6))
@pytest.mark.parametrize("kept_step", range(-1, 6))
def test_a_cut_keeps_the_place_of_what_was_sent(tmp_path, sent, kept_step):
    file = written(tmp_path, range(5))
    _, offset = file.read_from(0, sent) if sent else ([], 0)
    offset = file.truncate_after(kept_step, offset)
    file.append(MetricLine(9, 0.0, {}))
    lines, end = file.read_from(offset, 1000)
    kept = [step for step in range(5) if step <= kept_step]
    assert [line.step for line in lines] == [*kept[min(sent, 5) :], 9]
    assert end == file.size()
    file.close()


def test_reading_takes_whole_lines_up_to_the_limit_and_one_at_least(tmp_path):
    file = written(tmp_path, range(5))
    lines, offset = file.read_from(0, 2)
    assert [line.step for line in lines] == [0, 1]
    lines, offset = file.read_from(offset, 0)
    assert [line.step for line in lines] == [2]
    lines, offset = file.read_from(offset, 1000)
    assert [line.step for line in lines] == [3, 4]
    assert file.read_from(offset, 1000) == ([], offset)
    file.close()


def test_a_run_without_metrics_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []
