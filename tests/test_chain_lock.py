"""One chain a folder: a second one is refused, and one that has died holds nothing."""

import json
import os
import subprocess
import sys

import pytest

from d2dmoe_pl import chain_lock
from d2dmoe_pl.chain_lock import locked
from d2dmoe_pl.errors import ConfigError


@pytest.mark.thorough
def test_a_second_chain_is_refused_and_names_the_first(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom d2dmoe_pl.chain_lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        refused = pytest.raises(ConfigError, match=rf"a chain runs there already \(process {holder.pid} on .*, since ")
        with refused, locked(tmp_path / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run"):  # of one that has died
        assert json.loads((tmp_path / "run" / chain_lock.HOLDER).read_text())["pid"] == os.getpid()
    assert not any((tmp_path / "run").iterdir())


def test_other_processes_of_the_run_do_not_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(chain_lock.rank_zero_only, "rank", 1)
    with locked(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}'])
def test_a_holder_that_cannot_be_read(tmp_path, text):
    (tmp_path / chain_lock.HOLDER).write_text(text)
    with locked(tmp_path):
        assert json.loads((tmp_path / chain_lock.HOLDER).read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())
