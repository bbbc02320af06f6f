"""What is noted of a phase while it runs, and once it has."""

import json
import math
import time

import pytest

from d2dmoe_pl.chain_status import STATUS, noted, seconds_of

CONFIG = {"model.alpha": 0.1}


def status(folder):
    return json.loads((folder / STATUS).read_text())


def test_time_counts_over_all_runs_that_were_not_killed(tmp_path, monkeypatch):
    clock = iter([10.0, 13.0, 100.0, 104.0, 200.0, 201.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    seen = []

    def interrupted():
        with noted(tmp_path, CONFIG, goes_on=False):
            seen.append(status(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [{"config": CONFIG, "finished": False, "seconds": 0.0}]
    assert status(tmp_path) == {"config": CONFIG, "finished": False, "seconds": 3.0}
    with noted(tmp_path, CONFIG, goes_on=True):
        pass
    assert status(tmp_path) == {"config": CONFIG, "finished": True, "seconds": 7.0}
    with noted(tmp_path, CONFIG, goes_on=False):
        pass
    assert seconds_of(tmp_path) == 1.0


def test_what_an_earlier_version_left_says_nothing_of_time(tmp_path):
    assert math.isnan(seconds_of(tmp_path))
    (tmp_path / STATUS).write_text(json.dumps({"config": CONFIG, "finished": False}))
    with noted(tmp_path, CONFIG, goes_on=True):
        pass
    assert status(tmp_path) == {"config": CONFIG, "finished": True, "seconds": None}
    assert math.isnan(seconds_of(tmp_path))
